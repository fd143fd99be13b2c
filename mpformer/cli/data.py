"""What each `mpformer data` command does. Heavy parts are imported where they are used."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mpformer import shell
from mpformer.cli.found import config_at, is_data
from mpformer.cli.output import say
from mpformer.config import Config, Data, LabelMaps, load_config
from mpformer.config.identity import dump_data_set
from mpformer.config.yamlfile import nearest, quoted
from mpformer.types import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mpformer.types import Batch, ClassTable

_SIDE = 512
"""Pixels of the longer side of an image on the sheet of `data check`."""


def data_synth(out: str, settings: Sequence[str]) -> None:
    """Generate a data set; `settings`: train=, val= (images), seed=, size= (pixels), things= (per image)."""
    from mpformer.data.synthetic import generate

    chosen = {"train": 400, "val": 60, "seed": 0, "size": 128, "things": 5}
    for text in settings:
        key, _, value = text.partition("=")
        if key not in chosen:
            raise InputError(f"setting '{text}': no such setting here; nearest: {nearest(key, chosen)}")
        if not value.isdecimal():
            raise InputError(f"setting '{text}': a whole number is expected")
        chosen[key] = int(value)
    images = {split: chosen.pop(split) for split in ("train", "val")}
    fresh = generate(Path(out), images, **chosen)
    say(
        f"{out}: {images['train']} training and {images['val']} validation images"
        + ("" if fresh else ", as it was")
    )


def data_check(place: str, fix: str | None, out: str | None, settings: Sequence[str]) -> None:
    """What a data set holds and what is wrong with it, in words and as a picture; how to train on it.

    `fix`: a folder for mended copies of COCO annotations, which are then checked in their place; `out`: that
    of what is written, by default one in `storage`. Raises `InputError` after all that where training would
    end with an error.
    """
    from mpformer.data.check import check, obstacle, report_text, training_command
    from mpformer.data.fix import mend

    config = config_at(place, settings)
    data = config.data
    if fix is not None:
        mended = mend(data, Path(fix))
        for line in mended.lines:
            say(line)
        say("")
        data, settings = mended.data, [*settings, *mended.settings]
    reports = check(data)
    say(report_text(reports))
    folder = Path(out) if out else Path(config.storage) / "data-check" / Path(data.dataset.name).name
    if any(report.usable for report in reports.values()):
        _write_sheet(folder, data, "train" if reports["train"].usable else "val")
    own_file = any(text.partition("=")[0] == "data.dataset" for text in settings)
    dataset = None
    if is_data(place) and isinstance(data.dataset, LabelMaps) and not own_file:
        dataset = _write_data_set(folder, data.dataset)
    if is_data(place):
        command = training_command(data, f"laptop-{data.task}", settings, dataset)
    else:
        command = shell.command("train", Path(place), *settings)
    if (found := obstacle(reports, data.on_bad_sample)) is not None:
        raise InputError(f"{place}: {found}")
    say(f"train on it: {command}")


def _write_sheet(folder: Path, data: Data, split: str) -> None:
    """Some images of a split with their masks, in a picture that a screen shows."""
    from mpformer.data.catalog import open_split
    from mpformer.data.pictures import catalog_sheet
    from mpformer.draw import attempted, encode_jpeg

    lenient = data.model_copy(update={"on_bad_sample": "skip"})
    path = folder / "samples.jpg"
    made = attempted(lambda: encode_jpeg(catalog_sheet(open_split(lenient, split), side=_SIDE)), str(path))
    if made is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made)
        say(f"\n16 samples of {split} with their masks: {path}")


def _write_data_set(folder: Path, found: LabelMaps) -> Path:
    """The data-set file of label maps, whose classes are to be named; one that is there for the same maps is
    left as it is."""
    name = Path(found.name).name
    for number in itertools.count(1):
        path = folder / (f"{name}.yaml" if number == 1 else f"{name}-{number}.yaml")
        if not path.exists():
            break
        if _is_of(path, found):
            say(f"the classes of the label maps are named in {path}, which was there")
            return path
    folder.mkdir(parents=True, exist_ok=True)
    text = "# found by `mpformer data check`; give the classes their names here\n"
    path.write_text(text + dump_data_set(found), encoding="utf-8")
    say(f"name the classes in {path}")
    return path


def _is_of(path: Path, found: LabelMaps) -> bool:
    """Whether a data-set file is of the same folders, and knows every value of their maps."""
    there = load_config("laptop-semantic", [f"data.dataset={path}"]).data.dataset
    parts = ("train", "val", "image_suffix", "label_suffix", "encoding")
    if not isinstance(there, LabelMaps) or any(getattr(there, p) != getattr(found, p) for p in parts):
        return False
    known = {c.id for c in there.classes}
    return there.ignore == "others" or {c.id for c in found.classes} <= known | set(there.ignore)


def data_convert(source: str, out: str, settings: Sequence[str]) -> None:
    """Another tool's data set as COCO instance annotations; what was left out or looks odd, with counts."""
    from mpformer.data.convert.conversion import REPORT, convert

    done = convert(Path(source), Path(out), settings)
    for line in done.lines(most=3):
        say(line)
    say(f"all of this, with every place: {Path(out) / REPORT}")
    say(f"next: {shell.command('data', 'check', Path(out))}")


def data_pack(place: str, out: str, settings: Sequence[str]) -> None:
    """Both splits as Parquet shards; the same command again finishes what was interrupted."""
    from mpformer.data.pack import pack

    counts = pack(config_at(place, settings).data, out)
    say(f"{out}: {counts['train']} training and {counts['val']} validation images")
    say(f"in a recipe: data: {{root: {quoted(out)}, dataset: {{format: packed}}}}")


def data_show(place: str, out: str, settings: Sequence[str]) -> None:
    """Pictures of both splits with their masks, of the first training samples as the model gets them, and of
    noised pilots beside their ground truth (Figure 3 of MP-Former)."""
    from mpformer.data.catalog import open_split
    from mpformer.data.pictures import batch_pictures, catalog_sheet
    from mpformer.data.pipeline import train_batches
    from mpformer.draw import side_by_side, write_png

    config = config_at(place, settings)
    splits = {name: open_split(config.data, name) for name in ("train", "val")}
    sheets = {name: catalog_sheet(split) for name, split in splits.items()}
    inline = config.data.model_copy(update={"loader": "inline"})
    [packed] = train_batches(inline, splits["train"], seed=0, batch_size=8, steps=range(1), rank=0, world=1)
    batch = packed.to("cpu")
    samples = batch_pictures(batch, splits["train"].classes)
    sheets["samples"] = side_by_side(samples, batch.image_ids, columns=4)
    if (pilots := _pilot_sheet(batch, config, splits["train"].classes)) is not None:
        sheets["pilots"] = pilots
    for name, sheet in sheets.items():
        write_png(Path(out) / f"{name}.png", sheet)
        say(f"{Path(out) / name}.png")


def _pilot_sheet(batch: Batch, config: Config, classes: ClassTable) -> np.ndarray | None:
    """One object of each sample: its ground truth in red, and in blue its pilot as the layers get it.

    None where nothing is piloted: `model.pilot.queries` is 0, or no sample has an object.
    """
    import torch

    from mpformer.data.pictures import pilot_sheet
    from mpformer.model.architecture import build_model
    from mpformer.model.objects import objects_of
    from mpformer.model.piloting import make_pilots, plan_pilots
    from mpformer.model.streams import SampleRandom

    targets, objects = batch.targets, objects_of(batch)
    draws = SampleRandom(0, batch.positions, batch.images.device)
    with torch.device("meta"):  # only its structure is needed
        model = build_model(config.model.without_pretrained(), classes)
    plan = plan_pilots(objects, config.model.pilot, draws)
    if plan is None:
        return None
    pilots = make_pilots(plan, objects, config.model.pilot, model.structure, draws)
    layers = {i: m.numpy() for i, m in enumerate(pilots.attention_masks, 1) if m is not None}
    slots = {
        b: int(_preference(target.masks)[pilots.objects[b, :count]].argmax())
        for b, (target, count) in enumerate(zip(targets, pilots.counts))
        if count
    }
    return pilot_sheet(batch, classes, slots, pilots.objects.numpy(), pilots.labels.numpy(), layers)


def _preference(masks: torch.Tensor) -> torch.Tensor:
    """Objects [N] by how much they show: large ones first, but last those that cover half of the image."""
    areas = masks.flatten(1).sum(1)
    return areas.where(areas <= masks[0].numel() / 2, -areas)


def data_bench(place: str, settings: Sequence[str]) -> None:
    """Milliseconds and megabytes of each stage from file to batch, and what the loader delivers."""
    config = config_at(place, settings)
    if with_ray := config.data.loader == "ray":
        from mpformer.train.launch import start_ray  # sets what Ray prints, before ray is imported
    from mpformer.data.bench import bench_text, stages, throughput
    from mpformer.data.catalog import open_split

    split, batch = open_split(config.data, "train"), config.train.batch_size
    say(f"{split.name}: each stage by itself, on one core")
    found = stages(config.data, split, images=4 * batch)
    if with_ray:
        say("starting Ray, which takes some seconds")
        start_ray()
    say(f"32 batches of {batch} through the {config.data.loader} loader")
    through = throughput(config.data, split, batch, steps=32)
    say(f"{split.name}: {len(split)} images, {config.data.task}, one core; then batches of {batch}")
    say(bench_text(found, config.data.loader, through))
