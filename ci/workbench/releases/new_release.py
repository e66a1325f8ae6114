"""Takes on a new SGLang release, up to where a person has to decide.

1. Fetches its package, and that of the newest supported release before it.
2. Compares every function that is hooked: where it is, what it takes, what it does.
3. Enters it into releases.json and the table in docs/releases.md, with its date, what its package says of Python, torch
   and transformers, and what it lacks.
4. Resolves its lock (`ci/lock`), put on that of a release with the same torch and transformers if there is one.
5. Makes its patch series (`ci/make_patches`), and notes what its hooked functions do (`ci/bodies`).
6. Makes its environment, and has `python -m sglang_overlay check` look at the release itself.
7. Runs the tests that have to pass with each release, as overlay and on the patched release.
8. Measures its peaks (`ci/peaks`), and if it is the newest makes its baselines (`ci/baseline`), half an hour for the
   largest models.

Then it prints what to look at. With --compare-only it stops after the second step and changes nothing. The exit code
is 0 where all that was done went well, whatever there is to look at.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.version import Version

from sglang_overlay.cpu_reference.catalogue import HOOKS
from sglang_overlay.hooks import source_tree
from sglang_overlay.hooks.catalogue import OPTIONS, STREAMING, TELLING
from sglang_overlay.hooks.hook import Hook, HookState, State
from workbench.bench import page_tables
from workbench.releases import environment

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

TESTS = ("-m", "every_release")
PAGE = environment.CLONE / "docs" / "releases.md"

_INDEX = "https://pypi.org/pypi/sglang/json"
_LOCK_INPUT = """\
{put_on}# What ci/lock resolves into {release}.txt: the release, then what the project, its tests and its demo need.
sglang=={release}

-r project.in
"""


@dataclass(frozen=True)
class Change:
    """How a hooked function differs from one release to the next.

    Args:
        target: where the later release has it, or else where it was.
        problem: why it cannot be hooked; empty if it can.
        notes: the differences, one per line.
        diff: unified diff of the function itself; empty if it has not changed.
    """

    target: str
    problem: str
    notes: tuple[str, ...]
    diff: str


def compare(before: Path, after: Path, hooks: Iterable[Hook]) -> list[Change]:
    """The hooked functions that differ between two releases.

    Args:
        before: folder that contains the ``sglang`` package of the earlier release.
        after: the same for the later release.
        hooks: the hooks.
    """
    changes = (_change(before, after, hook) for hook in hooks)
    return [change for change in changes if change.problem or change.notes or change.diff]


def _change(before: Path, after: Path, point: Hook) -> Change:
    (old,), (new,) = (source_tree.inspect_hooks(root, [point]) for root in (before, after))
    was, now = _source(before, old), _source(after, new)
    notes = []
    if old.state.fits and new.state is State.ABSENT and old.state is not State.ABSENT:
        notes.append(f"it is gone, and with it: {new.detail}")
    if was and now and old.hook.target != new.hook.target:
        notes.append(f"it was {old.hook.target}")
    if was and now and was.parameters != now.parameters:
        notes.append(f"it took {', '.join(was.parameters)}; it takes {', '.join(now.parameters)}")
    problem = "" if new.state.fits else f"{new.state.value} {new.detail}".strip()
    return Change(new.hook.target, problem, tuple(notes), _diff(was, now) if was and now else "")


def _source(root: Path, found: HookState) -> source_tree.Source | None:
    return source_tree.find(root, found.hook.target)


def _diff(was: source_tree.Source, now: source_tree.Source) -> str:
    lines = difflib.unified_diff(was.text.splitlines(), now.text.splitlines(), "before", "after", lineterm="")
    return "\n".join(lines)


def entry_of(root: Path, release: str, date: str) -> dict[str, Any]:
    """The entry of a release for releases.json, from its package."""
    (metadata,) = root.glob("sglang-*.dist-info/METADATA")
    fields = Parser().parsestr(metadata.read_text(encoding="utf-8"))
    pins = {need.name: need for need in map(Requirement, fields.get_all("Requires-Dist", [])) if need.marker is None}
    absent = [found.hook.target for found in source_tree.inspect_hooks(root, STREAMING) if found.state is State.ABSENT]
    return {
        "release": release,
        "date": date,
        "python": fields["Requires-Python"],
        "torch": str(pins["torch"].specifier).removeprefix("=="),
        "transformers": str(pins["transformers"].specifier).removeprefix("=="),
        "absent": absent,
    }


def with_entry(text: str, entry: Mapping[str, Any]) -> str:
    """The text of releases.json with a release added or replaced."""
    others = [known for known in json.loads(text)["supported"] if known["release"] != entry["release"]]
    entries = sorted([*others, entry], key=lambda known: Version(known["release"]))
    return '{\n  "supported": [\n' + ",\n".join(map(_written, entries)) + "\n  ]\n}\n"


def _written(entry: Mapping[str, Any]) -> str:
    facts = ", ".join(f'"{name}": {json.dumps(value)}' for name, value in entry.items() if name != "absent")
    absent = ",".join(f"\n        {json.dumps(target)}" for target in entry["absent"])
    return f'    {{\n      {facts},\n      "absent": [{absent}' + ("\n      ]" if absent else "]") + "\n    }"


def fetch(release: str) -> Path:
    """Folder with the release's own package, without its dependencies; fetched once."""
    plan = environment.planned(release)
    folder = plan.cache / "packages" / release
    if not (folder / "sglang").is_dir():
        uv = environment.ensure_uv(plan)
        target = ["--quiet", "--no-deps", "--only-binary", ":all:", "--target", str(folder), "--python", sys.executable]
        environment.step(plan, [str(uv), "pip", "install", *target, f"sglang=={release}"])
    return folder


def published(release: str) -> str:
    """Day on which the first of the release's files was uploaded to the package index, in UTC."""
    with urllib.request.urlopen(_INDEX, timeout=60) as answer:
        files = json.load(answer)["releases"][release]
    return str(min(file["upload_time"] for file in files)).partition("T")[0]


def with_facts(page: str, entries: Iterable[Mapping[str, Any]]) -> str:
    """The page on releases with its table of them replaced."""
    header = ["SGLang", "published", "Python", "torch", "transformers"]
    facts = ("release", "date", "python", "torch", "transformers")
    rows = [[entry[fact].replace(">=", "from ") for fact in facts] for entry in entries]
    return page_tables.with_table(page, "ci/new_release", header, rows)


def lock_input(entry: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> str:
    """What `ci/lock` resolves: put on the lock of the first other release with the same torch and transformers."""
    same = (each for each in others if (each["torch"], each["transformers"]) == (entry["torch"], entry["transformers"]))
    plans = (environment.planned(each["release"], "cpu") for each in same if each["release"] != entry["release"])
    base = next((plan for plan in plans if plan.lock.exists() and plan.parent is None), None)
    put_on = "" if base is None else f"# on {base.release}.txt\n"
    return _LOCK_INPUT.format(put_on=put_on, release=entry["release"])


def enter(release: str, package: Path) -> None:
    """Write the release into releases.json and its page, and its lock."""
    file = environment.CLONE / environment.RELEASES
    entry = entry_of(package, release, published(release))
    text = with_entry(file.read_text(encoding="utf-8"), entry)
    file.write_text(text, encoding="utf-8")
    entries = json.loads(text)["supported"]
    PAGE.write_text(with_facts(PAGE.read_text(encoding="utf-8"), entries), encoding="utf-8")
    wanted = environment.CLONE / "ci" / "locks" / f"{release}.in"
    if not wanted.exists():
        wanted.write_text(lock_input(entry, entries), encoding="utf-8")
    _run("ci/lock", release)


def check(release: str) -> list[str]:
    """Problems that `python -m sglang_overlay check` finds with the release in its own environment."""
    python = environment.ensure(environment.planned(release))
    command = [str(python), "-m", "sglang_overlay", "check", "--json"]
    done = subprocess.run(command, cwd=environment.CLONE, capture_output=True, text=True, check=False)
    try:
        problems: list[str] = json.loads(done.stdout)["problems"]
    except ValueError:
        return [f"the check itself failed:\n{done.stderr}"]
    return problems


def _run(script: str, *arguments: str, check: bool = True) -> bool:
    command = [str(environment.CLONE / script), *arguments]
    return subprocess.run(command, cwd=environment.CLONE, check=check).returncode == 0


def report(changes: Sequence[Change], before: str, after: str) -> str:
    """The differences of hooked functions that a person has to look at."""
    if not changes:
        return f"No hooked function differs between {before} and {after}."
    parts = [f"Hooked functions that differ between {before} and {after}: {len(changes)}"]
    for change in changes:
        head = [f"## {change.target}", f"CANNOT BE HOOKED: {change.problem}" if change.problem else ""]
        parts.append("\n".join(line for line in (*head, *change.notes, change.diff) if line))
    return "\n\n".join(parts)


def previous(release: str, known: Sequence[str]) -> str:
    """The newest of the known releases before this one.

    Raises:
        SystemExit: there is none.
    """
    earlier = [name for name in known if Version(name) < Version(release)]
    if not earlier:
        sys.exit(f"error: no supported release is older than {release}: {', '.join(known)}")
    return max(earlier, key=Version)


def take_on(release: str, package: Path) -> list[str]:
    """Do steps 3 to 8; returns the errors, one per line."""
    enter(release, package)
    steps = [
        ("no patch series", "ci/make_patches", "--release", release),
        # Of functions with the series, too, where there is one.
        ("no fingerprints", "ci/bodies"),
        ("tests fail", "ci/test", "--release", release, "--tests-only", "--", *TESTS),
        ("tests fail", "ci/test", "--release", release, "--patched"),
        ("no peaks", "ci/peaks", "--release", release),
    ]
    if release == environment.supported()[-1]:
        steps.append(("no baselines", "ci/baseline", "--refresh", "--measured"))
    failed = [f"{problem}: {' '.join(command)}" for problem, *command in steps if not _run(*command, check=False)]
    return [*(f"check: {problem}" for problem in check(release)), *failed]


def to_do(release: str) -> str:
    """The steps that a person always has to do."""
    return (
        f"Left to you: look at the differences above, and enter what works differently into docs/releases.md; run "
        f"ci/test --release {release}; name it in CHANGELOG.md. For the newest "
        "release also ci/plans, ci/sweep, ci/quality and ci/bench."
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse, do the steps, print."""
    parser = argparse.ArgumentParser(
        prog="ci/new_release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("release", type=_release, help="such as 0.5.24")
    parser.add_argument("--compare-only", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    before = previous(options.release, environment.supported())
    package = fetch(options.release)
    changes = compare(fetch(before), package, (*STREAMING, *OPTIONS, *TELLING, *HOOKS))
    problems = [f"{change.target}: {change.problem}" for change in changes if change.problem]
    if not options.compare_only:
        problems += take_on(options.release, package)
    print(report(changes, before, options.release))
    if not options.compare_only:
        print(f"\n{to_do(options.release)}")
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _release(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)+(\.?(post|rc|dev)\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no release")
    return text


if __name__ == "__main__":
    sys.exit(main())
