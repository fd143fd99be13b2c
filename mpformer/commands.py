"""What each command does, composed from the parts. Heavy parts are imported where they are used."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mpformer.ablation.plan import plan_text, show_value, state_text
from mpformer.ablation.spec import Study, Trial, load_study
from mpformer.config import (
    Config,
    build_config,
    diff,
    dump_yaml,
    inline_dataset,
    load_config,
    read_recipe,
    run_name,
)
from mpformer.size import size_line
from mpformer.types import InputError, RunError
from mpformer.yamlfile import Source

if TYPE_CHECKING:
    import torch

    from mpformer.ablation.results import Results
    from mpformer.ablation.studyfile import Search
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
    from mpformer.ablation.results import collect

    study = _load_study(study_file, settings)
    trials = study.trials(only)
    _generate_data(study)
    say(f"{study.name}: {len(trials)} runs in {study.folder}: {state_text(trials)}")
    failures = _run_study(study, trials) if not all(trial.finished for trial in trials) else []
    _diagnose_pilots(study, trials)
    if study.file.search and only is None:
        failures += _search(study)
    report(study, collect(study))
    for trial in trials:
        _tell_mlflow_problem(trial.run_dir)
    for failure in failures:
        say(f"failed: {failure.trial.label}: {failure.reason}")
    if failures:
        kind = InputError if all(failure.bad_input for failure in failures) else RunError
        first = failures[0]
        raise kind(f"{len(failures)} of {len(trials)} runs failed, {first.trial.label}: {first.reason}")


def _diagnose_pilots(study: Study, trials: Sequence[Trial]) -> None:
    """Figures of the pilots (columns `diag/pilot_...`) of finished runs that lack them."""
    if not any("diag/pilot_" in column for column in study.file.columns):
        return
    from mpformer.evaluate import diagnostics
    from mpformer.train import checkpoint

    for trial in trials:
        path = trial.run_dir / "diagnose.json"
        last = checkpoint.latest(trial.run_dir)[0] if trial.finished and not path.exists() else None
        if last is None or trial.config.model.pilot.queries == 0:
            continue
        model, split, config, device = _open_checkpoint(str(last.path), None, [])
        chosen = range(len(split.records))[: config.evaluate.limit]
        found = diagnostics.diagnose(model, split, config, chosen, device, quality=False)
        figures = {f"diag/{key}": value for key, value in found.metrics().items() if "pilot" in key}
        path.write_text(json.dumps(figures))
        say(f"{trial.label}: figures of the pilots measured")


def _search(study: Study) -> list[Failure]:
    """The samples of the study's search, those that exist left as they are; then their table."""
    from mpformer.ablation.results import read_run
    from mpformer.ablation.search import samples, table
    from mpformer.ablation.studyfile import split_column

    search = study.file.search
    found = samples(study)
    open_ones = [one.trial for one in found if not one.trial.finished and one.stopped_at is None]
    say(f"search: {len(found)} samples of row {search.row}, {len(open_ones)} to run")
    failures = _run_study(study, open_ones, search) if open_ones else []
    metric = split_column(search.column)[1]
    values = [
        read_run(one.trial.run_dir, one.trial.config.train.batch_size).metrics.get(metric)
        if one.trial.finished
        else None
        for one in found
    ]
    text = table(list(zip(found, values)), study.file.columns[search.column].title)
    (study.folder / "search.md").write_text(text + "\n", encoding="utf-8")
    say(f"\n{text}\n")
    return failures


def _run_study(study: Study, trials: Sequence[Trial], search: Search | None = None) -> list[Failure]:
    from mpformer.ablation.tune import run_trials
    from mpformer.live import shown
    from mpformer.mlflow_store import close_parent, open_parent, prepare_store
    from mpformer.progress import Follower
    from mpformer.record import read_summary

    uri = prepare_store(study.base, study.name)
    parent = open_parent(study.folder, uri, study.name, {"study": study.name}) if uri else None
    trials = [_tracked_in(trial, uri) for trial in trials]
    followers = {
        trial.run_dir: Follower(trial.label, trial.run_dir, trial.config.train.batch_size) for trial in trials
    }
    for trial in trials:
        if trial.finished:
            followers[trial.run_dir].values |= read_summary(trial.run_dir)["metrics"]

    def on_failure(failure: Failure) -> None:
        followers[failure.trial.run_dir].failed = True
        say(f"{failure.trial.label}  failed, the others go on: {failure.reason}")

    with shown(list(followers.values()), say):
        failures = run_trials(trials, study.folder, study.name, parent, study.bases, search, on_failure)
    if parent:
        close_parent(uri, parent, "FAILED" if failures else "FINISHED")
    return failures


def _tracked_in(trial: Trial, uri: str | None) -> Trial:
    """All runs of a study share one store, which lies beside the study's folder and not in it."""
    tracking = trial.config.tracking.model_copy(update={"mlflow": uri})
    return replace(trial, config=trial.config.model_copy(update={"tracking": tracking}))


def _generate_data(study: Study) -> None:
    """The generated data set of the study's size, if that has one and the study still reads it."""
    generate = study.file.profiles[study.profile].generate if study.profile else None
    if generate is None or study.base.data.root != generate.root:
        return
    from mpformer.data.synthetic import generate as make

    settings = generate.model_dump(exclude={"root", "train", "val"})
    fresh = make(Path(generate.root), {"train": generate.train, "val": generate.val}, **settings)
    say(f"data in {generate.root}" + (", generated" if fresh else ", as it was"))


def report(study: Study, results: Results) -> None:
    """A study's table and curves, from what its runs have measured so far."""
    from mpformer.ablation.report import write_report
    from mpformer.tracking import attach_report

    text, files = write_report(study, results)
    say(f"\n{text}")
    _say_where(files)
    if (problem := attach_report(study.folder, files)) is not None:
        say(problem)


def _say_where(files: Sequence[Path]) -> None:
    page = next(path for path in files if path.suffix == ".html")
    say(f"report: {page}")
    say("beside it: " + ", ".join(path.name for path in files if path != page))


def report_file(place: str, settings: Sequence[str]) -> None:
    """The report of a study file, with `from=mlflow` from its MLflow store alone; or of one run's folder."""
    if Path(place).is_dir():
        from mpformer.ablation.runpage import write_run_report

        text, files = write_run_report(Path(place))
        say(f"\n{text}")
        _say_where(files)
        return
    from mpformer.ablation.results import collect, collect_mlflow
    from mpformer.mlflow_store import store_uri

    source = [text for text in settings if text.startswith("from=")]
    if any(text != "from=mlflow" for text in source):
        raise InputError(f"setting '{source[0]}': from=mlflow is expected, or nothing for the study's folder")
    study = _load_study(place, [text for text in settings if text not in source])
    if source:
        if (uri := store_uri(study.base)) is None:
            raise InputError("setting 'from=mlflow': tracking.mlflow is null: there is no store to read")
        results, where = collect_mlflow(study, uri), f"MLflow {uri}"
    else:
        results, where = collect(study), str(study.folder)
    if not any(results.values()):
        raise InputError(
            f"{where}: no run of this study, with these settings: mpformer ablate {place} starts them"
        )
    report(study, results)


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
    bases = {part: _stored_absolutely(config) for part, config in study.bases.items()}
    return replace(study, bases=bases, runs={key: _stored_absolutely(c) for key, c in study.runs.items()})


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
        origin = _origin(checkpoint)
        folder = origin.pictures("evaluate", split.name)
        page = found.write(folder, f"{checkpoint}: {split.name}", split, config.evaluate.pictures)[0]
        say(str(page))
        _attach(origin, {}, folder)


def diagnose(checkpoint: str, data: str | None, settings: Sequence[str]) -> None:
    """The decoder's layers (Table 1 of MP-Former) and pictures of queries over the layers (Figure 1)."""
    from mpformer.draw import write_png
    from mpformer.evaluate import diagnostics

    model, split, config, device = _open_checkpoint(checkpoint, data, settings)
    chosen = range(len(split.records))[: config.evaluate.limit]
    report = _progress()
    found = diagnostics.diagnose(model, split, config, chosen, device, report=report)
    say(found.table())
    origin = _origin(checkpoint)
    folder = origin.pictures("diagnose", split.name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "layers.json").write_text(json.dumps({"images": found.images, **found.metrics()}, indent=1))
    say(str(folder / "layers.json"))
    for index in chosen[: config.evaluate.pictures]:
        picture = diagnostics.draw_layers(model, split.records[index], config, device)
        if picture is not None:
            path = folder / f"layers-{split.records[index].image_id}.png"
            write_png(path, picture)
            say(str(path))
    # figures of other data would pass for the run's own
    _attach(origin, {f"diag/{k}": v for k, v in found.metrics().items()} if data is None else {}, folder)


def _open_checkpoint(
    checkpoint: str, data: str | None, settings: Sequence[str]
) -> tuple[Segmenter, Catalog, Config, torch.device]:
    """Model, validation split, settings and device for looking at a checkpoint."""
    from mpformer.data.catalog import check_same_classes, open_split
    from mpformer.model.weights import load_checkpoint

    device = _inference_device()
    model, trained = load_checkpoint(checkpoint, device)
    config = _for_evaluation(trained, checkpoint, data, settings)
    split = open_split(config.data, "val")
    check_same_classes(model.classes, split.classes, split.name)
    images = min(len(split.records), config.evaluate.limit or len(split.records))
    say(f"{checkpoint}: {images} images of {split.name} on {device}")
    return model, split, config, device


def _inference_device() -> torch.device:
    """A GPU if there is one, else this process's CPU, which then keeps its memory from image to image."""
    import torch

    from mpformer.ops.allocator import keep_freed_memory

    if torch.cuda.is_available():
        return torch.device("cuda")
    keep_freed_memory()
    return torch.device("cpu")


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


@dataclass(frozen=True)
class _Origin:
    """Where a checkpoint comes from."""

    run: Path | None
    """The folder of its run, if it lies in one."""
    folder: Path
    """Where files about it go."""
    name: str
    step: int

    def pictures(self, what: str, split: str) -> Path:
        """One folder for each kind of picture, checkpoint and split."""
        return self.folder / "pictures" / "-".join([what, self.name, *split.split()])


def _origin(checkpoint: str) -> _Origin:
    from mpformer.model.weights import model_file

    file = model_file(Path(checkpoint)).resolve()
    run = next((p for p in file.parents if (p / "config.yaml").is_file()), None)
    if run is None:
        return _Origin(None, file.parent, file.stem, 0)
    name = file.parent.name
    return _Origin(run, run, name, int(name.rpartition("-")[2]))


def _attach(origin: _Origin, values: dict[str, float], folder: Path) -> None:
    """To the MLflow run that mirrors the checkpoint's, if there is one."""
    from mpformer.tracking import attach

    if origin.run is not None and (told := attach(origin.run, origin.step, values, folder)) is not None:
        say(told)


def predict(checkpoint: str, images: Sequence[str], out: str, settings: Sequence[str]) -> None:
    """Segment image files, or all images of folders, into overlays and COCO-style JSON."""
    from mpformer.evaluate.files import predict_files
    from mpformer.model.weights import load_checkpoint

    model, trained = load_checkpoint(checkpoint, _inference_device())
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
        other = read_recipe(Path(data)).tree.get("data", {})
        if "dataset" in other:
            source.tree["data"].pop("dataset")  # the other one stands for itself
        source = source.laid_under(Source(Path(data), {"data": other}, {}))
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


# --- settings --------------------------------------------------------------------------------------


def show(recipe: str, other: str | None, settings: Sequence[str]) -> None:
    """The resolved settings of a recipe and its model's size, or the settings in which two recipes differ."""
    config = load_config(recipe, settings)
    if other is None:
        say(dump_yaml(config).rstrip())
        say(f"# {size_line(config)}")
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
