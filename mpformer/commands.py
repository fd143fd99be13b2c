"""What each command does, composed from the parts. Heavy parts are imported where they are used."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mpformer.ablation.plan import plan_text, show_value, state_text
from mpformer.ablation.spec import Study, Trial, load_study
from mpformer.config import (
    Config,
    Data,
    build_config,
    diff,
    dump_yaml,
    inline_dataset,
    load_config,
    read_recipe,
    run_name,
)
from mpformer.types import InputError, RunError
from mpformer.yamlfile import Source, nearest

if TYPE_CHECKING:
    import torch

    from mpformer.ablation.tune import Failure
    from mpformer.data.catalog import Catalog
    from mpformer.model.segmenter import Segmenter

QUICKSTART = "experiments/quickstart.yaml"


def say(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)


# --- runs and studies -----------------------------------------------------------------------------


def train(recipe: str, settings: Sequence[str]) -> None:
    """One run to its end; the same command again resumes it, or shows what it came to."""
    config = _stored_absolutely(load_config(recipe, settings))
    run_dir = Path(config.storage) / run_name(config)
    say(f"run {run_dir}")
    from mpformer.progress import Follower, follow
    from mpformer.train.launch import fit

    label = f"{config.name} s{config.train.seed}"
    with follow([Follower(label, run_dir, config.train.batch_size)], say):
        summary = fit(config)
    _tell_mlflow_problem(run_dir)
    for key, value in summary["metrics"].items():
        before = summary["untrained_metrics"].get(key)
        say(f"{key:16} {value:8.2f}" + ("" if before is None else f"   untrained {before:.2f}"))
    say(f"{run_dir / 'summary.json'}")


def ablate(study_file: str, settings: Sequence[str], only: str | None, plan: bool) -> None:
    """A study's runs, then its table and curves; with `plan`, only what it would do.

    Raises `RunError`, or `InputError` where that is the reason, when runs have failed: after the table.
    """
    if plan:
        say(plan_text(load_study(study_file, settings), only))
        return
    study = _load_study(study_file, settings)
    trials = study.trials(only)
    say(f"{study.name}: {len(trials)} runs in {study.folder}: {state_text(trials)}")
    failures = _run_study(study, trials) if not all(trial.finished for trial in trials) else []
    report(study)
    for trial in trials:
        _tell_mlflow_problem(trial.run_dir)
    for failure in failures:
        say(f"failed: {failure.trial.label}: {failure.reason}")
    if failures:
        kind = InputError if all(failure.bad_input for failure in failures) else RunError
        first = failures[0]
        raise kind(f"{len(failures)} of {len(trials)} runs failed, {first.trial.label}: {first.reason}")


def _run_study(study: Study, trials: Sequence[Trial]) -> list[Failure]:
    from mpformer.ablation.tune import run_trials
    from mpformer.progress import Follower, follow
    from mpformer.tracking import close_parent, open_parent, prepare_store

    uri = prepare_store(study.base, study.name)
    parent = open_parent(study.folder, uri, study.name, {"study": study.name}) if uri else None
    trials = [_tracked_in(trial, uri) for trial in trials]
    followers = [Follower(trial.label, trial.run_dir, trial.config.train.batch_size) for trial in trials]
    with follow(followers, say):
        failures = run_trials(trials, study.folder, study.name, parent)
    if parent:
        close_parent(uri, parent, "FAILED" if failures else "FINISHED")
    return failures


def _tracked_in(trial: Trial, uri: str | None) -> Trial:
    """All runs of a study share one store, which lies beside the study's folder and not in it."""
    tracking = trial.config.tracking.model_copy(update={"mlflow": uri})
    return replace(trial, config=trial.config.model_copy(update={"tracking": tracking}))


def report(study: Study) -> None:
    """A study's table and curves, from what its runs have measured so far."""
    from mpformer.ablation.report import write_report

    text, files = write_report(study)
    say(f"\n{text}")
    say("written: " + ", ".join(map(str, files)))


def report_file(study_file: str, settings: Sequence[str]) -> None:
    report(_load_study(study_file, settings))


def quickstart(settings: Sequence[str]) -> None:
    """A generated data set, then the quickstart study on it."""
    from mpformer.data.synthetic import generate

    here = Path(__file__).resolve().parents[1] / QUICKSTART
    path = here if here.exists() else Path(QUICKSTART)
    study = load_study(path, settings)
    began = time.monotonic()
    root = Path(study.base.data.root)
    fresh = generate(root)
    say(f"data in {root}" + (f", made in {time.monotonic() - began:.0f} s" if fresh else ", as it was"))
    ablate(str(path), settings, only=None, plan=False)


def sync(run: str) -> None:
    """Bring to MLflow what it could not take while the run went on."""
    from mpformer.tracking import sync as sync_run

    say(sync_run(Path(run)))


def _tell_mlflow_problem(run_dir: Path) -> None:
    from mpformer.tracking import Link

    link = Link.read(run_dir)
    if link is not None and link.problem is not None:
        say(f"MLflow lacks a part of this run ({link.problem}); later: mpformer sync {run_dir}")


def _stored_absolutely(config: Config) -> Config:
    """Workers of Ray stand in folders of their own."""
    return config.model_copy(update={"storage": str(Path(config.storage).resolve())})


def _load_study(path: str | Path, settings: Sequence[str]) -> Study:
    study = load_study(path, settings)
    rows = {row: _stored_absolutely(config) for row, config in study.rows.items()}
    return replace(study, base=_stored_absolutely(study.base), rows=rows)


# --- checkpoints ----------------------------------------------------------------------------------


def evaluate(checkpoint: str, data: str | None, settings: Sequence[str]) -> None:
    """The figures of a checkpoint on the validation split of its own data, or of `data`; their page."""
    from mpformer.evaluate import evaluation

    model, split, config, device = _open_checkpoint(checkpoint, data, settings)
    if config.cluster.workers > 1:
        from mpformer.train.launch import start_ray

        start_ray()
    found = evaluation.evaluate(model, split, config, device=device, report=_progress())
    for key, value in {**found.scores.summary, **found.layers}.items():
        say(f"{key:24} {value:8.2f}")
    for key, text in found.facts().items():
        say(f"{key:24} {text:>8}")
    if config.evaluate.pictures:
        folder = _picture_folder(checkpoint, split.name, "evaluate")
        page = found.write(folder, f"{checkpoint}: {split.name}", split, config.evaluate.pictures)[0]
        say(str(page))


def diagnose(checkpoint: str, data: str | None, settings: Sequence[str]) -> None:
    """The decoder's layers (Table 1 of MP-Former) and pictures of queries over the layers (Figure 1)."""
    from mpformer.draw import write_png
    from mpformer.evaluate import diagnostics

    model, split, config, device = _open_checkpoint(checkpoint, data, settings)
    chosen = range(len(split.records))[: config.evaluate.limit]
    report = _progress()
    found = diagnostics.diagnose(model, split, config, chosen, device, report=report)
    say(found.table())
    folder = _picture_folder(checkpoint, split.name, "diagnose")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "layers.json").write_text(json.dumps({"images": found.images, **found.metrics()}, indent=1))
    say(str(folder / "layers.json"))
    for index in chosen[: config.evaluate.pictures]:
        picture = diagnostics.draw_layers(model, split.records[index], config, device)
        if picture is not None:
            path = folder / f"layers-{split.records[index].image_id}.png"
            write_png(path, picture)
            say(str(path))


def _open_checkpoint(
    checkpoint: str, data: str | None, settings: Sequence[str]
) -> tuple[Segmenter, Catalog, Config, torch.device]:
    """Model, validation split, settings and device for looking at a checkpoint."""
    import torch

    from mpformer.data.catalog import check_same_classes, open_split
    from mpformer.model.weights import load_checkpoint

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, trained = load_checkpoint(checkpoint, device)
    config = _for_evaluation(trained, checkpoint, data, settings)
    split = open_split(config.data, "val")
    check_same_classes(model.classes, split.classes, split.name)
    images = min(len(split.records), config.evaluate.limit or len(split.records))
    say(f"{checkpoint}: {images} images of {split.name} on {device}")
    return model, split, config, device


def _progress() -> Callable[..., None]:
    """Says at most every 10 seconds how many images are done and how long the rest will take."""
    start = said = time.monotonic()

    def report(done: int, total: int, left: float | None = None) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= 10 or done == total:
            said = now
            left = (now - start) / done * (total - done) if left is None else left
            say(f"{done}/{total} images, {left / 60:.0f}:{left % 60:02.0f} min left")

    return report


def _picture_folder(checkpoint: str, split: str, what: str) -> Path:
    """In the checkpoint's run, else beside its file; one folder for each checkpoint and split."""
    path = Path(checkpoint).resolve()
    run = next((p for p in path.parents if (p / "config.yaml").is_file()), path.parent)
    name = "-".join([what, path.stem, *split.split()])
    return run / "pictures" / name


def predict(checkpoint: str, images: Sequence[str], out: str, settings: Sequence[str]) -> None:
    """Segment image files, or all images of folders, into overlays and COCO-style JSON."""
    import torch

    from mpformer.evaluate.files import predict_files
    from mpformer.model.weights import load_checkpoint

    model, trained = load_checkpoint(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    config = _for_evaluation(trained, checkpoint, None, settings)
    pictures = predict_files(model, images, out, config, report=say)
    say(f"{len(pictures)} pictures and predictions.json in {out}")


def _for_evaluation(trained: Config, checkpoint: str, data: str | None, settings: Sequence[str]) -> Config:
    """A checkpoint's settings with other data: a folder in the layout of its own, or a recipe's `data`."""
    source = Source(Path(checkpoint), trained.model_dump(mode="json"), {})
    source.set(["cluster", "workers"], 1, checkpoint)  # as many as asked for, not as many as trained it
    if data is not None and Path(data).is_dir():
        source.set(["data", "root"], data, f"--data {data}")
    elif data is not None:
        source = source.laid_under(
            Source(Path(data), {"data": read_recipe(Path(data)).tree.get("data", {})}, {})
        )
    return build_config(inline_dataset(source.overridden(settings), Path()))


def weights_import(source: str, out: str) -> None:
    """Another program's model as a checkpoint of ours, and what became of each tensor."""
    from mpformer.model.weights import import_weights

    say(str(import_weights(source, out)))
    say(out)


def weights_export(checkpoint: str, folder: str) -> None:
    """A checkpoint as a Hugging Face folder."""
    from mpformer.model.weights import export_huggingface

    export_huggingface(checkpoint, folder)
    say(folder)


# --- data and settings ----------------------------------------------------------------------------


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


def data_check(place: str, settings: Sequence[str]) -> None:
    """What a data set holds and what is wrong with it, in words; then the command that trains on it."""
    from mpformer.data.check import check, report_text, training_command

    data = _data_at(place, settings)
    say(report_text(check(data)))
    recipe = place if Path(place).is_file() else "experiments/recipes/coco-tiny.yaml"
    say(f"\ntrain on it: {training_command(data, recipe)}")


def data_pack(place: str, out: str, settings: Sequence[str]) -> None:
    """Both splits as Parquet shards; the same command again finishes what was interrupted."""
    from mpformer.data.pack import pack

    counts = pack(_data_at(place, settings), out)
    say(f"{out}: {counts['train']} training and {counts['val']} validation images")
    say(f"in a recipe: data: {{root: {out}, dataset: {{format: packed}}}}")


def data_show(place: str, out: str, settings: Sequence[str]) -> None:
    """Pictures of both splits with their masks, and of the first training samples as the model gets them."""
    from mpformer.data.catalog import open_split
    from mpformer.data.pictures import batch_pictures, catalog_sheet
    from mpformer.data.pipeline import train_batches
    from mpformer.draw import side_by_side, write_png

    data = _data_at(place, settings)
    splits = {name: open_split(data, name) for name in ("train", "val")}
    sheets = {name: catalog_sheet(split) for name, split in splits.items()}
    inline = data.model_copy(update={"loader": "inline"})
    [batch] = train_batches(
        inline, splits["train"], seed=0, batch_size=8, start_step=0, stop_step=1, rank=0, world=1
    )
    samples = batch_pictures(batch, splits["train"].classes)
    sheets["samples"] = side_by_side(samples, batch.image_ids, columns=4)
    for name, sheet in sheets.items():
        write_png(Path(out) / f"{name}.png", sheet)
        say(f"{Path(out) / name}.png")


def _data_at(place: str, settings: Sequence[str]) -> Data:
    """The data of a recipe, or of a folder that is looked through for its annotations."""
    if not Path(place).is_dir():
        return load_config(place, settings).data
    from mpformer.data.detect import detect

    found = detect(Path(place))
    task = "panoptic" if found.format == "coco_panoptic" else "instance"
    source = Source(Path(place), {"data": {"root": place, "task": task, "dataset": found.model_dump()}}, {})
    return build_config(inline_dataset(source.overridden(settings), Path())).data


def show(recipe: str, other: str | None, settings: Sequence[str]) -> None:
    """The resolved settings of a recipe, or the settings in which two recipes differ."""
    config = load_config(recipe, settings)
    if other is None:
        say(dump_yaml(config).rstrip())
        return
    changed = diff(config, load_config(other, settings))
    width = max(map(len, changed), default=0)
    for key, (a, b) in changed.items():
        say(f"{key:{width}}  {show_value(a)} -> {show_value(b)}")
    if not changed:
        say("no difference")


def doctor() -> None:
    """What is installed, which devices there are, and which deformable-attention kernel runs here and why."""
    from mpformer.doctor import lines

    for line in lines():
        say(line)
