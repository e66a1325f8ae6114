"""What a lock that is put on another has; the resolving is uv's own."""

from __future__ import annotations

from workbench.releases import environment, lock

PARENT = """\
alpha==1.0 \\
    --hash=sha256:aa
    # via sglang
beta==2.0 \\
    --hash=sha256:bb
gamma==3.0 \\
    --hash=sha256:cc
"""


def test_only_what_the_parent_has_otherwise_is_written() -> None:
    own = PARENT.replace("# via sglang", "# via beta").replace("==2.0", "==2.1")
    assert lock.difference(own, "1.2.3", PARENT) == "# on 1.2.3.txt\nbeta==2.1 \\\n    --hash=sha256:bb\n"


def test_what_only_the_parent_has_is_named() -> None:
    text = lock.difference(environment.without(PARENT, frozenset({"alpha", "gamma"})), "1.2.3", PARENT)
    assert text == "# on 1.2.3.txt without alpha gamma\n"


def test_other_hashes_are_a_difference() -> None:
    assert "beta" in lock.difference(PARENT.replace("sha256:bb", "sha256:b2"), "1.2.3", PARENT)
