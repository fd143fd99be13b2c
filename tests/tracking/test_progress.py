"""The lines that a run's record is turned into."""

import json
import logging
from types import SimpleNamespace

from mpformer.tracking.progress import Follower, Tally, follow, kept_warnings
from mpformer.tracking.record import RecordWriter


def follower(tmp_path) -> Follower:
    (tmp_path / "progress.json").write_text(json.dumps({"total_steps": 100}))
    return Follower("tiny s0", tmp_path, batch_size=8)


def test_a_training_point_tells_loss_speed_wait_and_time_left(tmp_path):
    following = follower(tmp_path)
    part = RecordWriter(tmp_path, 0)
    part.add(20, {"train/loss": 43.2119, "speed/images_per_second": 4.0, "time/data_wait": 0.1})
    start, line = following.lines()
    assert start == "tiny s0  starts"
    # 0.1 s of the 2 s of a step (8 images at 4 a second); 80 steps x 8 images / 4 = 160 s
    assert line == "tiny s0  step 20/100  loss 43.212  4.0 images/s  data wait 5 %  2:40 min left"


def test_waiting_for_data_is_warned_of_above_a_tenth_of_the_step(tmp_path):
    following = follower(tmp_path)
    part = RecordWriter(tmp_path, 0)
    for step, wait in ((10, 1.0), (20, 0.2), (40, 0.22), (100, 0.22)):
        part.add(step, {"train/loss": 1.0, "speed/images_per_second": 4.0, "time/data_wait": wait})
    _, first, short, long, last = following.lines()
    assert "data wait 50 %  " in first  # the first batch is always waited for
    assert "data wait 10 %  " in short
    assert "data wait 11 % (too long: see mpformer data bench)  " in long
    assert last.endswith("data bench)")  # nothing is left


def test_an_evaluation_tells_its_figures(tmp_path):
    following = follower(tmp_path)
    RecordWriter(tmp_path, 0).add(
        50, {"val/AP": 12.34, "val/PQ": 20.0, "val/AP50": 30.0, "speed/images_seen": 400}
    )
    assert following.lines()[1] == "tiny s0  step 50/100  val/AP 12.3  val/PQ 20.0"


def test_each_point_is_told_once_and_a_restart_is_announced(tmp_path):
    old = RecordWriter(tmp_path, 0)
    old.add(1, {"train/loss": 1.0})
    following = follower(tmp_path)
    assert following.lines() == []
    first = RecordWriter(tmp_path, 1)
    first.add(2, {"train/loss": 2.0})
    assert [line.split("  ")[1] for line in following.lines()] == ["goes on from step 1", "step 2/100"]
    first.add(3, {"train/loss": 2.0})
    second = RecordWriter(tmp_path, 2)
    second.add(3, {"train/loss": 2.5})
    assert [line.split("  ")[1] for line in following.lines()] == [
        "step 3/100",
        "goes on from step 2",
        "step 3/100",
    ]
    assert following.lines() == []


def test_a_start_from_other_weights_says_what_was_taken(tmp_path):
    following = follower(tmp_path)
    (tmp_path / "init.txt").write_text("/w/model.safetensors\n9 tensors loaded\n2 re-initialised: a, b\n")
    RecordWriter(tmp_path, 0)
    assert following.lines() == [
        "tiny s0  starts from /w/model.safetensors; 9 tensors loaded; 2 re-initialised: a, b"
    ]


def test_what_a_worker_warns_of_is_told_once(tmp_path):
    log = logging.getLogger("mpformer.train.mirror")
    with kept_warnings(tmp_path):
        log.warning("s3://results: refused an hour ago")
    following = follower(tmp_path)
    with kept_warnings(tmp_path):
        log.warning("s3://results: %s. Trying again in 2 s", "closed")
        log.info("nobody need know")
    log.warning("of another process")
    assert following.lines() == ["tiny s0  s3://results: closed. Trying again in 2 s"]
    assert following.lines() == []


def test_the_runs_of_a_study_are_counted(tmp_path, monkeypatch):
    clock = iter([100.0, 130.0])  # when it began, and at the one line that speaks of time
    monkeypatch.setattr("mpformer.tracking.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    run_dirs = [tmp_path / str(number) for number in range(4)]
    for run_dir in run_dirs:
        run_dir.mkdir()
    (run_dirs[3] / "summary.json").write_text("{}")  # an earlier call finished it
    followers = [follower(run_dir) for run_dir in run_dirs]
    tally = Tally(followers)
    assert tally.lines() == []
    RecordWriter(run_dirs[1], 0).add(50, {"train/loss": 1.0})  # half of the 100 steps
    followers[1].lines()
    assert tally.lines() == []
    (run_dirs[0] / "summary.json").write_text("{}")
    # one and a half runs took 30 s, one and a half are left
    assert tally.lines() == ["2 of 4 runs finished, about 0:30 min left"]
    assert tally.lines() == []
    (run_dirs[1] / "summary.json").write_text("{}")
    (run_dirs[2] / "summary.json").write_text("{}")
    assert tally.lines() == ["4 of 4 runs finished"]


def test_a_line_being_written_waits_for_its_end(tmp_path):
    following = follower(tmp_path)
    part = RecordWriter(tmp_path, 0)
    following.lines()
    with part.path.open("a") as file:
        file.write('{"step": 7, "time": 0, "train')
        file.flush()
        assert following.lines() == []
        file.write('/loss": 1.5}\n')
    assert following.lines() == ["tiny s0  step 7/100  loss 1.500"]


def test_following_ends_with_everything_told(tmp_path):
    told = []
    with follow([follower(tmp_path)], told.append):
        RecordWriter(tmp_path, 0).add(5, {"train/loss": 1.0})
    assert told == ["tiny s0  starts", "tiny s0  step 5/100  loss 1.000"]


def test_hours_are_told_as_hours(tmp_path):
    following = follower(tmp_path)
    RecordWriter(tmp_path, 0).add(0, {"speed/images_per_second": 0.1})
    assert following.lines()[1].endswith("2 h 13 min left")


def test_a_failed_run_is_counted_and_not_waited_for(tmp_path):
    followers = [follower(tmp_path / name) for name in "abc" if not (tmp_path / name).mkdir()]
    followers[1].failed = True
    (followers[0].run_dir / "summary.json").write_text("{}")
    tally = Tally(followers)
    assert tally.text() == "1 of 3 runs finished, 1 failed"


def test_what_a_resumed_run_had_done_before_is_not_counted_as_done_now(tmp_path, monkeypatch):
    clock = iter([100.0, 130.0])
    monkeypatch.setattr("mpformer.tracking.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    following = follower(tmp_path)
    tally = Tally([following])
    RecordWriter(tmp_path, 40).add(60, {"train/loss": 1.0})
    following.lines()
    # 20 of its 100 steps took 30 s, 40 are left
    assert tally.text() == "0 of 1 runs finished, about 1:00 min left"


def test_without_points_only_starts_and_warnings_are_told(tmp_path):
    following = follower(tmp_path)
    RecordWriter(tmp_path, 0).add(20, {"train/loss": 1.0, "val/PQ": 3.0})
    assert following.lines(points=False) == ["tiny s0  starts"]
    assert (following.step, following.total_steps, following.values["val/PQ"]) == (20, 100, 3.0)


def test_an_evaluation_tells_the_average_s_figures_and_the_loss_too(tmp_path):
    following = follower(tmp_path)
    values = {"val/AP": 12.34, "val_ema/AP": 13.0, "val/loss": 31.2341, "val/loss_mask": 2.0}
    RecordWriter(tmp_path, 0).add(50, values)
    assert following.lines()[1] == "tiny s0  step 50/100  val/AP 12.3  val_ema/AP 13.0  val/loss 31.234"
