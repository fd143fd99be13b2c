"""Ray Data gives the very batches of the in-process loader, and never waits for CPUs that nobody frees."""

import threading
import time

import pytest
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from mpformer.config import LargeScaleJitter
from mpformer.data import pipeline
from mpformer.data.catalog import open_split
from mpformer.data.pipeline import train_batches
from mpformer.data.samples import sample_order
from mpformer.types import InputError
from tests.data.folders import coco_folder
from tests.data.test_pipeline import break_image, digests, joined, stream

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("two_cpu_ray")]


def with_ray(data):
    return data.model_copy(update={"loader": "ray"})


def test_ray_prints_no_lines_of_its_own(tmp_path, caplog):
    """Such as its plan of execution, or that progress bars are disabled, which it says once in a process."""
    from ray.util import debug

    debug.reset_log_once("ray_data_progress_manager_disabled")
    with caplog.at_level("INFO"):
        data = coco_folder(tmp_path, images=3)
        stream(with_ray(data), open_split(data, "train"), stop=1)
    assert [r.message for r in caplog.records if r.name.startswith("ray")] == []


def test_the_same_batches_over_several_executions(tmp_path, monkeypatch):
    """Two epochs and a bit, cut into many blocks and executions, from the start and from the middle."""
    data = coco_folder(tmp_path, images=11)
    catalog = open_split(data, "train")
    expected = stream(data, catalog, stop=7)
    monkeypatch.setattr(pipeline, "_BLOCK_BYTES", 5 * 3 * 64 * 96)
    monkeypatch.setattr(pipeline, "_EXECUTION_BLOCKS", 2)
    assert stream(with_ray(data), catalog, stop=7) == expected
    assert stream(with_ray(data), catalog, start=5, stop=7) == expected[5:]


def test_a_run_is_one_execution_that_rests_and_stays_within_its_memory(tmp_path, monkeypatch):
    """A consumer that stands still: few samples wait for it, and the executor pauses at each of its steps."""
    data = coco_folder(tmp_path, images=11).model_copy(update={"augment": LargeScaleJitter(size=(256, 256))})
    catalog = open_split(data, "train")
    monkeypatch.setattr(pipeline, "_BLOCK_BYTES", 4 * 3 * 256 * 256)
    monkeypatch.setattr(pipeline, "_AHEAD_BYTES", 8 << 20)
    made, rests = [], []
    monkeypatch.setattr(pipeline, "_dataset", counted(pipeline._dataset, made))
    monkeypatch.setattr(pipeline.time, "sleep", counted(time.sleep, rests))
    batches = train_batches(with_ray(data), catalog, seed=5, batch_size=4, steps=range(200), rank=0, world=1)
    for _ in range(2):
        next(batches)
    time.sleep(3)  # whatever can be made ahead is made
    held = get_memory_info_reply(
        get_state_from_address(ray.get_runtime_context().gcs_address)
    ).store_stats.object_store_bytes_used
    assert held < 60 << 20, "the samples of all steps are 157 MB"
    assert rests
    assert len(list(batches)) == 198
    assert len(made) == 1


def counted(function, calls):
    def call(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return call


@pytest.mark.parametrize("loader", ["ray", "torch"])
def test_any_loader_and_any_number_of_workers_over_two_epochs(tmp_path, loader):
    """Worlds of 1, 2 and 4 against the in-process loader: 11 images twice, in batches of 4."""
    data = coco_folder(tmp_path, images=11)
    catalog = open_split(data, "train")
    expected = stream(data, catalog, stop=6)
    other = data.model_copy(update={"loader": loader, "loader_processes": 1})
    for world in (1, 2, 4):
        shares = [stream(other, catalog, stop=6, rank=r, world=world) for r in range(world)]
        assert joined(shares) == expected, world


def test_an_interruption_at_any_step_with_another_number_of_workers_afterwards(tmp_path):
    data = coco_folder(tmp_path, images=11)
    catalog = open_split(data, "train")
    expected = stream(data, catalog, stop=6)
    for step, before, after in ((1, 1, 2), (2, 2, 1), (3, 2, 4), (4, 4, 2), (5, 4, 1)):
        first = [stream(with_ray(data), catalog, stop=step, rank=r, world=before) for r in range(before)]
        rest = [stream(with_ray(data), catalog, step, 6, rank=r, world=after) for r in range(after)]
        assert joined(first) + joined(rest) == expected, step


def test_three_ranks_that_wait_for_each_other(tmp_path):
    """As in training: each takes its next batch when all have theirs. Three streams share two CPUs."""
    data = coco_folder(tmp_path, images=11).model_copy(update={"augment": LargeScaleJitter(size=(32, 32))})
    catalog = open_split(data, "train")
    expected = stream(data, catalog, stop=40)
    barrier = threading.Barrier(3, timeout=60)
    shares = [[] for _ in range(3)]

    def worker(rank):
        batches = train_batches(
            with_ray(data), catalog, seed=5, batch_size=4, steps=range(40), rank=rank, world=3
        )
        for batch in batches:
            shares[rank].append(digests(batch))
            barrier.wait()

    threads = [threading.Thread(target=worker, args=(r,)) for r in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    assert joined(shares) == expected


def test_a_bad_sample_is_an_error_at_its_step(tmp_path):
    data = coco_folder(tmp_path, images=8)
    catalog = open_split(data, "train")
    break_image(tmp_path, 3)
    bad_step = sample_order(5, 0, 8).tolist().index(2) // 2
    batches = train_batches(with_ray(data), catalog, seed=5, batch_size=2, steps=range(4), rank=0, world=1)
    for _ in range(bad_step):
        next(batches)
    with pytest.raises(InputError, match=r"images/3\.png: not an image"):
        next(batches)


def test_bad_samples_are_skipped_alike(tmp_path):
    data = coco_folder(tmp_path, images=8).model_copy(update={"on_bad_sample": "skip"})
    catalog = open_split(data, "train")
    break_image(tmp_path, 3)
    assert stream(with_ray(data), catalog, stop=8, batch_size=2) == stream(
        data, catalog, stop=8, batch_size=2
    )
