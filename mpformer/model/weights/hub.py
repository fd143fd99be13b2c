"""Models of a Hugging Face hub as local folders: config.json and weights of one commit. Imports no torch.

The hub is $HF_ENDPOINT, https://huggingface.co by default; $HF_TOKEN opens what is not public.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from mpformer.model.weights.fetching import (
    LARGEST,
    NO_CHECKS,
    AnswerError,
    Checks,
    Received,
    checked_url,
    download,
)
from mpformer.types import InputError

_REPOSITORY = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^\s@]+))?", re.ASCII)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of weights, the preferred one first; each may also be in shards, listed in NAME.index.json."""
_LARGEST_JSON = 16 << 20
"""Bytes of a config.json or a list of shards: those of published models are a thousandth."""
_MOST_SHARDS = 256


def hub_url() -> str:
    """The address of the hub. Raises `InputError` for an HF_ENDPOINT that is none."""
    url = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/")
    if not url:
        return "https://huggingface.co"
    expected = "HF_ENDPOINT: an address such as https://huggingface.co is expected"
    if any(sign in url for sign in "@?#"):  # what stands before an @ may be a password
        raise InputError(f"{expected}, without @, ? and #: names of files are put behind it")
    try:
        return checked_url(url)
    except InputError as error:
        raise InputError(f"{expected}: {error}") from None


@dataclass(frozen=True)
class Repository:
    """OWNER/NAME at a commit, branch or tag."""

    name: str
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> Repository:
        """Of `OWNER/NAME[@REVISION]`; `InputError` for anything else."""
        if (found := _REPOSITORY.fullmatch(text)) is None:
            raise InputError(f"hf:{text}: hf:OWNER/NAME or hf:OWNER/NAME@REVISION is expected")
        return cls(found["repository"], found["revision"] or "main")

    def __str__(self) -> str:
        return f"hf:{self.name}@{self.revision}"

    def fetch(self, folder: Path, checks: Checks = NO_CHECKS) -> Path:
        """Fetch settings and weights into a folder in `folder`, which is that of one commit; returns it.

        checks: what is known of the file of weights; shards have no one digest. Raises `InputError` where
        there is no such repository or revision, it is not open to this user, or it holds no model of
        `transformers`, or more shards than a model has; and what `download` raises.
        """
        (folder / "config.json").unlink(missing_ok=True)  # of a call that was cut off: of which commit?
        told = self._file("config.json", folder)
        if told is None:
            raise InputError(f"{self}: no config.json in it: no model of transformers")
        fixed = Repository(self.name, told.commit or self.revision)  # all files of one commit
        place = folder / quote(fixed.revision, safe="")
        place.mkdir(exist_ok=True)
        (folder / "config.json").replace(place / "config.json")
        fixed._file("preprocessor_config.json", place)
        if not any(fixed._weights(name, place, checks) for name in WEIGHTS):
            raise InputError(f"{self}: neither {' nor '.join(WEIGHTS)} in it, nor shards of them")
        return place

    def _weights(self, name: str, folder: Path, checks: Checks) -> bool:
        """Fetch weights of that name, whole or in shards; whether there are any."""
        if self._file(name, folder, checks, LARGEST) is not None:
            return True
        index = f"{name}.index.json"
        if self._file(index, folder) is None:
            return False
        if checks.sha256 is not None:
            raise InputError(
                f"{self}: its weights are in shards, and one file of a known SHA-256 is expected"
            )
        for shard in _shards(folder / index, f"{self}: {index}"):
            if self._file(shard, folder, largest=LARGEST) is None:
                raise InputError(f"{self}: the shard {shard}, which {index} lists, is not in it")
        return True

    def _file(
        self, name: str, folder: Path, checks: Checks = NO_CHECKS, largest: int = _LARGEST_JSON
    ) -> Received | None:
        """Fetch one file, unless an earlier call did; None where the repository has none of that name."""
        token = os.environ.get("HF_TOKEN", "").strip() or None
        if token is not None and not (token.isascii() and token.isprintable()):
            raise InputError("HF_TOKEN: is no token: it has other characters than those of ASCII")
        url = f"{hub_url()}/{self.name}/resolve/{quote(self.revision, safe='')}/{name}"
        if (folder / name).exists():
            return Received()
        try:
            return download(url, folder / name, checks, token, largest)
        except AnswerError as error:
            # a hub tells an absent file of a repository from an absent repository or revision
            if error.status == 404 and error.code not in ("RepoNotFound", "RevisionNotFound"):
                return None
            raise self._explained(error, url) from None

    def _explained(self, error: AnswerError, url: str) -> InputError:
        if error.code == "RevisionNotFound":
            return InputError(f"{self}: the repository has no revision '{self.revision}'")
        if error.code == "GatedRepo":
            page = f"{hub_url()}/{self.name}"
            return InputError(f"{self}: its terms have to be accepted at {page}, and HF_TOKEN be set")
        if error.code == "RepoNotFound" or error.status in (401, 403, 404):
            wrong = (
                "HF_TOKEN does not open it" if os.environ.get("HF_TOKEN") else "HF_TOKEN opens private ones"
            )
            return InputError(f"{self}: no such repository that is public ({url}); {wrong}")
        return error


def _shards(index: Path, where: str) -> list[str]:
    """The names of the shards, files of the repository's own folder."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{where}: is no list of shards") from None
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII):
            raise InputError(f"{where}: {name!r:.100} is no name of a shard")
    if len(names) > _MOST_SHARDS:
        raise InputError(f"{where}: lists {len(names)} shards, at most {_MOST_SHARDS} are expected")
    return sorted(names)
