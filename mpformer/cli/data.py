"""What each `mpformer data` command does. Heavy parts are imported where they are used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpformer import shell
from mpformer.cli.output import say
from mpformer.config import Config, build_config, inline_dataset, load_config
from mpformer.config.yamlfile import Source, nearest, quoted
from mpformer.types import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mpformer.types import Batch, ClassTable


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


def data_check(place: str, fix: str | None, settings: Sequence[str]) -> None:
    """What a data set holds and what is wrong with it, in words and as a picture; how to train on it.

    `fix`: a folder for mended copies of COCO annotations, which are then checked in their place.
    Raises `InputError` after all that where training would end with an error.
    """
    from mpformer.data.catalog import open_split
    from mpformer.data.check import check, obstacle, report_text, training_command
    from mpformer.data.fix import mend
    from mpformer.data.pictures import catalog_sheet
    from mpformer.draw import attempted, encode_png

    data = _config_at(place, settings).data
    if fix is not None:
        mended = mend(data, Path(fix))
        for line in mended.lines:
            say(line)
        say("")
        data, settings = mended.data, [*settings, *mended.settings]
    reports = check(data)
    say(report_text(reports))
    lenient = data.model_copy(update={"on_bad_sample": "skip"})
    if any(report.usable for report in reports.values()):
        sheet = Path(f"{data.dataset.name}-samples.png")
        shown = "train" if reports["train"].usable else "val"
        png = attempted(lambda: encode_png(catalog_sheet(open_split(lenient, shown), count=16)), str(sheet))
        if png is not None:
            sheet.write_bytes(png)
            say(f"\n16 samples of {shown} with their masks: {sheet}")
    if _is_data(place):
        command = training_command(data, "coco-tiny", settings)
    else:
        command = shell.command("train", Path(place), *settings)
    if (found := obstacle(reports, data.on_bad_sample)) is not None:
        raise InputError(f"{place}: {found}")
    say(f"train on it: {command}")


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

    counts = pack(_config_at(place, settings).data, out)
    say(f"{out}: {counts['train']} training and {counts['val']} validation images")
    say(f"in a recipe: data: {{root: {quoted(out)}, dataset: {{format: packed}}}}")


def data_show(place: str, out: str, settings: Sequence[str]) -> None:
    """Pictures of both splits with their masks, of the first training samples as the model gets them, and of
    noised pilots beside their ground truth (Figure 3 of MP-Former)."""
    from mpformer.data.catalog import open_split
    from mpformer.data.pictures import batch_pictures, catalog_sheet
    from mpformer.data.pipeline import train_batches
    from mpformer.draw import side_by_side, write_png

    config = _config_at(place, settings)
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
    from mpformer.data.bench import bench_text, stages, throughput
    from mpformer.data.catalog import open_split

    config = _config_at(place, settings)
    split, batch = open_split(config.data, "train"), config.train.batch_size
    found = stages(config.data, split, images=4 * batch)
    if config.data.loader == "ray":
        from mpformer.train.launch import start_ray

        start_ray()
    through = throughput(config.data, split, batch, steps=32)
    say(f"{split.name}: {len(split)} images, {config.data.task}, one core; then batches of {batch}")
    say(bench_text(found, config.data.loader, through))


def _is_data(place: str) -> bool:
    """Whether it is a folder or a bucket, not a recipe."""
    return Path(place).is_dir() or "://" in place


def _config_at(place: str, settings: Sequence[str]) -> Config:
    """The settings of a recipe, or for a folder those of the data found in it and defaults otherwise."""
    if place.endswith(".json"):
        raise InputError(
            f"{place}: the folder that holds the data is expected, or a recipe, not a JSON of it"
        )
    if not _is_data(place):
        return load_config(place, settings)
    root = f"./{place}" if place.startswith("~") else place  # of a setting, ~ is the home folder
    found = {"root": root, **_detected(place, settings)}
    source = Source(Path(place), {"data": found}, {})
    return build_config(inline_dataset(source.overridden(settings), Path()))


def _detected(place: str, settings: Sequence[str]) -> dict[str, Any]:
    """Task and data set as they are found in a folder, around those `settings` that choose parts of them.

    Nothing is looked for where they name a whole data set, or one of another form than COCO's.
    """
    from mpformer.data.detect import detect

    data = Source(Path(place), {}, {}).overridden(settings).as_written().get("data")
    given = data.get("dataset", {}) if isinstance(data, dict) else {}
    if not isinstance(given, dict) or given.get("format") not in (None, "coco_instance", "coco_panoptic"):
        return {"task": "instance"}
    found = detect(place, given)
    for note in found.notes:
        say(note)
    task = "panoptic" if found.dataset.format == "coco_panoptic" else "instance"
    return {"task": task, "dataset": found.dataset.model_dump()}
