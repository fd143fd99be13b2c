"""A bucket that refuses for a while, without a run: nothing is lost, and nothing is torn.

With a run: `tests/e2e/test_faults_stores.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mpformer.model.weights.checkpoints import complete
from mpformer.train.mirror import Mirror
from tests.servers import S3Server
from tests.train.test_mirror import content, write

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server()
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    yield server
    server.close()


def test_closed_for_a_while_it_gets_everything_at_the_end(
    bucket: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    copy = Mirror(bucket.uri, run_dir)
    write(run_dir, 1)
    assert copy.push()
    with bucket.closed_until_waited_for():
        write(run_dir, 2)
        assert not copy.push()
        assert "The next checkpoint tries again" in caplog.text
        (run_dir / "summary.json").write_text("{}")
        copy.finish()
    assert "Trying again in 1 s" in caplog.text
    assert bucket.content("run") == content(run_dir)


def test_overloaded_it_catches_up_with_the_next_checkpoint(bucket: S3Server, tmp_path: Path) -> None:
    here, there = tmp_path / "here" / "run", tmp_path / "there" / "run"
    copy = Mirror(bucket.uri, here)
    write(here, 1)
    assert copy.push()
    bucket.overloaded = True
    write(here, 2)
    assert not copy.push()
    assert bucket.refused
    bucket.overloaded = False
    Mirror(bucket.uri, there).pull()
    assert [path.name for path in complete(there)] == ["step-00000001"]  # whole, if old

    write(here, 3)
    assert copy.push()
    assert bucket.content("run") == content(here)
    Mirror(bucket.uri, there).pull()
    assert complete(there)[-1].name == "step-00000003"
    assert all(content(here)[name] == data for name, data in content(there).items() if "00000001" not in name)
