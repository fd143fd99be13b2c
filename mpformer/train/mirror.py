"""A copy of a run's folder on another file system: object storage or a shared disk, any that pyarrow opens.

The run itself is written to its storage folder. After each checkpoint new files are copied, a checkpoint's
`state.json` last: a checkpoint without it is incomplete. A machine whose storage folder lacks the run fetches
it from the copy. A store that cannot be reached never stops training; what it lacks is copied with the next
checkpoint, at the latest at the end of the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Set
from pathlib import Path
from typing import TypeVar

from pyarrow import fs

from mpformer import atomic
from mpformer.config import Config
from mpformer.model.weights import checkpoints
from mpformer.tracking.run_dir import (
    CHECKPOINTS,
    EVALUATIONS,
    SUMMARY_FILE,
    RunDir,
    partial_checkpoint,
    step_of,
)
from mpformer.types import InputError, RunError

_T = TypeVar("_T")

log = logging.getLogger(__name__)

RETRY_SECONDS = 600.0
"""For how long the end of a run retries a store that cannot be reached."""
_UNCHANGED = "nothing was changed"


def open_mirror(config: Config, run_dir: Path) -> Mirror | NoMirror:
    """The mirror of a run; without `cluster.mirror`, one that does nothing. Raises as `Mirror`."""
    uri = config.cluster.mirror
    return Mirror(uri, run_dir, config.train.keep.best) if uri else NoMirror()


class NoMirror:
    """The mirror of a run that has none."""

    def push(self) -> bool:
        return True

    def finish(self) -> None:
        pass

    def pull(self) -> None:
        pass


class Mirror:
    """The copy of one run at `uri/RUN`; `best`: the figure whose best checkpoint it keeps.

    Raises `InputError` for a URI that pyarrow does not know, and `RunError` as `finish` does: opening a
    bucket asks the store for its region.
    """

    def __init__(self, uri: str, run_dir: Path, best: str | None = None) -> None:
        self.run_dir = Path(run_dir)
        self._best = best
        self._run = RunDir(self.run_dir)
        # of these the content changes, but perhaps not the size
        self._rewritten = (self._run.config, self._run.mlflow, self._run.failure)
        self.uri = f"{uri.rstrip('/').partition('?')[0]}/{self.run_dir.name}"
        if "://" in uri:
            self._files, base = self._retried(lambda: self._open(uri), _UNCHANGED)
        else:
            self._files, base = fs.LocalFileSystem(), str(Path(uri).resolve())
        self._base = f"{base.rstrip('/')}/{self.run_dir.name}"
        self._copied: dict[str, int] = {}
        """Size of each file when it was last copied."""

    def _open(self, uri: str) -> tuple[fs.FileSystem, str]:
        try:
            return fs.FileSystem.from_uri(uri)
        except ValueError as error:
            raise InputError(f"cluster.mirror: {self.uri}: {_line(error)}") from None

    def push(self) -> bool:
        """Copy new files; False, with a warning, where that fails."""
        try:
            self._push()
        except OSError as error:
            log.warning("%s: %s. The next checkpoint tries again", self.uri, _line(error))
            return False
        return True

    def finish(self) -> None:
        """Copy all remaining files. Raises `RunError` after ten minutes of failures."""
        hint = f"the run is complete in {self.run_dir}; the same command copies the rest"
        self._retried(self._push, hint)

    def pull(self) -> None:
        """Fetch the run where the copy is ahead of the folder. Raises `RunError` as `finish` does."""
        self._retried(self._pull, _UNCHANGED)

    def _retried(self, act: Callable[[], _T], hint: str) -> _T:
        deadline, pause = time.monotonic() + RETRY_SECONDS, 1.0
        while True:
            try:
                return act()
            except OSError as error:
                if time.monotonic() + pause > deadline:
                    raise RunError(f"{self.uri}: {_line(error)}; {hint}") from error
                log.warning("%s: %s. Trying again in %g s", self.uri, _line(error), pause)
            time.sleep(pause)
            pause = min(2 * pause, 30.0)

    def _pull(self) -> None:
        there = self._there()
        mine = max((path.name for path in checkpoints.complete(self.run_dir)), default="")
        complete = [Path(name).parent.name for name in there if Path(name).name == checkpoints.STATE_FILE]
        theirs = max(complete, default="")
        finished = SUMMARY_FILE in there and not self._run.finished
        if theirs <= mine and not finished:
            return
        for name in there:
            if not name.startswith(f"{CHECKPOINTS}/") and name != SUMMARY_FILE:
                self._fetch(name)
        # last: these files mark a checkpoint, or the run, as complete
        for name in sorted({theirs, *self._best_of(complete)} - {""}) if theirs > mine else ():
            if not (self._run.checkpoints / name).exists():
                self._fetch_checkpoint(name, there)
        if finished:
            self._fetch(SUMMARY_FILE)

    def _best_of(self, complete: list[str]) -> list[str]:
        """Of checkpoints of the copy that which the run keeps as its best, if it does."""
        if self._best is None:
            return []
        steps = {step: name for name in complete if (step := step_of(Path(name))) is not None}
        return [steps[step] for step, _ in checkpoints.ranked(self.run_dir, self._best, steps)[:1]]

    def _there(self) -> list[str]:
        selector = fs.FileSelector(self._base, recursive=True, allow_not_found=True)
        infos = self._files.get_file_info(selector)
        return [i.path[len(self._base) + 1 :] for i in infos if i.type == fs.FileType.File]

    def _fetch_checkpoint(self, name: str, there: list[str]) -> None:
        final = self._run.checkpoints / name
        partial = partial_checkpoint(final)
        for file in there:
            if file.startswith(f"{CHECKPOINTS}/{name}/"):
                self._fetch(file, partial / Path(file).name)
        partial.rename(final)

    def _fetch(self, name: str, target: Path | None = None) -> None:
        target = target or self.run_dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic.replacing(target) as partial,
            self._files.open_input_stream(f"{self._base}/{name}") as source,
            partial.open("wb") as file,
        ):
            while block := source.read(1 << 22):
                file.write(block)

    def _push(self) -> None:
        kept = checkpoints.complete(self.run_dir)
        files = [self._run.data, self._run.parent, *self._rewritten]
        files += sorted(self._run.metrics.glob("*.jsonl"))
        files += sorted(path for path in self._run.pictures.rglob("*") if path.is_file())
        files += (waiting := list(self._run.waiting_evaluations().values()))
        for folder in kept:
            files += sorted(folder.iterdir(), key=lambda path: path.name == checkpoints.STATE_FILE)
        for path in [*files, self._run.summary]:
            if path.is_file():
                self._send(path)
        self._delete_measured({path.name for path in waiting})
        there = fs.FileSelector(f"{self._base}/{CHECKPOINTS}", allow_not_found=True)
        names = {folder.name for folder in kept}
        for info in self._files.get_file_info(there):
            # none that is newer than all that are kept: another start of the run may be ahead of this folder
            if kept and info.base_name < kept[-1].name and info.base_name not in names:
                self._files.delete_dir(info.path)

    def _delete_measured(self, waiting: Set[str]) -> None:
        """Delete weights whose figures are in the record, which has been copied by now."""
        folder = fs.FileSelector(f"{self._base}/{EVALUATIONS}", allow_not_found=True)
        for info in self._files.get_file_info(folder):
            if info.base_name not in waiting:
                self._files.delete_file(info.path)

    def _send(self, path: Path) -> None:
        name = path.relative_to(self.run_dir).as_posix()
        content = path.stat()
        if path not in self._rewritten and self._copied.get(name) == content.st_size:
            return
        target = f"{self._base}/{name}"
        self._files.create_dir(target.rpartition("/")[0], recursive=True)
        with path.open("rb") as source, self._files.open_output_stream(target) as file:
            while block := source.read(1 << 22):
                file.write(block)
        self._copied[name] = content.st_size


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
