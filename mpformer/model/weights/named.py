"""Weights that are named and not there: fetched once, made a checkpoint of ours, and kept.

A name of the catalogue, `hf:OWNER/NAME[@REVISION]` or a URL stands for one file of ours in the cache. What is
fetched is given to the caller's `convert`, since reading it needs torch, which this module does not.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mpformer.home import cache_folder
from mpformer.model.weights.catalogue import NamedWeights, named_weights, nearest_name
from mpformer.model.weights.fetching import Checks, check_reachable, checked_url, download
from mpformer.model.weights.hub import Repository, hub_url
from mpformer.types import InputError, RunError

log = logging.getLogger(__name__)

_VERSION = 1
"""Of what is made of a download: a new one has it made anew."""

Convert = Callable[[Path, Path, NamedWeights | None], None]
"""(what was fetched, a file or a folder; the file to make of it; what the catalogue says of it)"""


@dataclass(frozen=True)
class Remote:
    """Weights that lie elsewhere."""

    url: str
    """Of a file; empty for a repository."""
    repository: Repository | None
    known: NamedWeights | None
    """What the catalogue says of them, if they were named."""

    @classmethod
    def parse(cls, text: str) -> Remote | None:
        """What a text stands for: None for one that can only be a path. `InputError` for a wrong one."""
        if (known := named_weights().get(text)) is not None:
            hub = Repository(known.repository, known.revision) if known.repository else None
            return cls("" if hub else known.url, hub, known)
        if text.startswith("hf:"):
            return cls("", Repository.parse(text.removeprefix("hf:")), None)
        if re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
            return cls(checked_url(text), None, None)
        return None

    @property
    def file(self) -> Path:
        """Its place in the cache, whether or not it has been fetched."""
        known = self.known and (self.known.recipe, self.known.settings, self.known.sha256)
        hub = self.repository and hub_url()
        told = repr((_VERSION, self.url, self.repository, hub, known))
        key = hashlib.sha256(told.encode()).hexdigest()
        return cache_folder() / "weights" / key[:12] / f"{self._stem}.safetensors"

    @property
    def _stem(self) -> str:
        if self.known is not None:
            return self.known.name
        path = self.repository.name if self.repository else unquote(urlsplit(self.url).path)
        return re.sub(r"[^\w.-]", "-", Path(path).stem if self.url else Path(path).name) or "weights"

    def place(self, convert: Convert) -> Path:
        """The file in the cache, fetched and made now if it is not there.

        Processes that ask at the same time wait for the one that fetches. Raises what `download`, the hub
        and `convert` raise.
        """
        file = self.file
        if not file.exists():
            with _alone(file.parent):
                if not file.exists():
                    self._make(file, convert)
        return file

    def _make(self, file: Path, convert: Convert) -> None:
        downloads = file.with_name("download")
        fetched = self._fetch(downloads)
        try:
            convert(fetched, file, self.known)
        except InputError as error:
            shutil.rmtree(downloads)  # else the wrong thing would be found again at every call
            name = self.known.name if self.known else self.repository or self.url
            raise InputError(f"{name}: {error}") from None
        shutil.rmtree(downloads)

    def _fetch(self, folder: Path) -> Path:
        checks = Checks(self.known.sha256, self.known.md5_start) if self.known else Checks()
        if self.repository is not None:
            return self.repository.fetch(folder, checks)
        target = folder / (Path(unquote(urlsplit(self.url).path)).name or "weights")
        if not target.exists():  # an earlier call was stopped between fetching and converting
            download(self.url, target, checks)
        return target


def is_remote(text: str) -> bool:
    """Whether a text names weights that lie elsewhere: no file or folder of that name is here, which wins.

    `InputError` for a `hf:` or URL that is none.
    """
    return not os.path.exists(text) and Remote.parse(text) is not None


def require_reachable(text: str) -> None:
    """Raise `RunError` where a text names weights that have yet to be fetched, from nowhere reachable.

    For commands, before they load what takes longer than finding this out. `InputError` as `is_remote`.
    """
    if is_remote(text) and (remote := Remote.parse(text)) is not None and not remote.file.exists():
        check_reachable(f"{hub_url()}/{remote.repository.name}" if remote.repository else remote.url)


def hint(text: str) -> str:
    """The end of a message on a path at which there are no weights: the name that may have been meant."""
    if text in named_weights():
        return "; it hides the weights of that name in `mpformer weights list`"
    close = nearest_name(text) if "/" not in text else None
    return f"; nearest of `mpformer weights list`: {close}" if close else ""


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the system frees the lock when its process ends, however it ends."""
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((folder / ".lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("another process fetches these weights; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise RunError(
                f"{folder}: the cache cannot be written: {error.strerror}; MPFORMER_CACHE names another "
                "folder"
            ) from None
        yield
