"""One self-contained HTML page of a report: no script, no other file, nothing from a network."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from mpformer.ablation.tables import cells_of
from mpformer.types import printable

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { border-bottom: 2px solid #888 }
img { max-width: 100% } figure { margin: 1rem 0 } figcaption { color: #666; font-size: .85rem }
"""


def html_page(title: str, markdown: str, pictures: Sequence[Path]) -> str:
    """The report's Markdown (headings, tables, lists, paragraphs) and PNG pictures as one HTML document."""
    figures = "\n".join(_figure(path) for path in pictures)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(printable(title))}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{_body(markdown)}\n"
        + (f"<h2>Training-speed curves</h2>\n{figures}\n" if figures else "")
        + "</body>\n</html>\n"
    )


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(path.name)}</figcaption></figure>"
    )


def _body(markdown: str) -> str:
    parts: list[str] = []
    for block in markdown.strip().split("\n\n"):
        lines = block.splitlines()
        if lines[0].startswith("#"):
            level = len(lines[0]) - len(lines[0].lstrip("#"))
            parts.append(f"<h{level}>{html.escape(lines[0].lstrip('# '))}</h{level}>")
        elif lines[0].startswith("|"):
            parts.append(_table(lines))
        elif lines[0].startswith("- "):
            items = "".join(f"<li>{html.escape(line.removeprefix('- '))}</li>" for line in lines)
            parts.append(f"<ul>{items}</ul>")
        else:
            parts += [f"<p>{html.escape(line)}</p>" for line in lines]
    return "\n".join(parts)


def _table(lines: Sequence[str]) -> str:
    rows = [cells_of(line) for line in lines]
    head, body = rows[0], rows[2:]

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    filled = "\n".join(row(cells, "td") for cells in body)
    body_rows = f"<tbody>\n{filled}\n</tbody>"
    return f'<div class="wide"><table>\n<thead>{row(head, "th")}</thead>\n{body_rows}</table></div>'
