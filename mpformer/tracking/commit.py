"""Which commit of the source tree runs. Imports nothing of the package: setup.py loads this file alone.

A checkout is asked through git. A copy without `.git`, as on a fleet, in an image or in a wheel, has the file
`COMMIT` in the package's folder; `python -m mpformer.tracking.commit` writes it before a checkout is copied,
and setup.py into what it builds.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

_DIRTY = "-dirty"


def git_commit() -> str | None:
    """The commit of the source tree that runs, '-dirty' added for changed files; None where not known."""
    return commit_of(Path(__file__).resolve().parents[1])


def commit_of(package: Path) -> str | None:
    """As `git_commit`, of the package in this folder. A repository that merely surrounds it is not asked."""
    try:
        # an environment may lie within another project's repository, which does not track this file
        _git(package, "ls-files", "--error-unmatch", "tracking/commit.py")
        commit = _git(package, "rev-parse", "HEAD")
        return commit + (_DIRTY if _git(package, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return _stamped(package)


def stamp(package: Path, commit: str) -> None:
    """Write the file `COMMIT`: the commit, and a digest of the sources that it stands for."""
    (package / "COMMIT").write_text(f"{commit} {_digest(package)}\n")


def _stamped(package: Path) -> str | None:
    try:
        commit, digest = (package / "COMMIT").read_text().split()
    except (OSError, ValueError):
        return None
    same = digest == _digest(package) or commit.endswith(_DIRTY)
    return commit if same else commit + _DIRTY


def _digest(package: Path) -> str:
    """Of the names and contents of the Python and C++ sources."""
    sources = [*package.rglob("*.py"), *(package / "ops" / "csrc").glob("*")]
    total = hashlib.sha256()
    for path in sorted(path for path in sources if path.is_file()):
        total.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _main() -> int:
    package = Path(__file__).resolve().parents[1]
    commit = commit_of(package)
    if commit is None:
        print(
            f"{package}: neither a git checkout nor a stamped copy: its commit is not known", file=sys.stderr
        )
        return 1
    stamp(package, commit)
    print(commit)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
