"""Packed shards hold what the folder holds, survive interruptions, and damage is found."""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pyarrow.parquet as pq
import pytest

from mpformer.config import Data, Packed
from mpformer.data import masks, pack, packed
from mpformer.data.catalog import open_split
from mpformer.data.images import load_image
from mpformer.data.records import MapId, Polygons
from mpformer.data.samples import sample_order
from mpformer.types import InputError
from tests.data.folders import annotation, coco_folder
from tests.data.test_coco import panoptic_folder
from tests.data.test_labelmaps import settings as label_settings
from tests.data.test_labelmaps import small
from tests.data.test_pipeline import joined, stream


@pytest.fixture(autouse=True)
def fresh():
    """Groups in memory belong to the files of another test."""
    packed._read_group.cache_clear()
    packed._open_shard.cache_clear()


def of_shards(data, root, **changes):
    return data.model_copy(update={"root": str(root), "dataset": Packed(), **changes})


def assert_same(ours, theirs):
    assert (ours.image_id, ours.width, ours.height, ours.problem) == (
        theirs.image_id,
        theirs.width,
        theirs.height,
        theirs.problem,
    )
    assert [(s.label, s.crowd, s.id, s.area) for s in ours.segments] == [
        (s.label, s.crowd, s.id, s.area) for s in theirs.segments
    ]
    if ours.problem:
        return
    assert np.array_equal(load_image(ours), load_image(theirs))
    assert np.array_equal(masks.record_masks(ours), masks.record_masks(theirs))
    for a, b in zip(ours.segments, theirs.segments):
        if isinstance(b.mask, Polygons):
            assert all(np.array_equal(p, q) for p, q in zip(a.mask.parts, b.mask.parts, strict=True))


def test_real_data_comes_back_as_it_was(sample_data, tmp_path):
    data = Data(root=str(sample_data / "tiny_coco"))
    assert pack.pack(data, str(tmp_path / "out"), shard_bytes=1 << 20) == {"train": 37, "val": 36}
    for split in ("train", "val"):
        source = open_split(data, split)
        catalog = open_split(of_shards(data, tmp_path / "out"), split)
        assert catalog.classes == source.classes
        by_id = {r.image_id: r for r in source.records}
        assert sorted(r.image_id for r in catalog.records) == sorted(by_id)
        for record in catalog.records[::4]:
            assert_same(record, by_id[record.image_id])
    assert [r.image_id for r in catalog.records] == [r.image_id for r in source.records]
    shards = sorted((tmp_path / "out" / "train").glob("*.parquet"))
    assert len(shards) > 1
    for shard in shards[:-1]:
        file = pq.ParquetFile(shard)
        groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        assert set(groups) == {packed.GROUP}


def test_panoptic_maps_and_label_maps(tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:10, :, 0], pixels[10:20, :, 2] = 60, 5
    segments = [{"id": 60 << 16, "category_id": 3, "area": 600}, {"id": 5, "category_id": 7, "area": 600}]
    data = panoptic_folder(tmp_path / "a", segments, pixels)
    pack.pack(data, str(tmp_path / "packed"))
    record = open_split(of_shards(data, tmp_path / "packed"), "val").records[0]
    assert isinstance(record.segments[0].mask, MapId)
    assert_same(record, open_split(data, "val").records[0])
    classes = small(tmp_path / "b")
    pack.pack(classes, str(tmp_path / "maps"))
    ours = open_split(of_shards(classes, tmp_path / "maps"), "val")
    for a, b in zip(ours.records, open_split(classes, "val").records, strict=True):
        assert_same(a, b)
    with pytest.raises(InputError, match=r"'panoptic' needs objects, but .* holds classes only"):
        open_split(of_shards(classes, tmp_path / "maps", task="panoptic"), "val")


@pytest.mark.slow
def test_mask_files(sample_data, tmp_path):
    data = label_settings(sample_data / "nuclei_dsb2018", "nuclei", "instance")
    pack.pack(data, str(tmp_path))
    for a, b in zip(open_split(of_shards(data, tmp_path), "val").records, open_split(data, "val").records):
        assert_same(a, b)


def test_ranks_and_resuming_see_the_same_batches(sample_data, tmp_path):
    data = Data(root=str(sample_data / "tiny_coco"), augment={"size": [64, 64]}, loader="inline")
    pack.pack(data, str(tmp_path))
    shards = of_shards(data, tmp_path)
    catalog = open_split(shards, "train")
    whole = stream(shards, catalog, stop=13, batch_size=6)
    shares = [stream(shards, catalog, stop=13, batch_size=6, rank=r, world=3) for r in range(3)]
    assert joined(shares) == whole
    assert stream(shards, pickle.loads(pickle.dumps(catalog)), start=7, stop=13, batch_size=6) == whole[7:]  # noqa: S301
    assert len({s for step in whole[:6] for s in step}) == 36


def test_an_epoch_visits_groups_close_together():
    order = sample_order(0, 0, 1000, 16)
    assert sorted(order.tolist()) == list(range(1000))
    for start in range(0, 960, 64):
        assert len({i // 16 for i in order[start : start + 64].tolist()}) <= 5
    assert len({tuple(sample_order(0, e, 1000, 16).tolist()) for e in range(5)}) == 5
    firsts = [int(sample_order(s, 0, 1000, 16)[0]) // 16 for s in range(200)]
    assert len(set(firsts)) > 50


def many(tmp_path):
    return coco_folder(tmp_path / "in", [annotation(10 + n, n) for n in range(1, 41)], images=40)


def test_an_interrupted_packing_is_finished(tmp_path, monkeypatch):
    data = many(tmp_path)
    pack.pack(data, str(tmp_path / "whole"), shard_bytes=1000)
    written = packed.Store.write
    count = 0

    def fails(self, name, content):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        written(self, name, content)

    monkeypatch.setattr(packed.Store, "write", fails)
    with pytest.raises(KeyboardInterrupt):
        pack.pack(data, str(tmp_path / "out"), shard_bytes=1000)
    monkeypatch.setattr(packed.Store, "write", written)
    with pytest.raises(InputError, match="packing was interrupted"):
        open_split(of_shards(data, tmp_path / "out"), "train")
    first = (tmp_path / "out" / "train" / "shard-00000.parquet").stat().st_mtime_ns
    pack.pack(data, str(tmp_path / "out"), shard_bytes=1000)
    assert (tmp_path / "out" / "train" / "shard-00000.parquet").stat().st_mtime_ns == first
    names = sorted(p.name for p in (tmp_path / "whole" / "train").iterdir())
    assert sorted(p.name for p in (tmp_path / "out" / "train").iterdir()) == names
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "out" / "train" / name).read_bytes() == (
            tmp_path / "whole" / "train" / name
        ).read_bytes()


def test_other_data_in_the_same_place_is_an_error(tmp_path):
    data = many(tmp_path)
    pack.pack(data, str(tmp_path / "out"))
    other = data.model_copy(update={"dataset": data.dataset.model_copy(update={"name": "other"})})
    with pytest.raises(InputError, match=r"manifest\.json: holds other data \('name' differs\)"):
        pack.pack(other, str(tmp_path / "out"))


def test_damage_is_found(tmp_path):
    data = many(tmp_path)
    pack.pack(data, str(tmp_path / "out"))
    shard = tmp_path / "out" / "train" / "shard-00000.parquet"
    content = shard.read_bytes()
    assert packed.verify(str(tmp_path / "out"), "train") == []
    shard.write_bytes(content[:-100])
    with pytest.raises(InputError, match=rf"shard-00000\.parquet: the shard has {len(content) - 100} bytes"):
        open_split(of_shards(data, tmp_path / "out"), "train")
    flipped = bytearray(content)
    flipped[len(content) // 3] ^= 0xFF
    shard.write_bytes(bytes(flipped))
    (line,) = packed.verify(str(tmp_path / "out"), "train")
    assert "shard-00000.parquet: its SHA-256" in line
    catalog = open_split(of_shards(data, tmp_path / "out"), "train")
    with pytest.raises(InputError, match=r"shard-00000\.parquet: group \d+ cannot be read"):
        list(catalog.records)
    shard.unlink()
    with pytest.raises(InputError, match="the shard is missing"):
        open_split(of_shards(data, tmp_path / "out"), "train")
    with pytest.raises(InputError, match=r"no manifest\.json: a split that"):
        open_split(of_shards(data, tmp_path / "nowhere"), "train")


def test_bad_samples_keep_their_place(tmp_path):
    data = coco_folder(tmp_path / "in", images=4)
    (tmp_path / "in" / "images" / "2.png").unlink()
    with pytest.raises(InputError, match=r"'2\.png': no such file"):
        pack.pack(data, str(tmp_path / "out"))
    data = data.model_copy(update={"on_bad_sample": "skip"})
    pack.pack(data, str(tmp_path / "out"))
    records = open_split(of_shards(data, tmp_path / "out"), "val").records
    assert ["'2.png': no such file" in r.problem for r in records] == [False, True, False, False]


@pytest.fixture
def s3_server(monkeypatch):
    """A local S3 server on the loopback."""
    pytest.importorskip("moto")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            break
        except OSError:
            if time.monotonic() > end or server.poll() is not None:
                server.kill()
                pytest.fail("the local S3 server does not answer")
            time.sleep(0.2)
    request = urllib.request.Request(f"{url}/bucket", method="PUT")
    urllib.request.urlopen(request, timeout=10).close()
    yield "s3://bucket/coco"
    server.terminate()
    server.wait(10)


@pytest.mark.slow
def test_object_stores(tmp_path, s3_server):
    data = many(tmp_path)
    assert pack.pack(data, s3_server, shard_bytes=1000) == {"train": 40, "val": 40}
    assert pack.pack(data, s3_server, shard_bytes=1000) == {"train": 40, "val": 40}
    pack.pack(data, str(tmp_path / "local"), shard_bytes=1000)
    remote, local = of_shards(data, s3_server), of_shards(data, tmp_path / "local")
    for split in ("train", "val"):
        assert packed.verify(s3_server, split) == []
        ours, theirs = open_split(remote, split), open_split(local, split)
        for a, b in zip(ours.records[::7], theirs.records[::7], strict=True):
            assert_same(a, b)
    assert stream(remote, open_split(remote, "train")) == stream(local, open_split(local, "train"))
    with pytest.raises(InputError, match="no manifest"):
        open_split(of_shards(data, "s3://bucket/elsewhere"), "train")


def test_the_manifest_is_plain_to_read(tmp_path):
    data = many(tmp_path)
    pack.pack(data, str(tmp_path / "out"))
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert (manifest["rows"], manifest["complete"]) == (40, True)
    assert [c["name"] for c in manifest["classes"]] == ["cat", "dog"]
    size = os.path.getsize(tmp_path / "out" / "train" / "shard-00000.parquet")
    assert [(s["rows"], s["bytes"]) for s in manifest["shards"]] == [(40, size)]
