"""Which classes an evaluation takes for which: the matrix, as CSV and as a table in HTML."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable

import numpy as np

from mpformer.evaluate.prediction import Scores
from mpformer.types import ClassTable, printable

NONE = "none"
"""The row of what was found where there is nothing, and the column of what was not found."""
_MOST = 30
"""Classes of the table in HTML."""


def total(outcomes: Iterable[np.ndarray], classes: int) -> np.ndarray:
    """[K+1,K+1] int64, counts by (true, found) class, the last being none.

    outcomes: for each image [N,3] int64, (true class, found class, count).
    """
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    for one in outcomes:
        np.add.at(matrix, (one[:, 0], one[:, 1]), one[:, 2])
    return matrix


def matrix_csv(matrix: np.ndarray, classes: ClassTable) -> str:
    """One line for each true class, one column for each found one."""
    names = [*map(printable, classes.names), NONE]
    return _csv([["true \\ found", *names], *([name, *row] for name, row in zip(names, matrix.tolist()))])


def classes_csv(scores: Scores, matrix: np.ndarray, classes: ClassTable) -> str:
    """One line for each class: its metrics in percent, and how many there are, are found, and are right."""
    columns = list(dict.fromkeys(name for row in scores.per_class.values() for name in row))
    lines: list[list[object]] = [["class", *columns, "true", "found", "right"]]
    for label, name in enumerate(classes.names):
        row = scores.per_class.get(name, {})
        counts = matrix[label].sum(), matrix[:, label].sum(), matrix[label, label]
        lines.append([printable(name), *(row.get(column, "") for column in columns), *map(int, counts)])
    return _csv(lines)


def matrix_html(matrix: np.ndarray, classes: ClassTable, unit: str) -> str:
    """A table with the classes that occur, the most frequent ones, each cell shaded by its share of the row.

    unit: what is counted, "objects" or "pixels".
    """
    frequency = matrix.sum(0)[:-1] + matrix.sum(1)[:-1]
    order = [k for k in np.argsort(-frequency, kind="stable").tolist() if frequency[k]]
    if not order:
        return ""
    shown = [*sorted(order[:_MOST]), len(classes)]
    names = [html.escape(printable(name)) for name in (*classes.names, NONE)]
    head = "".join(f"<th>{names[k]}</th>" for k in shown)
    rows = "".join(
        f"<tr><th>{names[k]}</th>{_row(matrix[k], k, shown)}</tr>" for k in shown if matrix[k].any()
    )
    left = (
        f" The {_MOST} most frequent of {len(order)} classes; all: confusion.csv"
        if len(order) > _MOST
        else ""
    )
    return (
        f"<h2>Confusion</h2>\n<p>{unit} by true class (rows) and found class (columns).{left}</p>\n"
        f'<div class="scroll"><table class="confusion"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(counts: np.ndarray, own: int, shown: Iterable[int]) -> str:
    whole, none = max(int(counts.sum()), 1), len(counts) - 1
    cells = []
    for k in shown:
        share = counts[k] / whole
        color = "40,160,90" if k == own and k != none else "220,70,50"
        style = f' style="background:rgba({color},{0.75 * share:.2f})"' if counts[k] else ""
        cells.append(f"<td{style}>{int(counts[k]) or ''}</td>")
    return "".join(cells)


def _csv(lines: Iterable[Iterable[object]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()
