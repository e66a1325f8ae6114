"""Loads with another SGLang than this process has: another environment, or a source tree in place of the package.

Worker processes are forked from one that has imported SGLang, so each SGLang needs a process of its own, which has its
own ``LoadWorkers``. Jobs and results go through its standard input and output, one at a time.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from workbench.loads.job import LoadJob
from workbench.loads.loads import LoadFailed, LoadResult, LoadWorkers


class RemoteWorkers:
    """``LoadWorkers`` of another interpreter.

    Args:
        python: the interpreter.
        environ: its environment variables, all of them; ``PYTHONPATH`` has to have this package.
        folder: for logs.
    """

    def __init__(self, python: Path, environ: Mapping[str, str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "process.log"
        command = [str(python), "-P", "-m", "workbench.loads.remote", str(folder)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )

    def __enter__(self) -> RemoteWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def load(self, job: LoadJob) -> LoadResult:
        """As ``LoadWorkers.load``.

        Raises:
            LoadFailed: the job failed, or the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(job, self._process.stdin)
            self._process.stdin.flush()
            answer: LoadResult | LoadFailed = pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError) as error:
            told = self._log.read_text(errors="replace")[-4000:]
            raise LoadFailed(f"the process ended with exit code {self._process.wait()}\n{told}") from error
        if isinstance(answer, LoadFailed):
            raise answer
        return answer


def main(folder: str) -> None:
    """Answer jobs until there are no more."""
    # What else this process prints must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with LoadWorkers(Path(folder)) as workers:
        while True:
            try:
                job = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            answer: LoadResult | LoadFailed
            try:
                answer = workers.load(job)
            except LoadFailed as error:
                answer = error
            pickle.dump(answer, answers)
            answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
