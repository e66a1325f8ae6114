# SPDX-License-Identifier: Apache-2.0
"""Share of grade-school mathematics questions that a server answers correctly: SGLang's GSM8K evaluation, greedy."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from workbench.loads.serving import ServerError

_SECONDS = 3600


@dataclass(frozen=True)
class Evaluation:
    """The questions to ask.

    Attributes:
        questions: number of questions, from the start of the test set.
        data: JSON lines with ``question`` and ``answer``; None lets SGLang download GSM8K's test set.
        shots: solved examples before each question, from the same file.
        answer_tokens: most tokens of an answer.
    """

    questions: int
    data: Path | None = None
    shots: int = 5
    answer_tokens: int = 512


def gsm8k(url: str, evaluation: Evaluation, folder: Path) -> float:
    """The share of right answers, 0 to 1.

    Args:
        url: of the server.
        evaluation: the questions to ask.
        folder: where SGLang leaves the answers.

    Raises:
        ServerError: the evaluation failed; its output is in the message.
    """
    address = urlsplit(url)
    command = [sys.executable, "-m", "sglang.test.few_shot_gsm8k"]
    command += ["--host", str(address.hostname), "--port", str(address.port)]
    command += ["--num-questions", str(evaluation.questions), "--num-shots", str(evaluation.shots)]
    command += ["--max-new-tokens", str(evaluation.answer_tokens)]
    if evaluation.data is not None:
        command += ["--data-path", str(evaluation.data)]
    # The caller's proxy must not be used for a server on this machine.
    environ = {**os.environ, "NO_PROXY": str(address.hostname), "no_proxy": str(address.hostname)}
    folder.mkdir(parents=True, exist_ok=True)
    ran = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    found = re.search(r"^Accuracy: ([0-9.]+)$", ran.stdout, re.MULTILINE)
    if ran.returncode != 0 or found is None:
        raise ServerError(f"The evaluation failed ({' '.join(command)}):\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}")
    return float(found.group(1))
