# SPDX-License-Identifier: Apache-2.0
"""``ci/sweep``: arguments and printing."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import click

from workbench.quality.making import Making, gpu_of, made_of
from workbench.quality.registered import registered
from workbench.quality.sweep import BAD, Outcome, from_json, to_json, to_markdown, try_one

_DOCS = Path(__file__).resolve().parents[3] / "docs"


@click.command()
@click.argument("architectures", nargs=-1)
@click.option("--part", help="Of all architectures, only every n-th from the k-th: k/n, e.g. 3/10.")
@click.option("--resume", is_flag=True, help="Leave out those whose outcome is known and whose data has not changed.")
@click.option(
    "--check",
    is_flag=True,
    help="Write nothing; load what has changed, too; fail where an outcome is another one.",
)
@click.option("--checkpoints", type=click.Path(path_type=Path), help="Where checkpoints are kept; else they are not.")
@click.option("--docs", type=click.Path(path_type=Path), default=_DOCS, help="The folder of families.json and .md.")
def main(
    *, architectures: tuple[str, ...], part: str | None, resume: bool, check: bool, checkpoints: Path | None, docs: Path
) -> None:
    """Load architectures both ways: the given ones, or all that SGLang registers; keep the outcomes in docs/."""
    release = version("sglang")
    data, page = docs / "families.json", docs / "families.md"
    known = from_json(data.read_text(), release) if data.exists() else {}
    wrong = []
    names = architectures or parted(registered(), part or "1/1")
    if resume or check:
        changed = [one for one in registered() if one not in known or known[one].made_of != made_of(one)]
        names = tuple(one for one in names if one in changed) if resume else tuple({*names, *changed})
    with tempfile.TemporaryDirectory() as name:
        for architecture, outcome in outcomes(names, checkpoints or Path(name) / "checkpoints", Path(name)):
            click.echo(f"{architecture:45} {outcome.outcome:18} {outcome.detail}")
            if outcome.outcome in BAD or (check and not same(outcome, known.get(architecture))):
                wrong.append(architecture)
            if not check:
                known[architecture] = outcome
                data.write_text(to_json(release, known))
    if not check:
        page.write_text(to_markdown(release, known))
    if wrong:
        click.echo(f"{'not as docs/families.json says' if check else 'must not happen'}: {', '.join(sorted(wrong))}")
    sys.exit(int(bool(wrong)))


def same(one: Outcome, other: Outcome | None) -> bool:
    """Whether they are, but for the remark: some of SGLang's errors print sets."""
    return other is not None and replace(one, detail="") == replace(other, detail="")


def parted(names: tuple[str, ...], part: str) -> tuple[str, ...]:
    """Every n-th name, from the k-th: ``k/n``."""
    number, count = map(int, part.split("/"))
    return names[number - 1 :: count]


def outcomes(names: Iterable[str], checkpoints: Path, scratch: Path) -> Iterator[tuple[str, Outcome]]:
    """The outcome of each, as it is found; as many at a time as there are cores."""
    mine = threading.local()
    with ExitStack() as stack, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:

        def tried(architecture: str) -> tuple[str, Outcome]:
            if not hasattr(mine, "making"):
                mine.making = stack.enter_context(Making(checkpoints, scratch / str(threading.get_ident())))
            return architecture, try_one(architecture, mine.making, scratch / "reports" / architecture)

        # Those of one machine after another: a process with a stand-in GPU takes 20 s to start.
        for done in as_completed([pool.submit(tried, one) for one in sorted(names, key=gpu_of)]):
            yield done.result()


if __name__ == "__main__":
    main()
