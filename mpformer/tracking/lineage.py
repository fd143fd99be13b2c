"""Runs that go on from a checkpoint of another run (`train.resume_from`): `RUN/parent.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpformer import atomic
from mpformer.tracking.run_dir import RunDir
from mpformer.types import RunError


@dataclass(frozen=True)
class Parent:
    """Where a run comes from."""

    run: str
    """The other run's name: that of its folder."""
    step: int
    """The step of it from which this one goes on."""

    def tags(self) -> dict[str, str]:
        """The run's tags in trackers."""
        return {"resumed_from": self.run, "resumed_at_step": str(self.step)}

    def summary(self) -> dict[str, Any]:
        """What the run's summary says of it."""
        return {"resumed_from": asdict(self)}

    def write(self, run_dir: Path) -> None:
        """Raises `OSError`."""
        atomic.write_text(RunDir(run_dir).parent, json.dumps(asdict(self)))


def read_parent(run_dir: Path) -> Parent | None:
    """The parent of a run; None for a run that began by itself. `RunError` for a damaged note."""
    path = RunDir(Path(run_dir)).parent
    try:
        return Parent(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}: damaged: {error}") from None
