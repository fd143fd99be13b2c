"""Markdown tables that read well in a terminal, too, and the figures in their cells."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mpformer.types import printable

MISSING = "–"
"""Not measured."""


def markdown_table(lines: Sequence[Sequence[str]]) -> list[str]:
    """A header and lines of equal length as aligned lines of Markdown: the first column to the left.

    A "|" in a cell is written as "\\|", a line feed as "\\n".
    """
    lines = [[printable(text).replace("|", "\\|") for text in line] for line in lines]
    first, *others = ([len(text) for text in column] for column in zip(*lines))
    widths = [max(first), *map(max, others)]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    header, *body = (_padded(line, widths) for line in lines)
    return [header, f"|{rule}|", *body]


def cells_of(line: str) -> list[str]:
    """The cells of a line of `markdown_table`, as they were given."""
    inside = line.strip().removeprefix("|").removesuffix("|")
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", inside)]


def _padded(line: Sequence[str], widths: Sequence[int]) -> str:
    right = (text.rjust(width) for text, width in zip(line[1:], widths[1:]))
    return f"| {' | '.join([line[0].ljust(widths[0]), *right])} |"


def figure_text(value: float | None, digits: int) -> str:
    """A figure with so many decimals, without the minus sign of a zero; a dash for none."""
    return MISSING if value is None else f"{round(value, digits) + 0.0:.{digits}f}"
