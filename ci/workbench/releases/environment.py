"""The virtual environment that `ci/test` and `ci/demo` run in, made once and used again.

Runs before anything is installed, so it uses the standard library only. It has three parts, all under `cache_root()`,
none in the clone:

1. `uv-<version>-py<X.Y>`: uv, installed by pip from `ci/locks/uv.txt`.
2. `environments/<release>-<packages>-py<X.Y>-<lock digest>`: everything of `ci/locks/<release>.txt`, hashes checked. It
   does not depend on a clone, so all clones share it. Where two releases pin the same torch and transformers, the lock
   of one begins `# on <the other>.txt` and has only what differs, and its environment sees the rest in the other's.
3. `clones/<clone digest>-<environment>`: a virtual environment that holds this clone's editable install and nothing
   else, and sees the packages of 2. Two clones never see each other's code.

An environment counts as built when its marker file exists, which is written last. One without it is removed and
rebuilt, and a file lock keeps two processes from building the same one.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

CLONE = Path(__file__).resolve().parents[3]
RELEASES = Path("sglang_overlay", "hooks", "releases.json")
"""The supported releases, in a clone; newest last."""
PYTHON_NEEDED = (3, 11)
"""Required by SGLang 0.5.22 and later; earlier releases run on it as well."""
MARKER = "complete.json"
PUT_ON = re.compile(r"# on (?P<release>\S+)\.txt(?: without (?P<without>.+))?\n")
"""First line of a lock that has only what differs from another release's."""
BYTES_NEEDED = {"cpu": 9 * 2**30, "gpu": 16 * 2**30}
"""Disk space that an environment needs while it is built, by package selection, rounded up."""


class EnvironmentSetupError(RuntimeError):
    """Setting up failed; the message says what to do about it."""


@dataclass(frozen=True)
class Plan:
    """Which environment is wanted.

    Attributes:
        release: SGLang release, one of `locked()`.
        packages: "cpu" leaves out packages that only run on an NVIDIA GPU; "gpu" is the whole lock.
        clone: root of the working tree whose code is run.
        cache: folder that contains everything.
    """

    release: str
    packages: str
    clone: Path
    cache: Path

    @property
    def lock(self) -> Path:
        """The lock file with a hash for every package."""
        return self.clone / "ci" / "locks" / f"{self.release}.txt"

    @property
    def locked(self) -> str:
        """The complete lock, put together where it builds on another's."""
        own = self.lock.read_text(encoding="utf-8")
        on = PUT_ON.match(own)
        if on is None:
            return own
        dropped = frozenset((on["without"] or "").split())
        return without(replace(self, release=on["release"]).locked, dropped | frozenset(entries(own))) + own

    @property
    def requirements(self) -> str:
        """All requirements: the complete lock, for "cpu" without GPU-only packages."""
        return self._selected(self.locked)

    @property
    def parent(self) -> Plan | None:
        """The release whose environment this one is put on; None if it has everything itself, as with GPU packages.

        Packages cannot be hidden that only the parent has, and FlashInfer refuses to start beside another release's.
        """
        on = PUT_ON.match(self.lock.read_text(encoding="utf-8"))
        return None if on is None or self.packages == "gpu" else replace(self, release=on["release"])

    @property
    def own_requirements(self) -> str:
        """The requirements to install: those that the parent's environment does not have."""
        return self._selected(self.lock.read_text(encoding="utf-8")) if self.parent else self.requirements

    def _selected(self, lock: str) -> str:
        return lock if self.packages == "gpu" else without(lock, names_in(self.clone / "ci" / "locks" / "gpu_only.txt"))

    @property
    def name(self) -> str:
        """Folder name of the shared environment; a change of lock, selection or interpreter changes it."""
        return f"{self.release}-{self.packages}-py{python_tag()}-{digest(self.requirements)}"

    @property
    def base(self) -> Path:
        """The environment all clones share."""
        return self.cache / "environments" / self.name

    @property
    def layer(self) -> Path:
        """This clone's own environment on top of `base`."""
        return self.cache / "clones" / f"{digest(str(self.clone))}-{self.name}"


def cache_root() -> Path:
    """Folder for environments: `STREAMFP8_CACHE`, else `sglang-streamfp8` in the user's cache folder."""
    if override := os.environ.get("STREAMFP8_CACHE"):
        return Path(override).expanduser().resolve()
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user_cache).expanduser().resolve() / "sglang-streamfp8"


def supported(clone: Path = CLONE) -> list[str]:
    """Supported SGLang releases, oldest first; the last one is the default everywhere."""
    return [entry["release"] for entry in _known(clone)]


def sample(clone: Path = CLONE) -> list[str]:
    """The oldest supported release, the first with the torch in the middle, and the newest."""
    found = _known(clone)
    torches = list(dict.fromkeys(entry["torch"] for entry in found))
    middle = next(entry for entry in found if entry["torch"] == torches[len(torches) // 2])
    return list(dict.fromkeys(entry["release"] for entry in (found[0], middle, found[-1])))


def _known(clone: Path) -> list[dict[str, str]]:
    entries: list[dict[str, str]] = json.loads((clone / RELEASES).read_text(encoding="utf-8"))["supported"]
    return entries


def locked(clone: Path = CLONE) -> list[str]:
    """SGLang releases that have a lock file, oldest first."""
    found = (path.stem for path in (clone / "ci" / "locks").glob("[0-9]*.txt"))
    return sorted(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def has_nvidia_gpu() -> bool:
    """Whether the driver lists a GPU; torch is not installed yet."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def names_in(listing: Path) -> frozenset[str]:
    """Normalized package names in a file with one name per line; `#` starts a comment."""
    lines = (line.partition("#")[0].strip() for line in listing.read_text(encoding="utf-8").splitlines())
    return frozenset(normalized(line) for line in lines if line)


def normalized(name: str) -> str:
    """Package name normalized as in PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def without(lock: str, names: frozenset[str]) -> str:
    """The lock text without the entries of `names` and their hashes."""
    return "".join(entry for entry in _parts(lock) if _name_of(entry) not in names)


def entries(lock: str) -> dict[str, str]:
    """The lock's entries, with their hashes and comments, by normalized name."""
    return {_name_of(entry): entry for entry in _parts(lock) if entry[:1].isalnum()}


def _parts(lock: str) -> list[str]:
    return re.split(r"^(?=\S)", lock, flags=re.MULTILINE)


def _name_of(entry: str) -> str:
    return normalized(re.split(r"[=<>! \[;]", entry, maxsplit=1)[0])


def digest(text: str) -> str:
    """Twelve hexadecimal digits that stand for `text` in a folder name."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def python_tag() -> str:
    """Version of the running interpreter, which every environment is made with, as "3.11"."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def interpreter(environment: Path) -> Path:
    """The Python of a virtual environment."""
    return environment / "bin" / "python"


def site_packages(environment: Path) -> Path:
    """Where a virtual environment keeps its packages."""
    return environment / "lib" / f"python{python_tag()}" / "site-packages"


def ensure(plan: Plan) -> Path:
    """Create missing parts of `plan` and return the interpreter that runs the clone's code.

    Raises:
        EnvironmentSetupError: the machine is not suitable, or a step failed.
    """
    check_machine(plan)
    plan.cache.mkdir(parents=True, exist_ok=True)
    ensure_base(plan)
    with exclusive(plan.layer):
        if not is_complete(plan.layer) or marker_of(plan.layer).get("fingerprint") != fingerprint(plan):
            build_layer(plan)
    return interpreter(plan.layer)


def check_machine(plan: Plan) -> None:
    """Refuse plans that cannot work on this machine, before hours or gigabytes are spent on them."""
    if sys.version_info < PYTHON_NEEDED:
        raise EnvironmentSetupError(f"Python {python_tag()} is too old: SGLang {plan.release} needs 3.11 or newer.")
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise EnvironmentSetupError(
            f"The lock files are for Linux on x86_64, and this is {sys.platform} on {platform.machine()}. Install "
            "SGLang as its documentation says for this machine, then this project with `pip install -e '.[test]'`."
        )
    if not plan.lock.is_file():
        raise EnvironmentSetupError(
            f"There is no lock file for SGLang {plan.release}. Choose one of: {', '.join(locked(plan.clone))}."
        )


@contextlib.contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold the file lock of `target`, after waiting for any other process that holds it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(target.name + ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is setting up {target.name}, waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def marker_of(environment: Path) -> dict[str, object]:
    """The facts recorded when `environment` was completed; empty if it never was."""
    try:
        content = json.loads((environment / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_complete(environment: Path) -> bool:
    """Whether `environment` was built to the end, and the interpreter it was made with is still there."""
    return bool(marker_of(environment)) and interpreter(environment).exists()


def complete(environment: Path, **facts: object) -> None:
    """Record that `environment` was built to the end; it is not used before."""
    draft = environment / f"{MARKER}.partial"
    draft.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    draft.replace(environment / MARKER)


def ensure_base(plan: Plan) -> None:
    """Create the environment that all clones share, after the one that it is put on."""
    if plan.parent is not None:
        ensure_base(plan.parent)
    with exclusive(plan.base):
        if not is_complete(plan.base):
            build_base(plan)


def build_base(plan: Plan) -> None:
    """Install the lock into a new environment, replacing remains of an interrupted build."""
    started = time.monotonic()
    check_disk(plan)
    uv = ensure_uv(plan)
    requirements = plan.own_requirements
    count = len(entries(requirements))
    on = "" if plan.parent is None else f" on that of {plan.parent.release}"
    say(f"installing SGLang {plan.release} and what it needs{on}, {count} packages, into {plan.base}")
    make_venv(plan, plan.base, "--without-pip")
    if plan.parent is not None:
        see(plan.base, plan.parent.base)
    listing = plan.base / "requirements.txt"
    listing.write_text(requirements, encoding="utf-8")
    # Every process of a server imports 6,000 files; compiling them each time would take half of its start.
    compiled = ["--compile-bytecode", "--require-hashes", "--no-deps", "--only-binary", ":all:"]
    install(plan, uv, plan.base, [*compiled, "-r", str(listing)])
    seconds = time.monotonic() - started
    complete(plan.base, release=plan.release, packages=plan.packages, count=count, seconds=round(seconds, 1))
    say(f"installed in {seconds:.0f} s")


def build_layer(plan: Plan) -> None:
    """Install the clone, editable, into its own environment, which also sees the shared one."""
    uv = ensure_uv(plan)
    if not is_complete(plan.layer):
        make_venv(plan, plan.layer, "--without-pip")
        see(plan.layer, plan.base)
    install(plan, uv, plan.layer, ["--no-deps", "--no-build-isolation", "--editable", str(plan.clone)])
    complete(plan.layer, fingerprint=fingerprint(plan), clone=str(plan.clone))


def see(environment: Path, other: Path) -> None:
    """Have `environment` see the packages of the other, after its own."""
    # addsitedir instead of a bare path, so the .pth files of the other environment are honoured too.
    link = f"import site; site.addsitedir({str(site_packages(other))!r})\n"
    (site_packages(environment) / "_shared_environment.pth").write_text(link, encoding="utf-8")


def fingerprint(plan: Plan) -> str:
    """Digest of everything the editable install depends on, which does not include source files."""
    return digest("".join((plan.clone / name).read_text(encoding="utf-8") for name in ("setup.py", "pyproject.toml")))


def check_disk(plan: Plan) -> None:
    """Refuse a build that would fill the disk."""
    free, needed = shutil.disk_usage(plan.cache).free, BYTES_NEEDED[plan.packages]
    if free < needed:
        raise EnvironmentSetupError(
            f"{plan.cache} has {free / 2**30:.1f} GiB free and the environment takes up to {needed / 2**30:.0f} GiB. "
            "Make room, or set STREAMFP8_CACHE to a folder on a larger disk."
        )


def ensure_uv(plan: Plan) -> Path:
    """The pinned uv, installed by pip with its hash checked if it is not there yet."""
    lock = plan.clone / "ci" / "locks" / "uv.txt"
    version = re.findall(r"^uv==(\S+)", lock.read_text(encoding="utf-8"), flags=re.MULTILINE)[0]
    home = plan.cache / f"uv-{version}-py{python_tag()}"
    with exclusive(home):
        if not is_complete(home):
            say(f"installing uv {version}")
            make_venv(plan, home)
            pip = [str(interpreter(home)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            step(plan, [*pip, "--require-hashes", "--only-binary", ":all:", "-r", str(lock)])
            complete(home, version=version)
    return home / "bin" / "uv"


def ensure_folder(plan: Plan, name: str) -> Path:
    """A folder with the packages of `ci/locks/<name>.txt`, to be put behind an environment's own on `sys.path`.

    Raises:
        EnvironmentSetupError: a package could not be installed.
    """
    lock = plan.clone / "ci" / "locks" / f"{name}.txt"
    home = plan.cache / f"{name}-py{python_tag()}-{digest(lock.read_text(encoding='utf-8'))}"
    with exclusive(home):
        if not marker_of(home):
            uv = ensure_uv(plan)
            shutil.rmtree(home, ignore_errors=True)
            checked = ["--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", str(lock)]
            install(plan, uv, uv.parents[1], ["--target", str(home), *checked])
            complete(home, packages=name)
    return home


def make_venv(plan: Plan, environment: Path, *options: str) -> None:
    """Make an empty virtual environment, replacing whatever is there."""
    if environment.exists():
        shutil.rmtree(environment)
    step(plan, [sys.executable, "-m", "venv", *options, str(environment)])


def install(plan: Plan, uv: Path, environment: Path, arguments: list[str]) -> None:
    """Install with uv into `environment`."""
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    step(plan, [str(uv), "pip", "install", *quiet, "--python", str(interpreter(environment)), *arguments])


def step(plan: Plan, command: list[str]) -> None:
    """Run one command with its output on standard error: standard output is for the result."""
    try:
        subprocess.run(command, check=True, env=step_environment(plan), cwd=plan.cache, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        raise EnvironmentSetupError(
            f"This step failed: {' '.join(command)}\n{error}\nIts own message is above. What was done so far is kept: "
            "once the cause is gone (often the network or the package index), run the same command again."
        ) from error


def step_environment(plan: Plan) -> dict[str, str]:
    """The caller's variables without those that would redirect an install, and with uv's cache near the environments.

    On the same file system uv links packages from its cache instead of copying them, so the cache costs no extra disk.
    """
    redirecting = {"PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "PIP_PREFIX", "PIP_TARGET", "PIP_USER"}
    kept = {name: value for name, value in os.environ.items() if name not in redirecting}
    defaults = {"UV_CACHE_DIR": str(plan.cache / "uv-cache"), "UV_HTTP_TIMEOUT": "300"}
    return {**defaults, **kept, "UV_PYTHON_DOWNLOADS": "never"}


def say(message: str) -> None:
    """Print one line of progress on standard error."""
    print(f"[environment] {message}", file=sys.stderr, flush=True)


def planned(release: str | None = None, packages: str = "auto", clone: Path = CLONE) -> Plan:
    """The plan for this machine: by default the newest release; "auto" includes GPU packages if there is a GPU."""
    release = release or supported(clone)[-1]
    if packages == "auto":
        packages = "gpu" if has_nvidia_gpu() else "cpu"
    return Plan(release=release, packages=packages, clone=clone, cache=cache_root())


def main(arguments: list[str] | None = None) -> int:
    """Make or reuse the environment and print the path of its interpreter."""
    parser = argparse.ArgumentParser(prog="ci/env", description=main.__doc__)
    parser.add_argument("--release", default=supported()[-1], help=f"one of {', '.join(locked())}")
    parser.add_argument("--packages", choices=("auto", "cpu", "gpu"), default="auto", help="auto: gpu if there is one")
    parser.add_argument("--uv", action="store_true", help="only make uv ready, and print its path instead")
    listing = {"all": supported, "newest": lambda: supported()[-1:], "sample": sample}
    parser.add_argument(
        "--list", choices=listing, help="only print releases, one a line; sample: oldest, middle, newest"
    )
    options = parser.parse_args(arguments)
    if options.list:
        print(*listing[options.list](), sep="\n")
        return 0
    plan = planned(options.release, options.packages)
    try:
        path = ensure_uv(plan) if options.uv else ensure(plan)
    except EnvironmentSetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
