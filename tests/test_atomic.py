"""Files are replaced whole, or stay as they were."""

import os
import threading
from pathlib import Path

import pytest

from mpformer import atomic


def half_then_fail(path: Path) -> None:
    path.write_text("half")
    raise FileNotFoundError


def test_a_file_is_replaced_when_the_body_has_ended(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with atomic.replacing(path, durable=True) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failure_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic.replacing(path) as partial:
        half_then_fail(partial)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_tears_no_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    atomic._partial(path).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as told:
        atomic.write_text(path, "new")
    assert told.value.filename == str(path)
    assert path.read_text() == "old"


def test_two_threads_do_not_write_to_one_partial_file(tmp_path):
    path, names = tmp_path / "a.json", []
    with atomic.replacing(path) as partial:
        other = threading.Thread(target=lambda: names.append(atomic._partial(path)))
        other.start()
        other.join()
        assert names != [partial]
        partial.touch()
        assert atomic.leftovers(tmp_path) == [partial]
