"""`mpformer predict` as a Ray Data job."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpformer.cli.main import main
from tests.e2e.conftest import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_cluster_predicts_what_one_process_predicts(
    head: Cluster, unbroken: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for picture in sorted((scenes / "train2017").iterdir()):
        (images / picture.name).symlink_to(picture)
    (images / "000000 broken.png").write_bytes(b"hello")
    line = ["predict", str(unbroken), str(images), "--score", "0.1", "evaluate.overlap=0"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # those of a worker
    try:
        assert main([*line, "--out", str(tmp_path / "alone")]) == 2
    finally:
        torch.set_num_threads(threads)
    alone = capsys.readouterr()
    done = head.command(*line, "--out", tmp_path / "cluster", "cluster.workers=2", "evaluate.batch=1")
    assert done.code == 2
    assert files(tmp_path / "cluster") == files(tmp_path / "alone")
    assert len(files(tmp_path / "alone")) == 24 * 2 + 2  # a picture and a panoptic map each, two JSON files
    assert done.out.replace("/cluster", "/alone") == alone.out
    assert "1 of 25 files could not be read" in done.err
