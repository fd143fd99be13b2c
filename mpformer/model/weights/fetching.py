"""Downloads: resumed where they were cut, checked, put into their place whole. Standard library only.

Nothing that arrives is executed or unpacked here. A download grows in `NAME.part`; `NAME.part.json` notes of
which URL and version (ETag) it is, so that a part is only continued with the rest of the same file.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any, NoReturn
from urllib.parse import urljoin, urlsplit

from mpformer import __version__, atomic
from mpformer.config.yamlfile import masked
from mpformer.types import InputError, RunError, printable

log = logging.getLogger(__name__)

SECONDS_TO_CONNECT = 4.0
"""After which a server that does not take the connection is not reachable: look-up of its name included."""
_SECONDS_OF_SILENCE = 30.0
"""After which a connection that brings nothing is given up."""
_SECONDS_BETWEEN_LINES = 10.0
_BLOCK = 1 << 20
LARGEST = 64 << 30
"""Bytes of a file of weights: a server that tells or sends more has something else."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Checks:
    """What is known of a file before it is fetched."""

    sha256: str | None = None
    md5_start: str | None = None
    """The first digits of its MD5."""


NO_CHECKS = Checks()


@dataclass(frozen=True)
class Received:
    """What the server told of a file."""

    commit: str | None = None
    """Of a file of a hub: the commit that its revision stands for."""
    sha256: str | None = None
    """Of a large file of a hub: its ETag there is its SHA-256."""


class AnswerError(InputError):
    """The server's answer is no file: `status` is HTTP's, `code` what a hub says more of it, or empty."""

    def __init__(self, url: str, status: int, reason: str, code: str = "") -> None:
        super().__init__(f"{url}: {_MEANINGS.get(status, 'the server answers')} (HTTP {status} {reason})")
        self.status, self.code = status, code


_MEANINGS = {
    401: "the server lets nobody have it without a password or token",
    403: "the server refuses it",
    404: "there is no such file",
    410: "the file is there no longer",
}


class _Cut(Exception):
    """The connection broke; the message says how."""


def download(
    url: str,
    target: Path,
    checks: Checks = NO_CHECKS,
    token: str | None = None,
    largest: int = LARGEST,
) -> Received:
    """Fetch a file, going on with what an interrupted call has left. `target` appears whole or not at all.

    `token` is sent as the bearer's to the host of the URL, and to no other that it forwards to; `largest`:
    the most bytes that are taken. Raises `RunError` where the server is not reachable (after
    `SECONDS_TO_CONNECT` at most), fails, breaks off again and again, or sends something else than was
    expected or more than there is room for; `AnswerError`, an `InputError`, where it refuses or has no such
    file.
    """
    check_reachable(url)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return _Part(url, target, largest).complete(checks, token)
    except OSError as error:  # of the disk: those of the network are told apart where they occur
        raise RunError(
            f"{target}: the download cannot be written: {error.strerror}; MPFORMER_CACHE names another folder"
        ) from None


def checked_url(url: str) -> str:
    """The URL, if it is one of http or https. `InputError` for another one, and for a password in it."""
    try:
        parts = urlsplit(url)
        whole = bool(parts.hostname) and parts.port != 0  # the port raises where it is no number of one
    except ValueError:
        whole = False
    if not whole or not url.isascii() or not url.isprintable() or " " in url:
        raise InputError(f"{masked(url)}: is no URL (other characters than ASCII's are written as %XX)")
    if parts.scheme.lower() not in ("http", "https"):
        raise InputError(f"{masked(url)}: weights are fetched by http and https, not by {parts.scheme}")
    if parts.password is not None or parts.username is not None:
        # settings are written to run folders and to MLflow
        raise InputError(f"{parts.scheme}://{parts.hostname}{parts.path}: a URL of weights holds no password")
    return url


def check_reachable(url: str) -> None:
    """Raise `RunError` unless the server, or the proxy on the way to it, takes a connection in time."""
    Attempt(url).require()


class Attempt:
    """An attempt to connect to the server of a URL, or to the proxy on the way to it.

    Without a network, looking up a name or connecting may take minutes; so both are done aside, while the
    caller does something else.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._host, port = _next_host(url)
        self._failure: list[OSError | UnicodeError] = []
        self._ended = threading.Event()
        self._deadline = time.monotonic() + SECONDS_TO_CONNECT
        threading.Thread(target=self._connect, args=(port,), daemon=True).start()

    def _connect(self, port: int) -> None:
        try:
            socket.create_connection((self._host, port), timeout=SECONDS_TO_CONNECT / 2).close()
        except (OSError, UnicodeError) as error:
            self._failure.append(error)
        self._ended.set()

    def require(self) -> None:
        """Wait for its end, `SECONDS_TO_CONNECT` from its beginning at most; `RunError` where it failed."""
        if not self._ended.wait(max(0.0, self._deadline - time.monotonic())):
            raise RunError(
                f"{self._url}: {self._host} is not reachable: no connection in {SECONDS_TO_CONNECT:g} s"
            )
        if self._failure:
            raise RunError(f"{self._url}: {self._host} is not reachable: {_reason(self._failure[0])}")


def _next_host(url: str) -> tuple[str, int]:
    """Host and port that a request for the URL connects to: the server's, or those of a proxy."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        host = parts.hostname or host
    try:
        return host, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise InputError(f"{url}: {error}") from None


class _Part:
    """The part of a file that has arrived, and what is noted of it."""

    def __init__(self, url: str, target: Path, largest: int) -> None:
        self.url, self.target, self.largest = url, target, largest
        self.file = target.with_name(f"{target.name}.part")
        self.note = target.with_name(f"{target.name}.part.json")

    @property
    def size(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def complete(self, checks: Checks, token: str | None) -> Received:
        """Fetch what is missing, check the whole, and put it into its place."""
        while True:
            before = self.size
            try:
                received = self._receive(token)
                break
            except _Cut as error:
                if self.size <= before:  # no progress: trying again would bring no more
                    raise RunError(
                        f"{self.url}: the download broke off after {_megabytes(self.size)} ({error}); "
                        "the same command goes on from there"
                    ) from None
        _check(self.file, self.url, Checks(checks.sha256 or received.sha256, checks.md5_start))
        atomic.flush(self.file)
        self.file.replace(self.target)
        self.note.unlink()
        return received

    def _receive(self, token: str | None) -> Received:
        """Ask for what is missing and append it. Raises `_Cut` where not all of it comes."""
        etag = self._etag() if self.size else None
        # one byte anew: of a part that is whole, the rest would be nothing, which cannot be asked for
        start = self.size - 1 if etag else 0
        request = urllib.request.Request(
            self.url, headers={"Accept-Encoding": "identity", "User-Agent": f"mpformer/{__version__}"}
        )
        if etag:
            request.add_header("Range", f"bytes={start}-")
            request.add_header("If-Range", etag)
        if token:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        hops: list[Message] = []
        with self._open(request, hops) as response:
            if not _continues(response, start):
                start = 0
                self.file.unlink(missing_ok=True)  # before its version is noted anew
            total = _total(response, start)
            self._check_room(total, start)
            etag = response.headers.get("ETag")
            self.note.write_text(json.dumps({"url": self.url, "etag": etag}), encoding="utf-8")
            self._append(response, start, total)
            if total is not None and self.size != total:
                raise _Cut(f"{self.size} of {total} bytes")
            return _told([*hops, response.headers])

    def _check_room(self, total: int | None, start: int) -> None:
        """Raise `RunError` for a size that is beyond the largest, or that the disk has no room for."""
        if total is None:
            return
        if total > self.largest:
            self._refuse_size(f"{_megabytes(total)} are told")
        if total - start > (free := shutil.disk_usage(self.file.parent).free):
            raise RunError(
                f"{self.url}: {_megabytes(total - start)} to come, and there are {_megabytes(free)} free in "
                f"{self.file.parent}; MPFORMER_CACHE names another folder"
            )

    def _refuse_size(self, what: str) -> NoReturn:
        self.file.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        raise RunError(f"{self.url}: {what}, and at most {_megabytes(self.largest)} are taken of such a file")

    def _etag(self) -> str | None:
        """The version of the file that the part is of; None where it cannot be continued."""
        try:
            noted = json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        etag = noted["etag"] if noted["url"] == self.url else None
        # a weak one (W/) says that two versions mean the same, not that their bytes are the same
        return etag if etag and not etag.startswith("W/") else None

    def _open(self, request: urllib.request.Request, hops: list[Message]) -> Any:
        try:
            return urllib.request.build_opener(_Forwarded(hops)).open(request, timeout=_SECONDS_OF_SILENCE)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:
                self.file.unlink()
                raise RunError(
                    f"{self.url}: the file has changed: the same command fetches it anew"
                ) from None
            if error.code == 429 or error.code >= 500:
                raise RunError(f"{self.url}: the server fails (HTTP {error.code} {_shown(error)})") from None
            code = error.headers.get("X-Error-Code", "") if error.headers else ""
            raise AnswerError(self.url, error.code, _shown(error), code) from None
        except urllib.error.URLError as error:
            raise _Cut(_reason(error.reason)) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Cut(_reason(error)) from None

    def _append(self, response: IO[bytes], start: int, total: int | None) -> None:
        said, what = time.monotonic(), "" if total is None else f" of {_megabytes(total)}"
        if total is None or total > _BLOCK:
            log.warning("fetching %s (%s%s)", self.url, _megabytes(start), what)
        with self.file.open("r+b" if start else "wb") as file:
            file.seek(start)
            file.truncate()
            while block := _read(response):
                file.write(block)
                if file.tell() > self.largest:
                    self._refuse_size("more come than were told")
                if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    log.warning("%s%s", _megabytes(file.tell()), what)


class _Forwarded(urllib.request.HTTPRedirectHandler):
    """Follows forwards, but not from https to anything less, and keeps what the hops tell."""

    def __init__(self, hops: list[Message]) -> None:
        self._hops = hops

    def redirect_request(
        self, request: urllib.request.Request, fp: Any, code: int, message: str, headers: Any, new_url: str
    ) -> urllib.request.Request | None:
        scheme = urlsplit(urljoin(request.full_url, new_url)).scheme
        if scheme != "https" and scheme != urlsplit(request.full_url).scheme:
            raise InputError(f"{request.full_url}: forwards to {scheme}, which is not followed")
        self._hops.append(headers)
        forwarded = super().redirect_request(request, fp, code, message, headers, new_url)
        token = request.unredirected_hdrs.get("Authorization")
        if forwarded is not None and token and _origin(forwarded.full_url) == _origin(request.full_url):
            forwarded.add_unredirected_header("Authorization", token)  # the same server, who knows it
        return forwarded


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _read(response: IO[bytes]) -> bytes:
    try:
        return response.read(_BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(_reason(error)) from None


def _continues(response: Any, start: int) -> bool:
    """Whether what comes is the rest of the part: servers may send all of the file instead."""
    return response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")


def _total(response: Any, start: int) -> int | None:
    """The size of the whole file in bytes, if the server tells it."""
    length = response.headers.get("Content-Length", "")
    # Python makes no number of thousands of digits, and so many bytes are too many in any case
    return start + int(length[:30]) if length.isdecimal() else None


def _told(answers: list[Message]) -> Received:
    """What a hub tells of its file, in the first answer that does."""

    def first(name: str, pattern: re.Pattern[str]) -> str | None:
        values = (answer.get(name, "").strip('"') for answer in answers)
        return next((value for value in values if pattern.fullmatch(value)), None)

    return Received(first("X-Repo-Commit", _COMMIT), first("X-Linked-Etag", _SHA256))


def _check(file: Path, url: str, checks: Checks) -> None:
    """Raise `RunError`, and delete the file, where its digest is another than expected."""
    wanted: Mapping[str, str | None] = {"sha256": checks.sha256, "md5": checks.md5_start}
    for kind, expected in wanted.items():
        if expected is None:
            continue
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, kind).hexdigest()
        if not found.startswith(expected):
            file.unlink()
            raise RunError(
                f"{url}: what came is not the file that is expected: its {kind.upper()} begins with "
                f"{found[: len(expected)][:16]}, not {expected[:16]}; it is deleted"
            )


def _shown(error: urllib.error.HTTPError) -> str:
    """What a server says of its refusal, which may be of any length."""
    return printable(str(error.reason)[:100])


def _reason(error: object) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
