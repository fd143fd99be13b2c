"""Users without a home folder or a name."""

import getpass
import os
import stat
from pathlib import Path

import pytest

from mpformer import home
from mpformer.cli.main import main
from mpformer.ops.build import BuildError, cache_directory


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """No HOME, no entry in the password file, no variable with a name."""

    def missing(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", missing)
    monkeypatch.setattr(home.tempfile, "tempdir", str(tmp_path))
    for name in (
        "HOME",
        "LOGNAME",
        "USER",
        "LNAME",
        "USERNAME",
        "XDG_CACHE_HOME",
        "MPFORMER_CACHE",
        "MPLCONFIGDIR",
    ):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in ("HOME", "LOGNAME"):
        os.environ.pop(name, None)  # what `ensure_home` has set; monkeypatch then restores what was there


def test_a_user_without_a_home_gets_a_private_one(nobody, tmp_path):
    assert home.home_folder() is None
    line = home.ensure_home()
    folder = tmp_path / f"mpformer-home-{os.getuid()}"
    assert str(folder) in line
    assert Path.home() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert getpass.getuser() == f"uid{os.getuid()}"
    assert cache_directory() == folder / ".cache" / "mpformer"
    assert home.ensure_home() is None  # it is there now


def test_a_folder_that_others_can_write_is_not_taken(nobody, tmp_path):
    prepared = tmp_path / f"mpformer-home-{os.getuid()}"
    prepared.mkdir()
    prepared.chmod(0o777)
    home.ensure_home()
    assert Path.home() != prepared
    assert stat.S_IMODE(Path.home().stat().st_mode) == 0o700


def test_no_cache_without_a_home(nobody):
    with pytest.raises(BuildError, match="no home folder for the cache: set HOME or MPFORMER_CACHE"):
        cache_directory()


def test_commands_say_so_in_one_line(nobody, tmp_path, capfd):
    assert main(["data", "synth", str(tmp_path / "out"), "train=1", "val=1", "size=32"]) == 0
    assert capfd.readouterr().err == (
        f"mpformer: no home folder: {tmp_path}/mpformer-home-{os.getuid()} is used; set HOME for another\n"
    )


def test_a_home_that_does_not_exist(nobody, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    assert home.home_folder() is None
    assert "no home folder" in home.ensure_home()
