"""A home folder and a user name for accounts that have none, as in containers started with any user id.

Ray, MLflow, matplotlib and torch keep caches and tokens below the home folder and ask for the user's name;
where there is none they fail, or write into a folder "~" in the working folder.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

from mpformer.types import RunError

_MATPLOTLIB = "MPLCONFIGDIR"


def ensure_home() -> str | None:
    """Set HOME and LOGNAME for this process and its children where they are missing.

    The home is then a folder for temporary files that nobody else can enter. Returns a line that says so;
    None if the user has a home that can be written. A home that exists, but cannot be written, is kept,
    since it may hold caches to read: matplotlib's alone goes elsewhere.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # no such user, and no variable that names one
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    home = home_folder()
    if home is None:
        os.environ["HOME"] = str(_private_folder())
        return f"no home folder: {os.environ['HOME']} is used; set HOME for another"
    if not os.access(home, os.W_OK):
        os.environ.setdefault(_MATPLOTLIB, str(_private_folder() / "matplotlib"))
        return f"the home folder {home} cannot be written: set HOME for another"
    return None


def home_folder() -> Path | None:
    """The user's home; None where there is none, or none that exists."""
    try:
        home = Path.home()
    except RuntimeError:  # HOME is not set, and the user has no entry in the password file
        return None
    return home if home.is_dir() else None


def _private_folder() -> Path:
    """A folder for temporary files that belongs to this user alone, the same one at each call if possible."""
    path = Path(tempfile.gettempdir()) / f"mpformer-home-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
        own = found.st_uid == os.getuid() and not found.st_mode & 0o077 and path.is_dir()
    except OSError:
        own = False
    # libraries built here are loaded again, so it must not be a folder that somebody else prepared
    return path if own and not path.is_symlink() else Path(tempfile.mkdtemp(prefix="mpformer-home-"))


def cache_folder() -> Path:
    """Where downloads, and what is made of them, are kept: $MPFORMER_CACHE, else in the cache of the user.

    Compiled kernels lie there, too (mpformer/ops/build.py, which imports nothing of the package). Raises
    `RunError` for a user without a home folder; the command line makes one.
    """
    if own := os.environ.get("MPFORMER_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):
        raise RunError("no home folder for the cache: set HOME or MPFORMER_CACHE")
    return Path(base) / "mpformer"
