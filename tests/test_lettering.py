"""Text in every script: drawn, or known beforehand not to be; never a warning (an error here)."""

import logging

import numpy as np
import pytest

from mpformer import draw, lettering
from mpformer.types import ClassInfo, ClassTable, InputError, encodable, printable

CHINESE, HINDI = "汽车", "सेब"


@pytest.fixture
def shipped_font_alone(monkeypatch):
    """A machine without fonts of its own, and an OpenCV without any."""
    monkeypatch.setattr(lettering, "_system_fonts", lambda: ())
    monkeypatch.setattr(lettering, "_opencv_font", lambda: None)
    lettering._font_of.cache_clear()
    yield
    lettering._font_of.cache_clear()


def picture_of(name: str, label: int = 0) -> np.ndarray:
    classes = ClassTable((*(ClassInfo(f"other {i}", i) for i in range(label)), ClassInfo(name, 99)))
    return draw.overlay(np.zeros((480, 480, 3), np.uint8), [np.ones((480, 480), bool)], [label], classes)


@pytest.mark.parametrize("text", ["naïve", "Кошка", "ψ", "تفاحة", "תפוח", "խնձոր", "a b"])
def test_scripts_that_the_shipped_font_has(text, shipped_font_alone):
    assert lettering.can_draw(text)
    assert lettering.drawable(text) == text
    assert lettering.rasterised(text, 20).any()


@pytest.mark.parametrize("text", [CHINESE, "りんご", "사과"])
def test_scripts_of_the_font_inside_opencv(text, monkeypatch):
    if lettering._opencv_font() is None:
        pytest.skip("this OpenCV has no Unicode font")
    monkeypatch.setattr(lettering, "_system_fonts", lambda: ())
    assert lettering.can_draw(text)
    one, other = lettering.rasterised(text[0], 24), lettering.rasterised(text[1], 24)
    assert one.any()
    assert not np.array_equal(one, lettering.rasterised("?", 24))
    assert one.shape != other.shape or not np.array_equal(one, other)
    mixed = lettering.rasterised(f"a{text}b", 24)
    assert mixed.shape[1] > one.shape[1] + other.shape[1]


def test_a_name_that_no_font_has_is_its_number(shipped_font_alone):
    for name in (CHINESE, HINDI, "😀x汽", "", " "):
        assert not (name.strip() and lettering.can_draw(name))
        assert np.array_equal(picture_of(name, 3), picture_of("class 3", 3))
    assert not np.array_equal(picture_of("class 3", 3), picture_of("class 2", 3))
    assert lettering.drawable("a汽") == r"a\u6c7d"
    draw.side_by_side([np.zeros((100, 400, 3), np.uint8)], [CHINESE])


def test_names_stay_on_one_line():
    assert printable("a\nb\tc\r\x1b[31m\u202e\u2028") == r"a\nb\tc\r\x1b[31m\u202e\u2028"
    assert encodable("caf\udce9 \ud800 ü\n") == "caf\\xe9 \\ud800 ü\n"
    assert ClassInfo("a\nb", 1).name == r"a\nb"
    assert str(InputError("caf\udce9.png: no such file")) == r"caf\xe9.png: no such file"
    assert np.array_equal(picture_of("a\nb"), picture_of(r"a\nb"))


def test_labels_of_plots(tmp_path, shipped_font_alone):
    names = [CHINESE, "$5 and $6 {", "_hidden", "a\nb", "x" * 500, "<b>", "bad\udcff"]
    series = {name: [(0.0, 0.0), (1.0, float(i))] for i, name in enumerate(names)}
    path = draw.curves(series, "$x", "y_{", f"{HINDI} $", tmp_path / "a.png")
    assert draw.decode_png(path.read_bytes()).any()
    assert lettering.plot_text(CHINESE) == r"\u6c7d\u8f66"
    assert len(lettering.plot_text("x" * 500)) < 100


@pytest.mark.parametrize("shape", [(8, 4000), (4000, 8), (1, 70_000), (65_536, 1), (1, 1), (2, 9000)])
def test_pictures_of_any_shape_are_limited(shape):
    image, mask = np.zeros((*shape, 3), np.uint8), np.ones(shape, bool)
    drawn = draw.overlay(image, [mask], [0], ClassTable.numbered(1))
    assert max(drawn.shape) <= 8192
    sheet = draw.side_by_side([drawn, np.zeros((480, 640, 3), np.uint8)] * 8, ["a"] * 16, columns=4)
    assert sheet.shape[0] * sheet.shape[1] < 40e6
    assert draw.encode_jpeg(sheet)


def test_a_jpeg_with_a_side_that_the_format_lacks_is_reduced():
    data = draw.encode_jpeg(np.zeros((2, 70_000, 3), np.uint8))
    assert draw.decode_png(data).shape[:2] == (2, 65_500)


def test_a_picture_that_fails_is_left_out_with_one_line(caplog):
    def broken() -> None:
        raise ValueError("no\nway")

    with caplog.at_level(logging.WARNING):
        assert draw.attempted(broken, "picture of a\udcff") is None
        assert (
            draw.attempted(lambda: draw.encode_png(np.zeros((2, 2, 7), np.uint8)), "seven channels") is None
        )
    assert caplog.messages[0] == r"picture of a\xff: left out: no way"
    assert caplog.messages[1].startswith("seven channels: left out: ")
    assert draw.attempted(lambda: 5, "five") == 5
