"""Cells of Markdown tables, whatever is in them."""

import pytest

from mpformer.ablation.page import html_page
from mpformer.ablation.tables import cells_of, markdown_table


@pytest.mark.parametrize("text", ["a | b", "||", "|", "汽车 | <b>", "a", ""])
def test_a_cell_comes_back_from_its_line(text):
    lines = markdown_table([["name", "n"], [text, "1"]])
    assert [cells_of(line) for line in (lines[0], lines[2])] == [["name", "n"], [text, "1"]]
    assert len({len(line) for line in lines}) == 1
    page = html_page("t", "\n".join(lines), [])
    assert page.count("<td>") == 2


def test_a_cell_stays_on_its_line():
    assert cells_of(markdown_table([["name"], ["a\nb"]])[2]) == [r"a\nb"]
