"""Names that annotations give to files, against files that a test has made."""

import os
import unicodedata

import pytest

from mpformer.data.names import Files, is_litter, walk, without_litter
from mpformer.types import InputError


def made(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("a.png", "a.png"),
        ("deep/b.png", "deep/b.png"),
        (r"deep\b.png", "deep/b.png"),
        ("./deep//b.png", "deep/b.png"),
        ("deep/B.PNG", "deep/b.png"),
        ("my%20photo.png", "my photo.png"),
        (unicodedata.normalize("NFD", "é.png"), "é.png"),
        ("images/a.png", "a.png"),
        (r"images\deep\b.png", "deep/b.png"),
        ("/data/upload/1/a.png", "a.png"),
        (r"C:\Users\me\deep\b.png", "deep/b.png"),
        ("../images/a.png", "a.png"),
    ],
)
def test_a_name_stands_for_the_one_file_that_answers(tmp_path, name, file):
    made(tmp_path / "set/images", "a.png", "deep/b.png", "my photo.png", "é.png", "._a.png")
    assert Files(tmp_path / "set", "images").find(name, "x") == (
        f"images/{file}",
        name not in (file, "./deep//b.png"),
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train/a.png", "x: 'train/a.png': no such file in .*; nearest: val/a.png"),  # another split's
        ("a.jpg", "no such file in .*; nearest: val/a.png"),
        ("C.png ", "'C.png ' may be any of 2 files in .*: c.png , c.png%20"),
        ("b.png", "no such file in .*; nearest: deep/b.png"),  # the folder may be another split's
        ("D.png", "'D.png' may be any of 2 files in .*: d.PNG, d.png"),
        ("../secret.png", "the file name leaves the data folder"),
        ("/etc/passwd", "the file name leaves the data folder"),
        ("", "'file_name' is ''"),
        ("/", "'file_name' is '/'"),
        ("a\0b", "'file_name' is "),
        (None, "'file_name' is None"),
        (7, "'file_name' is 7"),
    ],
)
def test_a_name_that_no_file_or_more_than_one_answers_is_an_error(tmp_path, name, message):
    made(tmp_path / "set", "val/a.png", "c.png%20", "c.png ", "d.PNG", "d.png", "deep/b.png")
    made(tmp_path, "secret.png")
    with pytest.raises(InputError, match=message) as error:
        Files(tmp_path / "set", ".").find(name, "x")
    assert "\n" not in str(error.value)


def test_only_the_same_path_where_others_would_be_wrong(tmp_path):
    made(tmp_path, "maps/a.PNG")
    files = Files(tmp_path, "maps")
    assert files.find("a.png", "x", elsewhere=False) == ("maps/a.PNG", True)
    with pytest.raises(InputError, match=r"'maps/a\.png': no such file"):
        files.find("maps/a.png", "x", elsewhere=False)


def test_a_missing_or_empty_folder_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"there is no folder .*/gone"):
        Files(tmp_path, "gone").find("a.png", "x")
    with pytest.raises(InputError, match=r"the folder .*/empty is empty"):
        Files(tmp_path, "empty").find("a.png", "x")


def test_litter_is_passed_over_but_what_is_named_exactly_is_used(tmp_path):
    made(tmp_path, "a.png", "._a.png", "__MACOSX/a.png", "Thumbs.db", ".DS_Store", ".hidden.png")
    assert sorted(walk(tmp_path)) == [".hidden.png", "a.png"]
    kept, left_out = without_litter(tmp_path.rglob("*.png"), tmp_path)
    assert ({p.name for p in kept}, left_out) == ({"a.png", ".hidden.png"}, 2)
    assert Files(tmp_path, "").find("._a.png", "x") == ("._a.png", False)
    assert not is_litter("picture._a.png")


def test_links_in_a_circle_are_walked_once(tmp_path):
    made(tmp_path, "a/b.png")
    os.symlink(tmp_path, tmp_path / "a" / "up")
    assert list(walk(tmp_path)) == ["a/b.png"]
    assert Files(tmp_path, "").find("/there/a/b.png", "x") == ("a/b.png", True)
