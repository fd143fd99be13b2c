"""The runs of a study as a live table in a terminal, as lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mpformer.tracking.progress import QUALITY, Follower, Tally, follow
from mpformer.types import printable

LINES_AROUND = 6
"""Lines of a terminal that hold no run: the title, the table's header and frame, and the cursor."""


@contextmanager
def shown(
    followers: Sequence[Follower], tell: Callable[[str], None], console: Console | None = None
) -> Iterator[None]:
    """While the body runs, show the runs' state on `console`, by default the standard output.

    A terminal gets a table that is redrawn every second, with starts and warnings above it; a file or
    a pipe gets lines only.
    """
    console = console or Console()
    tally = Tally(followers)
    if not console.is_terminal or console.is_dumb_terminal:
        with follow(followers, tell, tally):
            yield
        return
    live = Live(
        get_renderable=lambda: _table(followers, tally, console.height), console=console, refresh_per_second=1
    )
    with live, follow(followers, tell, points=False):
        yield


def _table(followers: Sequence[Follower], tally: Tally, height: int) -> Group:
    """As many runs as the terminal has lines for, running ones first."""
    states = {follower: _state(follower) for follower in followers}
    at_work_first = sorted(followers, key=lambda follower: states[follower] != "running")
    chosen = set(at_work_first[: max(1, height - LINES_AROUND)])
    quality = [key for key in QUALITY if any(key in follower.values for follower in followers)]
    hidden = len(followers) - len(chosen)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("run", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("step", "loss", "images/s", *(key.removeprefix("val/") for key in quality)):
        table.add_column(name, justify="right", no_wrap=True)
    for follower in followers:
        if follower not in chosen:
            continue
        state, values = states[follower], follower.values
        total = f"/{follower.total_steps}" if follower.total_steps else ""
        table.add_row(
            Text(printable(follower.label)),  # not markup
            (follower.time_left or state) if state == "running" else state,
            f"{follower.step}{total}" if follower.begun else "",
            _number(values.get("train/loss"), 3),
            _number(values.get("speed/images_per_second"), 1),
            *(_number(values.get(key), 1) for key in quality),
            style={"failed": "red", "waiting": "dim"}.get(state),
        )
    return Group(Text(tally.text() + (f" ({hidden} not shown)" if hidden else "")), table)


def _state(follower: Follower) -> str:
    if follower.finished:
        return "finished"
    if follower.failed:
        return "failed"
    return "running" if follower.begun else "waiting"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
