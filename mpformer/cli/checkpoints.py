"""Commands on checkpoints: evaluate, diagnose, predict. Heavy parts are imported where they are used."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mpformer.cli.found import data_set_for, root_setting
from mpformer.cli.output import say
from mpformer.config import Config, build_config, inline_dataset, read_recipe
from mpformer.config.yamlfile import Source
from mpformer.model.weights.catalogue import named_weights
from mpformer.model.weights.named import is_remote, require_reachable
from mpformer.tracking.progress import duration_text
from mpformer.tracking.run_dir import RunDir, step_of
from mpformer.types import InputError

if TYPE_CHECKING:
    import torch

    from mpformer.data.records import Catalog
    from mpformer.evaluate.file_results import FileResult, ImageFile
    from mpformer.model.architecture import Architecture


def evaluate(checkpoint: str, data: str | None, settings: Sequence[str]) -> None:
    """The figures of a checkpoint on the validation split of its own data, or of `data`; their page."""
    require_reachable(checkpoint)
    from mpformer.draw import attempted
    from mpformer.evaluate import evaluation
    from mpformer.evaluate.metrics import unmeasured
    from mpformer.evaluate.pages import write_page

    origin = _origin(checkpoint)
    model, split, config, device = open_checkpoint(origin.file, data, settings)
    changed, where = _tell_changed_data(origin, config), _place_of_other_data(origin, config)
    if config.cluster.workers > 1:
        from mpformer.train.launch import start_ray

        start_ray([config])
    found, usage = evaluation.evaluate(model, split, config, device=device, report=_progress())
    for key, value in {**found.scores.summary, **found.losses, **found.layers}.items():
        say(f"{key:24} {value:8.2f}")
    for key, reason in unmeasured(config.data.task, found.scores.summary).items():
        say(f"{key:24} not measured: {reason}")
    for key, value in _published_figures(checkpoint).items():
        say(f"{'published ' + key:24} {value:8.2f}")
    for key, text in usage.facts().items():
        say(f"{key:24} {text:>8}")
    if config.evaluate.pictures:
        folder = origin.pictures("evaluate", split.name, where, bool(changed))
        title, count = f"{checkpoint}: {split.name}", config.evaluate.pictures
        facts = usage.facts() | {name: f"{value:.1f}" for name, value in found.layers.items()}
        if changed:
            title, facts = f"{title}, changed since the run began", facts | {"changed": changed}
        files = attempted(lambda: write_page(folder, title, found, count=count, facts=facts), str(folder))
        if files is not None:
            say(str(files[0]))
            _attach(origin, {}, folder)


def diagnose(checkpoint: str, data: str | None, settings: Sequence[str]) -> None:
    """The decoder's layers (Table 1 of MP-Former) and pictures of queries over the layers (Figure 1)."""
    require_reachable(checkpoint)
    from mpformer.draw import attempted, write_png
    from mpformer.evaluate import diagnostics
    from mpformer.evaluate.pages import file_stem

    origin = _origin(checkpoint)
    model, split, config, device = open_checkpoint(origin.file, data, settings)
    changed, where = _tell_changed_data(origin, config), _place_of_other_data(origin, config)
    chosen = range(len(split.records))[: config.evaluate.limit]
    report = _progress()
    found = diagnostics.diagnose(model, split, config, chosen, device, report=report)
    say(found.table())
    folder = origin.pictures("diagnose", split.name, where, bool(changed))
    folder.mkdir(parents=True, exist_ok=True)
    content = {"images": found.images, **found.metrics()} | ({"changed_data": changed} if changed else {})
    (folder / "layers.json").write_text(json.dumps(content, indent=1))
    say(str(folder / "layers.json"))
    for index in chosen[: config.evaluate.pictures]:
        record = split.records[index]
        drawn = partial(diagnostics.draw_layers, model, record, config, device)
        picture = None if record.problem else attempted(drawn, f"layers of image {record.image_id}")
        if picture is not None:
            path = folder / f"layers-{file_stem(record.image_id)}.png"
            write_png(path, picture)
            say(str(path))
    # figures of other data, or of the average, would pass for the run's own
    own = data is None and not changed and not origin.averaged
    _attach(origin, {f"diag/{k}": v for k, v in found.metrics().items()} if own else {}, folder)


def predict(
    checkpoint: str, images: Sequence[str], out: str, score: float | None, settings: Sequence[str]
) -> None:
    """Segment image files, or all images of folders, into overlays and COCO-style JSON.

    `score`: the least score of a segment, by default 0.5 for instances. On a cluster, if one is given.
    """
    require_reachable(checkpoint)
    from mpformer.evaluate.files import predict_files
    from mpformer.model.weights.loading import load_checkpoint

    model, trained = load_checkpoint(chosen_file(checkpoint), _inference_device())
    config = _with_least_score(_for_evaluation(trained, checkpoint, None, settings), score, settings)

    def on_cluster(files: Sequence[ImageFile]) -> Iterable[FileResult]:
        from mpformer.evaluate.batch_job import predict_on_cluster
        from mpformer.train.launch import start_ray

        start_ray([config])
        return predict_on_cluster(model, files, config)

    shared = config.cluster.workers > 1 or "RAY_ADDRESS" in os.environ
    pictures = predict_files(model, images, out, config, predict=on_cluster if shared else None, report=say)
    say(f"{len(pictures)} pictures and predictions.json in {out}")


_INSTANCE_SCORE = 0.5
"""Least score of an instance that `predict` keeps, where nothing else is asked for."""


def _with_least_score(config: Config, score: float | None, settings: Sequence[str]) -> Config:
    """The settings with `--score` as the threshold of their task, and a default for instances."""
    task, options = config.data.task, config.evaluate
    if task == "semantic":
        if score is not None:
            raise InputError("--score: the segments of a semantic task have no score; leave it out")
        return config
    key = {"instance": "score_threshold", "panoptic": "class_confidence"}[task]
    if score is None:
        named = any(text.partition("=")[0] == f"evaluate.{key}" for text in settings)
        if task == "panoptic" or options.score_threshold or named:
            return config
        score = _INSTANCE_SCORE
    return config.model_copy(update={"evaluate": options.model_copy(update={key: score})})


def open_checkpoint(
    file: Path, data: str | None, settings: Sequence[str]
) -> tuple[Architecture, Catalog, Config, torch.device]:
    """Model, validation split, settings and device to evaluate a checkpoint with."""
    from mpformer.data.catalog import check_same_classes, open_split, takes_classes_of
    from mpformer.model.weights.loading import load_checkpoint

    device = _inference_device()
    model, trained = load_checkpoint(file, device)
    config = _for_evaluation(trained, str(file), data, settings)
    split = open_split(config.data, "val")
    if takes_classes_of(model.classes, split.classes):
        model.classes = split.classes
        say(f"classes: those of {split.name}, in their order; the weights tell no ids of theirs")
    check_same_classes(model.classes, split.classes, split.name)
    images = min(len(split.records), config.evaluate.limit or len(split.records))
    say(f"{file}: {images} images of {split.name} on {device}")
    return model, split, config, device


def _tell_changed_data(origin: _Origin, config: Config) -> str:
    """What has changed in the validation split of the checkpoint's run since it began, and print it.

    Empty for nothing, for other data than the run's, and outside of a run.
    """
    from mpformer.data.version import DataVersion
    from mpformer.model.weights.loading import read_metadata
    from mpformer.train.rundata import changed_data

    if origin.run is None or _place_of_other_data(origin, config):
        return ""
    asked, own = config.data, read_metadata(origin.file)[0].data
    if (asked.dataset, asked.task) != (own.dataset, own.task):
        return ""
    changed = changed_data(origin.run, DataVersion(asked), ["val"])
    if changed:
        say(
            f"the data have changed since {origin.run.name} began: {changed}; "
            "the figures are of the changed data"
        )
    return changed


def _place_of_other_data(origin: _Origin, config: Config) -> str:
    """What tells data in another folder than that of the checkpoint's own from them; empty for its own."""
    from mpformer.model.weights.loading import read_metadata

    asked, own = (
        Path(os.path.expanduser(data.root)).resolve()
        for data in (config.data, read_metadata(origin.file)[0].data)
    )
    if asked == own:
        return ""
    name = os.fsencode(asked.name)[-_NAME_BYTES:].decode(errors="ignore")
    return f"in-{name}-{hashlib.sha256(os.fsencode(asked)).hexdigest()[:6]}"


_NAME_BYTES = 60
"""Of the folder of data in that of pictures; file systems allow 255 in all."""


def _for_evaluation(trained: Config, checkpoint: str, data: str | None, settings: Sequence[str]) -> Config:
    """A checkpoint's settings with other data: those in a folder, or a recipe's `data`.

    In a folder of another layout than that of its own they are searched for, as `data check` does.
    """
    source = Source(Path(checkpoint), trained.model_dump(mode="json"), {})
    source.set(["cluster", "workers"], 1, checkpoint)  # not the number that trained it
    if data is not None and Path(data).is_dir():
        source.set(["data", "root"], root_setting(data), f"--data {data}")
        chosen = any(text.startswith("data.dataset") for text in settings)
        if not chosen and (found := data_set_for(data, trained.data)) is not None:
            source.set(["data", "dataset"], found, f"--data {data}")
    elif data is not None:
        other = read_recipe(data).tree.get("data", {})
        if "dataset" in other:
            source.tree["data"].pop("dataset")  # replaced as a whole, not key by key
        source = source.laid_under(Source(Path(data), {"data": other}, {}))
    return build_config(inline_dataset(source.overridden(settings), Path()))


def _inference_device() -> torch.device:
    """A GPU if there is one, else this process's CPU, which then keeps its memory from image to image."""
    import torch

    from mpformer.cores import usable_cores
    from mpformer.ops.allocator import keep_freed_memory

    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))  # torch does not see quotas
    keep_freed_memory()
    return torch.device("cpu")


def _progress() -> Callable[..., None]:
    """Prints, at most every 10 seconds, how many images are done and the time left."""
    start = said = time.monotonic()

    def report(done: int, total: int, left: float | None = None) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= 10 or done == total:
            said = now
            left = (now - start) / done * (total - done) if left is None else left
            say(f"{done}/{total} images, {duration_text(left)} left")

    return report


@dataclass(frozen=True)
class _Origin:
    """Where a checkpoint comes from."""

    file: Path
    """Its model file."""
    run: Path | None
    """The folder of its run, if it lies in one."""
    folder: Path
    """Where the results go."""
    name: str
    step: int
    averaged: bool = False
    """Whether its weights are the average over training (`train.ema`)."""

    def pictures(self, what: str, split: str, where: str, changed: bool) -> Path:
        """One folder for each kind of picture, checkpoint and split; where: what tells other data of the same
        name, empty for its own. Another folder where the data have changed."""
        marks = [*([where] if where else []), *(["changed-data"] if changed else [])]
        return RunDir(self.folder).pictures / "-".join([what, self.name, *split.split(), *marks])


def chosen_file(checkpoint: str) -> Path:
    """The model file that the argument stands for; where it is one of several of a run, that is said."""
    from mpformer.model.weights.loading import chosen_weights

    choice = chosen_weights(checkpoint)
    if choice.note:
        say(choice.note)
    return choice.file


def _origin(checkpoint: str) -> _Origin:
    from mpformer.model.weights.checkpoints import EMA_FILE

    file = chosen_file(checkpoint)
    if is_remote(checkpoint):  # what is found of them belongs to the user, not into the cache
        # of a hub or URL several have the same last name: the cache tells them apart
        name = file.stem if checkpoint in named_weights() else f"{file.stem}-{file.parent.name[:6]}"
        return _Origin(file, None, Path(Config().storage) / name, name, 0)
    folder = file.resolve().parent
    run, step = RunDir.containing(file.resolve()), step_of(folder)
    if run is None or step is None:
        name = file.stem if file.suffix == ".safetensors" else file.name
        return _Origin(file, None, folder, name, 0)
    averaged = file.name == EMA_FILE
    return _Origin(file, run.path, run.path, folder.name + "-ema" * averaged, step, averaged)


def _published_figures(checkpoint: str) -> dict[str, float]:
    """Of weights that are named in the catalogue: what was published, by metric."""
    known = named_weights().get(checkpoint) if is_remote(checkpoint) else None  # a path of that name wins
    return known.figures if known else {}


def _attach(origin: _Origin, values: dict[str, float], folder: Path) -> None:
    """Add figures and pictures to the MLflow run of the checkpoint's run, if there is one."""
    from mpformer.tracking.mlflow import attach

    if origin.run is not None and (line := attach(origin.run, origin.step, values, folder)) is not None:
        say(line)
