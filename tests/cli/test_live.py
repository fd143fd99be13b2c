"""The table of runs in a terminal, and the lines elsewhere."""

import io
import json

import pytest
from rich.console import Console

from mpformer.cli.live import shown
from mpformer.tracking.progress import Follower
from mpformer.tracking.record import RecordWriter


def runs(tmp_path, count):
    followers = []
    for number in range(count):
        run_dir = tmp_path / f"run{number}"
        run_dir.mkdir()
        (run_dir / "progress.json").write_text(json.dumps({"total_steps": 100}))
        followers.append(Follower(f"row{number} s0", run_dir, batch_size=8))
    return followers


def finish(follower):
    (follower.run_dir / "summary.json").write_text("{}")


def last_frame(text):
    """The table as it stands when all is over: what follows the last title."""
    return text[text.rindex("runs finished") :].splitlines()


def work(followers):
    """One run is done, one at step 20, one has failed; the others wait."""
    RecordWriter(followers[0].run_dir, 0).add(100, {"train/loss": 1.0, "val/PQ": 31.24})
    finish(followers[0])
    RecordWriter(followers[1].run_dir, 0).add(20, {"train/loss": 43.2119, "speed/images_per_second": 4.0})
    followers[2].failed = True


def test_a_terminal_shows_a_table_and_tells_starts_above_it(tmp_path):
    followers, told = runs(tmp_path, 4), []
    screen = io.StringIO()
    with shown(followers, told.append, Console(file=screen, force_terminal=True, width=100, height=30)):
        work(followers)
    assert told == ["row0 s0  starts", "row1 s0  starts"]
    frame = last_frame(screen.getvalue())
    assert "1 failed" in frame[0]
    rows = {
        line.split()[0]: line.split()[2:] for line in frame if line.strip().startswith("\x1b") or "s0" in line
    }
    assert rows["row0"] == ["finished", "100/100", "1.000", "31.2"]
    assert rows["row1"] == ["2:40", "min", "left", "20/100", "43.212", "4.0"]


def test_a_small_terminal_shows_the_runs_at_work(tmp_path):
    followers = runs(tmp_path, 40)
    RecordWriter(followers[30].run_dir, 0).add(20, {"train/loss": 1.0})
    screen = io.StringIO()
    with shown(followers, lambda line: None, Console(file=screen, force_terminal=True, width=100, height=12)):
        pass
    frame = last_frame(screen.getvalue())
    assert "34 not shown" in frame[0]
    assert any("row30 s0" in line for line in frame)
    assert not any("row35 s0" in line for line in frame)
    assert len(frame) <= 12  # with the line of the cursor


@pytest.mark.parametrize("console", [{}, {"force_terminal": True, "_environ": {"TERM": "dumb"}}])
def test_a_file_gets_lines_and_no_control_characters(tmp_path, console):
    followers, told = runs(tmp_path, 4), []
    screen = io.StringIO()
    with shown(followers, told.append, Console(file=screen, **console)):
        work(followers)
    assert screen.getvalue() == ""
    assert "row1 s0  step 20/100  loss 43.212  4.0 images/s  2:40 min left" in told
    assert told[-1].startswith("1 of 4 runs finished, 1 failed")
