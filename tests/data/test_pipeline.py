"""The sample stream: the same global batches whoever makes them, wherever they begin, whatever is broken."""

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch

from mpformer.config import Data, LargeScaleJitter, ShortEdgeJitter, ShortestEdge
from mpformer.data.catalog import open_split
from mpformer.data.collate import collate
from mpformer.data.images import PAD_COLOR
from mpformer.data.packing import from_table, to_table
from mpformer.data.pipeline import rank_positions, train_batches
from mpformer.data.samples import make_sample, sample_order
from mpformer.types import InputError
from tests.data.folders import annotation, coco_folder
from tests.data.test_coco import panoptic_folder


def digests(batch):
    """One hash per sample of everything that the model is given."""
    found = []
    for i in range(len(batch)):
        target = batch.targets[i]
        parts = (batch.images[i], target.labels, target.masks, torch.tensor(batch.valid_sizes[i]))
        text = f"{batch.image_ids[i]} {batch.positions[i]}"
        content = text.encode() + b"".join(p.contiguous().numpy().tobytes() for p in parts)
        found.append(hashlib.sha256(content).hexdigest())
    return found


def stream(data, catalog, start=0, stop=9, batch_size=4, rank=0, world=1, seed=5):
    batches = train_batches(
        data,
        catalog,
        seed=seed,
        batch_size=batch_size,
        steps=range(start, stop),
        rank=rank,
        world=world,
    )
    return [digests(b) for b in batches]


def joined(shares):
    """Global batches from the lists of each rank."""
    return [[sample for share in step for sample in share] for step in zip(*shares, strict=True)]


@pytest.fixture
def real(sample_data):
    return Data(
        root=str(sample_data / "tiny_coco"), augment=LargeScaleJitter(size=(128, 160)), loader="inline"
    )


@pytest.mark.parametrize("world", [2, 3, 4, 7])
def test_any_number_of_workers_sees_the_same_global_batches(real, world):
    """Two epochs of 37 images in batches of 6."""
    catalog = open_split(real, "train")
    whole = stream(real, catalog, stop=13, batch_size=6)
    shares = [stream(real, catalog, stop=13, batch_size=6, rank=r, world=world) for r in range(world)]
    assert joined(shares) == whole
    assert len({s for step in whole for s in step}) == 78


def test_going_on_at_any_step_with_another_number_of_workers(real):
    catalog = open_split(real, "train")
    whole = stream(real, catalog)
    for start in (1, 4, 8):
        assert stream(real, catalog, start=start) == whole[start:]
        shares = [stream(real, catalog, start=start, rank=r, world=3) for r in range(3)]
        assert joined(shares) == whole[start:]


def test_seeds_and_epochs_differ(real):
    catalog = open_split(real, "train")
    assert stream(real, catalog, stop=1, seed=6) != stream(real, catalog, stop=1, seed=5)
    n = len(catalog)
    places = {p: make_sample(catalog, real, 5, p) for p in (*range(n), *range(n, 2 * n))}
    by_image = {}
    for position, sample in places.items():
        by_image.setdefault(sample.image_id, []).append((position, sample))
    assert all(len(pair) == 2 and pair[0][0] < n <= pair[1][0] for pair in by_image.values())
    same = sum(np.array_equal(a.image, b.image) for (_, a), (_, b) in by_image.values())
    assert same == 0


def test_each_epoch_is_another_permutation():
    orders = [sample_order(3, epoch, 50) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(50))
    assert len({tuple(o.tolist()) for o in orders}) == 3
    first = Counter(int(sample_order(seed, 0, 5)[0]) for seed in range(1000))
    assert min(first.values()) > 150


def test_slices_of_a_batch_cover_it_once():
    for batch_size in (1, 5, 16):
        for world in (1, 2, 3, 16, 20):
            parts = [rank_positions(7, batch_size, r, world) for r in range(world)]
            assert [p for part in parts for p in part] == list(range(7 * batch_size, 8 * batch_size))


def test_a_worker_without_a_share_gets_empty_batches(tmp_path):
    data = coco_folder(tmp_path)
    (batch,) = train_batches(
        data, open_split(data, "train"), seed=0, batch_size=1, steps=range(1), rank=0, world=2
    )
    assert (len(batch), tuple(batch.images.shape)) == (0, (0, 3, 64, 96))


def test_a_batch_is_what_the_model_takes(tmp_path):
    data = coco_folder(tmp_path, [annotation(11, 1), annotation(12, 1, category_id=7), annotation(13, 2)])
    catalog = open_split(data, "train")
    (batch,) = train_batches(data, catalog, seed=0, batch_size=4, steps=range(3, 4), rank=0, world=1)
    assert batch.images.dtype == torch.uint8
    assert tuple(batch.images.shape) == (4, 3, 64, 96)
    assert batch.positions == (12, 13, 14, 15)
    counts = {"1": 2, "2": 1, "3": 0, "4": 0}
    moved = batch.to("cpu")
    assert all(torch.equal(a.masks, b.masks) for a, b in zip(batch.targets, moved.targets))
    for image, target, (h, w), name in zip(batch.images, moved.targets, batch.valid_sizes, batch.image_ids):
        assert target.masks.dtype == torch.bool
        assert target.labels.dtype == torch.int64
        assert tuple(target.masks.shape) == (len(target.labels), 64, 96)
        assert len(target.labels) <= counts[name]
        assert target.masks.flatten(1).any(1).all()
        for plane, mean in zip(image, PAD_COLOR):
            assert (plane[h:] == mean).all()
            assert (plane[:, w:] == mean).all()
        assert not target.masks[:, h:].any()
        assert not target.masks[:, :, w:].any()
    assert sorted(batch.image_ids) == ["1", "2", "3", "4"]


def test_samples_survive_their_arrow_form(real):
    catalog = open_split(real, "train")
    samples = [make_sample(catalog, real, 0, p) for p in range(8)]
    back = from_table(to_table(samples))
    assert digests(collate(back, (128, 160))) == digests(collate(samples, (128, 160)))
    error = InputError("a.jpg: broken")
    with pytest.raises(InputError, match=r"a\.jpg: broken"):
        from_table(to_table([samples[0], (9, error)]))


def shortest_edge(data):
    config = ShortestEdge(shorts=(32, 48, 70), long=100, crop=0.5, crop_shorts=(40, 60), crop_size=(30, 50))
    return data.model_copy(update={"augment": config})


def test_a_global_batch_has_one_size_for_all_ranks(real):
    """Without a fixed size the samples of all ranks decide, and no padding is left over."""
    data = shortest_edge(real)
    catalog = open_split(data, "train")
    whole = stream(data, catalog, stop=7, batch_size=6)
    shares = [stream(data, catalog, stop=7, batch_size=6, rank=r, world=4) for r in range(4)]
    assert joined(shares) == whole
    shapes = set()
    for batch in train_batches(data, catalog, seed=5, batch_size=6, steps=range(7), rank=0, world=1):
        height, width = batch.images.shape[2:]
        shapes.add((height, width))
        largest = [max(side) for side in zip(*batch.valid_sizes)]
        assert [height % 32, width % 32] == [0, 0]
        assert height - largest[0] < 32
        assert width - largest[1] < 32
    assert len(shapes) > 1


def test_a_replacement_fits_into_the_batch_that_was_planned(tmp_path):
    data = shortest_edge(coco_folder(tmp_path, images=8)).model_copy(update={"on_bad_sample": "skip"})
    catalog = open_split(data, "train")
    whole = stream(data, catalog, stop=40, batch_size=2)
    break_image(tmp_path, 3)
    broken = stream(data, catalog, stop=40, batch_size=2)
    orders = [sample_order(5, epoch, 8).tolist().index(2) + 8 * epoch for epoch in range(10)]
    flat, other = [s for b in whole for s in b], [s for b in broken for s in b]
    assert [i for i, (a, b) in enumerate(zip(flat, other)) if a != b] == orders


def test_crops_of_one_class_alone_are_drawn_anew(tmp_path):
    """The left half is one class, the right another: with the rule, most crops hold both."""
    half = np.zeros((40, 60, 3), np.uint8)
    half[:, :30, 2], half[:, 30:, 2] = 5, 6
    segments = [{"id": 5, "category_id": 3}, {"id": 6, "category_id": 7}]
    data = panoptic_folder(tmp_path, segments, half, task="semantic")
    shares = {}
    for limit in (1.0, 0.75):
        config = ShortEdgeJitter(
            size=(32, 32), short=80, scale=(1.0, 1.0), max_category_area=limit, colors=False
        )
        changed = data.model_copy(update={"augment": config})
        catalog = open_split(changed, "train")
        samples = [make_sample(catalog, changed, 0, p) for p in range(150)]
        shares[limit] = np.mean([len(s.labels) == 2 for s in samples])
    assert shares[1.0] < 0.6
    assert shares[0.75] > 0.75


def break_image(root, number):
    (root / "images" / f"{number}.png").write_bytes(b"broken")


def test_a_bad_sample_is_an_error_at_its_step(tmp_path):
    data = coco_folder(tmp_path, images=8)
    catalog = open_split(data, "train")
    break_image(tmp_path, 3)
    bad_step = sample_order(5, 0, 8).tolist().index(2) // 2
    batches = train_batches(data, catalog, seed=5, batch_size=2, steps=range(4), rank=0, world=1)
    for _ in range(bad_step):
        next(batches)
    with pytest.raises(InputError, match=r"images/3\.png: not an image"):
        next(batches)


def test_a_skipped_sample_never_shifts_the_others(tmp_path):
    data = coco_folder(tmp_path, images=8).model_copy(update={"on_bad_sample": "skip"})
    catalog = open_split(data, "train")
    whole = stream(data, catalog, stop=8, batch_size=2)
    break_image(tmp_path, 3)
    orders = [sample_order(5, epoch, 8).tolist().index(2) + 8 * epoch for epoch in range(2)]
    broken = stream(data, catalog, stop=8, batch_size=2)
    flat, other = [s for b in whole for s in b], [s for b in broken for s in b]
    assert [i for i, (a, b) in enumerate(zip(flat, other)) if a != b] == orders
    assert stream(data, catalog, stop=8, batch_size=2) == broken
    batches = train_batches(data, catalog, seed=5, batch_size=2, steps=range(8), rank=0, world=1)
    skipped = [(p, line) for b in batches for line in b.skipped for p in b.positions if p in orders]
    assert [p for p, _ in skipped] == orders
    assert all("images/3.png: not an image" in line for _, line in skipped)


def test_a_bad_annotation_is_skipped_alike(tmp_path):
    data = coco_folder(
        tmp_path, [annotation(11, 1, segmentation=[[1, 2, 3, 4]]), annotation(12, 2)], images=2
    )
    data = data.model_copy(update={"on_bad_sample": "skip"})
    catalog = open_split(data, "train")
    (batch,) = train_batches(data, catalog, seed=0, batch_size=2, steps=range(1), rank=0, world=1)
    assert batch.image_ids == ("2", "2")
    assert len(batch.skipped) == 1
    assert "annotation 11 (image 1): polygon 1 has 2 points" in batch.skipped[0]


def test_a_data_set_of_bad_samples_alone_is_an_error(tmp_path):
    data = coco_folder(tmp_path, images=2).model_copy(update={"on_bad_sample": "skip"})
    catalog = open_split(data, "train")
    break_image(tmp_path, 1)
    break_image(tmp_path, 2)
    with pytest.raises(InputError, match="small train: 100 bad samples in a row at position 0"):
        stream(data, catalog)


@pytest.mark.slow
def test_torch_loader_gives_the_same_batches(tmp_path):
    """Over two epochs, from the middle, for a rank of several, with a sample that is skipped."""
    data = coco_folder(tmp_path, images=8).model_copy(update={"on_bad_sample": "skip"})
    catalog = open_split(data, "train")
    break_image(tmp_path, 3)
    for_torch = data.model_copy(update={"loader": "torch", "loader_processes": 1})
    expected = stream(data, catalog, start=1, stop=5, rank=1, world=2)
    assert stream(for_torch, catalog, start=1, stop=5, rank=1, world=2) == expected
    strict = for_torch.model_copy(update={"on_bad_sample": "error"})
    with pytest.raises(InputError, match=r"images/3\.png: not an image"):
        stream(strict, catalog)
