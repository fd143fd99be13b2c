"""Servers that runs talk to, real ones on the loopback, which a test can take away and bring back."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs


def closed_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class MlflowServer:
    """`mlflow server` over `folder/mlflow.db`; what it has survives a kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = closed_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers; at once if it was started before."""
        if self._process is not None:
            return
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        store += ["--artifacts-destination", str(self.folder / "artifacts")]
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *store, *where],
            # one process and not fifteen: nothing here is a job of the server's
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        self.kill()
        raise AssertionError("the MLflow server did not come up")

    def kill(self) -> None:
        """All its processes, at once."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class S3Server:
    """An S3 server in a thread, with one bucket. It keeps what it has while it is closed or refuses."""

    def __init__(self) -> None:
        server = pytest.importorskip("moto.server", reason="moto[server] is not installed: no local S3")
        self._app = server.DomainDispatcherApplication(server.create_backend_app)
        self._port = closed_port()
        self._http: Any = None
        self.overloaded = False
        """Answers 503, as S3 does when it is asked for too much."""
        self.refused = 0
        """Requests that it has answered so."""
        self.environment = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self._where = {
            "region": "us-east-1",
            "scheme": "http",
            "endpoint_override": f"127.0.0.1:{self._port}",
        }
        self._study = f"results/study-{self._port}"  # what moto holds belongs to the process
        self.uri = f"s3://{self._study}?" + "&".join(f"{key}={value}" for key, value in self._where.items())
        logging.getLogger("werkzeug").setLevel("ERROR")
        self.open()
        self.files().create_dir("results")

    def _answer(self, environ: Any, start_response: Any) -> Any:
        if not self.overloaded:
            return self._app(environ, start_response)
        self.refused += 1
        start_response("503 Slow Down", [("Content-Type", "application/xml")])
        return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]

    def open(self) -> None:
        """Listen, where it listened before."""
        from werkzeug.serving import make_server

        self._http = make_server("127.0.0.1", self._port, self._answer, threaded=True)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Connections are refused from here on."""
        self._http.shutdown()
        self._http.server_close()

    @contextlib.contextmanager
    def closed_until_waited_for(self) -> Iterator[None]:
        """Closed, until the mirror of a run in this process says that it waits."""
        bucket = self

        class Reopen(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if "Trying again in 1 s" in record.getMessage():
                    bucket.open()

        logger, reopen = logging.getLogger("mpformer.train.mirror"), Reopen()
        self.close()
        logger.addHandler(reopen)
        yield
        logger.removeHandler(reopen)

    def files(self) -> fs.S3FileSystem:
        keys = {"access_key": "test", "secret_key": "test"}
        return fs.S3FileSystem(allow_bucket_creation=True, **keys, **self._where)

    def has(self, name: str) -> bool:
        """Whether a file of the study is there."""
        return self.files().get_file_info(f"{self._study}/{name}").type == fs.FileType.File

    def content(self, folder: str) -> dict[str, bytes]:
        """What lies below a folder of the study, by path."""
        files, base = self.files(), f"{self._study}/{folder}/"
        found = files.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
        paths = [info.path for info in found if info.type == fs.FileType.File]
        return {path.removeprefix(base): files.open_input_stream(path).read() for path in paths}
