"""The HTML page of a report: one file, whole, and readable by a browser where there is one."""

import base64
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from mpformer.ablation.page import html_page

MARKDOWN = """\
# Noise & layers

|             | n |   AP |
|-------------|--:|-----:|
| <Mask2Form> | 3 | 41.0 |
| All layers  | 3 |    – |

Mean over seeds.
– not measured.

## Order of the rows

- AP: as in the paper.
- PQ: not.
"""
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Tags must close in order; collects the text of cells, headings and items, and every address."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.text.setdefault(self.open[-1], []).append(data.strip())


@pytest.fixture
def page(tmp_path) -> Path:
    picture = tmp_path / "curve-AP.png"
    cv2.imwrite(str(picture), np.full((40, 60, 3), 200, np.uint8))
    path = tmp_path / "report.html"
    path.write_text(html_page("Noise & layers", MARKDOWN, [picture]), encoding="utf-8")
    return path


def test_the_page_is_well_formed_complete_and_needs_no_other_file(page):
    reader = Reader()
    reader.feed(page.read_text())
    reader.close()
    assert reader.open == []
    assert reader.text["h1"] == ["Noise & layers"]
    assert reader.text["h2"] == ["Order of the rows", "Training-speed curves"]
    assert reader.text["td"] == ["<Mask2Form>", "3", "41.0", "All layers", "3", "–"]
    assert reader.text["li"] == ["AP: as in the paper.", "PQ: not."]
    assert reader.text["p"] == ["Mean over seeds.", "– not measured."]
    [address] = reader.addresses
    picture = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    assert picture == (page.parent / "curve-AP.png").read_bytes()
    assert "<script" not in page.read_text()


def test_a_browser_lays_the_page_out(page, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [browser, *flags, "--window-size=900,700"]
    dom = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert dom.count("<tr>") == 3
    shot = tmp_path / "page.png"
    subprocess.run(
        [*command, f"--screenshot={shot}", page.as_uri()], timeout=60, check=True, capture_output=True
    )
    pixels = cv2.imread(str(shot))
    assert pixels.shape[:2] == (700, 900)
    assert (pixels < 128).any(axis=2).mean() > 0.002  # text
    assert (abs(pixels.astype(int) - 200) < 3).all(axis=2).sum() >= 40 * 60  # the picture
