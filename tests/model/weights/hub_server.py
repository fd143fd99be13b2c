"""A Hugging Face hub on the loopback: resolve URLs, forwards to a store of large files, ETag, Range, tokens.

It answers as the public one does: a small file at once, a large one by a forward with its SHA-256; an unknown
repository with 401, since it might be private; what is wrong in X-Error-Code.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LARGE = 100_000
"""Bytes from which on a file is stored apart."""


@dataclass
class Hub:
    url: str = ""
    store: dict[str, bytes] = field(default_factory=dict)
    """Files by their SHA-256."""
    repositories: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict)
    """By "OWNER/NAME@REVISION" (`main`, or the commit) the commit, and the SHA-256 of each file."""
    plain: dict[str, bytes] = field(default_factory=dict)
    """Files at /files/NAME."""
    gated: dict[str, str] = field(default_factory=dict)
    """The token that opens a repository."""
    ranges: bool = True
    """Whether parts of files are given out."""
    cuts: list[int] = field(default_factory=list)
    """Of the next answers with a large file: after how many bytes the connection breaks."""
    wrong_bytes: bool = False
    """Send other bytes than those that the SHA-256 is of."""
    lengths: str | None = None
    """What is told as the Content-Length of files; "" tells none. None: what it is."""
    fails: int = 0
    """An error of the server that it answers everything with."""
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    """(path, Range, Authorization) of each."""

    def add(self, name: str, files: dict[str, bytes]) -> str:
        """Put a commit on `main`; its id."""
        digests = {file: _sha(data) for file, data in files.items()}
        self.store |= {digest: files[file] for file, digest in digests.items()}
        commit = hashlib.sha1(repr(sorted(digests.items())).encode()).hexdigest()
        self.repositories[f"{name}@main"] = self.repositories[f"{name}@{commit}"] = (commit, dict(digests))
        return commit

    def add_folder(self, name: str, folder: Path) -> str:
        return self.add(name, {path.name: path.read_bytes() for path in folder.iterdir()})

    def paths(self) -> list[str]:
        return [path for path, _, _ in self.requests]


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.requests.append((path, self.headers["Range"], self.headers["Authorization"]))
        if hub.fails:
            self._answer(hub.fails, {}, b"")
        elif path.startswith("/store/"):
            data = hub.store[path[7:]]
            self._send(bytes(len(data)) if hub.wrong_bytes else data, path[7:])
        elif path.startswith("/files/"):
            data = hub.plain.get(path[7:])
            if data is None:
                self._answer(404, {}, b"<html>not here</html>")
            else:
                self._send(data, _sha(data))
        else:
            self._resolve(*path[1:].split("/resolve/"))

    def _resolve(self, repository: str, rest: str) -> None:
        hub = self.hub
        revision, _, name = rest.partition("/")
        if not any(known.startswith(f"{repository}@") for known in hub.repositories):
            return self._answer(401, {"X-Error-Code": "RepoNotFound"}, b"")
        token = hub.gated.get(repository)
        if token and self.headers["Authorization"] != f"Bearer {token}":
            return self._answer(401, {"X-Error-Code": "GatedRepo"}, b"")
        if f"{repository}@{revision}" not in hub.repositories:
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        commit, files = hub.repositories[f"{repository}@{revision}"]
        if name not in files:
            return self._answer(404, {"X-Error-Code": "EntryNotFound"}, b"")
        sha, data = files[name], hub.store[files[name]]
        told = {"X-Repo-Commit": commit}
        if name == "preprocessor_config.json" and revision != "moved":  # small files, too, may lie elsewhere
            self.hub.repositories[f"{repository}@moved"] = self.hub.repositories[f"{repository}@{revision}"]
            return self._answer(307, {**told, "Location": f"/{repository}/resolve/moved/{name}"}, b"")
        if len(data) < LARGE:
            return self._send(data, hashlib.sha1(data).hexdigest(), told)
        told |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data))}
        elsewhere = hub.url.replace("127.0.0.1", "localhost")  # another host, as far as names go
        return self._answer(302, {**told, "Location": f"{elsewhere}/store/{sha}?signature=1"}, b"")

    def _send(self, data: bytes, etag: str, told: dict[str, str] | None = None) -> None:
        """The file, or the part that is asked for of the same version."""
        start, wanted = 0, self.headers["Range"]
        if wanted and self.hub.ranges and self.headers["If-Range"] == f'"{etag}"':
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        headers = {"ETag": f'"{etag}"', **(told or {})}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.hub.cuts.pop(0) if self.hub.cuts and len(data) >= LARGE else None
        self._answer(206 if start else 200, headers, data[start:], cut)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        told = self.hub.lengths if status == 200 else None
        if told != "":
            self.send_header("Content-Length", told or str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None:
            self.connection.close()  # HTTP/1.0: the reader sees the end before all has come


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
