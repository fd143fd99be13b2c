"""Commands on studies: quickstart, ablate, report. Heavy parts are imported where they are used."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mpformer.ablation.plan import plan_text, state_text
from mpformer.ablation.spec import Study, Trial, load_study
from mpformer.cli.checkpoints import open_checkpoint
from mpformer.cli.output import say
from mpformer.cli.rundata import changed_trials, study_ways_on
from mpformer.cli.runs import stored_absolutely, tell_tracking_problems
from mpformer.config.shipped import experiments
from mpformer.shell import command
from mpformer.tracking.run_dir import RunDir, StudyDir
from mpformer.types import InputError, RunError

if TYPE_CHECKING:
    from mpformer.ablation.results import Results
    from mpformer.ablation.studyfile import Search
    from mpformer.ablation.tune import Failure


def quickstart(settings: Sequence[str]) -> None:
    """A generated data set, then the quickstart study on it."""
    from mpformer.data.synthetic import generate

    path = experiments() / "quickstart.yaml"
    study = load_study(path, settings)
    began = time.monotonic()
    root = Path(study.base.data.root)
    fresh = generate(root)
    say(f"data in {root}" + (f", made in {time.monotonic() - began:.0f} s" if fresh else ", as it was"))
    ablate(str(path), settings, only=None, plan=False)


def ablate(study_file: str, settings: Sequence[str], only: str | None, plan: bool) -> None:
    """The runs of a study, then its table and curves; with `plan`, only what would be done.

    Raises, after the table, `RunError` when runs have failed, `InputError` where all failed for bad input.
    """
    if plan:
        say(plan_text(load_study(study_file, settings), only))
        return
    from mpformer.ablation.results import collect

    study = _load_study(study_file, settings)
    trials = study.trials(only)
    _generate_data(study)
    say(f"{study.name}: {len(trials)} runs in {study.folder}: {state_text(trials)}")
    ways = study_ways_on(study, settings, only)
    failures = changed_trials(trials, ways)
    same = _without(trials, failures)
    failures += _run_study(study, same) if not all(trial.finished for trial in same) else []
    _diagnose_pilots(study, same, study.file.columns)
    if study.file.search and only is None:
        failures += _search(study, study.file.search, ways)
    _write_report(study, collect(study))
    for trial in trials:
        tell_tracking_problems(trial.run_dir)
    for failure in failures:
        say(f"failed: {failure.trial.label}: {failure.reason}")
    if failures:
        kind = InputError if all(failure.bad_input for failure in failures) else RunError
        first = failures[0]
        raise kind(f"{len(failures)} of {len(trials)} runs failed, {first.trial.label}: {first.reason}")


def _without(trials: Sequence[Trial], failures: Sequence[Failure]) -> list[Trial]:
    failed = {failure.trial.run_dir for failure in failures}
    return [trial for trial in trials if trial.run_dir not in failed]


def _diagnose_pilots(study: Study, trials: Sequence[Trial], columns: Iterable[str]) -> None:
    """Measure the pilots of finished runs that lack these figures, for columns `diag/pilot_...`.

    The weights are those that the table's figures are of: the last, or with `figures: best` the best ones.
    """
    if not any("diag/pilot_" in column for column in columns):
        return
    from mpformer.ablation.results import read_pilots, read_trial, write_pilots
    from mpformer.evaluate import diagnostics
    from mpformer.model.weights.checkpoints import MODEL_FILE, read
    from mpformer.tracking.mlflow import attach

    for trial in trials:
        if not trial.finished or trial.config.model.pilot.queries == 0:
            continue
        run = read_trial(study, trial)
        if (step := run.step) is None or step in (known := read_pilots(trial.run_dir, run.history[-1][0])):
            continue
        try:
            weights = read(RunDir(trial.run_dir).checkpoint(step))
        except RunError as error:
            say(f"{trial.label}: the pilots cannot be measured, their weights are gone: {error}")
            continue
        model, split, config, device = open_checkpoint(weights.path / MODEL_FILE, None, [])
        chosen = range(len(split.records))[: config.evaluate.limit]
        found = diagnostics.diagnose(model, split, config, chosen, device, quality=False)
        figures = {f"diag/{key}": value for key, value in found.metrics().items() if "pilot" in key}
        write_pilots(trial.run_dir, {**known, step: figures})
        tracked = attach(trial.run_dir, step, figures)
        say(f"{trial.label}: figures of the pilots measured" + (f"; {tracked}" if tracked else ""))


def _search(study: Study, search: Search, ways: str) -> list[Failure]:
    """Run the samples of the study's search that have not ended, then write and print their table.

    ways: what to do where the data of one have changed.
    """
    from mpformer.ablation.results import read_trial
    from mpformer.ablation.search import samples, table
    from mpformer.ablation.studyfile import split_column

    found = samples(study)
    failures = changed_trials([one.trial for one in found], ways)
    same = _without([one.trial for one in found if one.stopped_at is None], failures)
    open_ones = [trial for trial in same if not trial.finished]
    say(f"search: {len(found)} samples of row {search.row}, {len(open_ones)} to run")
    failures += _run_study(study, open_ones, search) if open_ones else []
    _diagnose_pilots(study, same, [search.column])
    metric = split_column(search.column)[1]
    values = [
        read_trial(study, one.trial).metrics.get(metric) if one.trial.finished else None for one in found
    ]
    text = table(list(zip(found, values)), search.column, study.file.columns[search.column].title)
    if (note := study.file.note_on_figures) is not None:
        text += f"\n\n{note}"
    StudyDir(study.folder).search.write_text(text + "\n", encoding="utf-8")
    say(f"\n{text}\n")
    return failures


def _run_study(study: Study, trials: Sequence[Trial], search: Search | None = None) -> list[Failure]:
    from mpformer.ablation.tune import run_trials
    from mpformer.cli.live import shown
    from mpformer.tracking.mlflow_store import close_parent, open_parent, prepare_store
    from mpformer.tracking.progress import Follower
    from mpformer.tracking.record import read_summary

    say("starting Ray and the first runs, which takes some seconds")
    uri = prepare_store(study.base, study.name)
    parent = open_parent(study.folder, uri, study.name, {"study": study.name}) if uri else None
    trials = [_tracked_in(trial, uri) for trial in trials]
    followers = {
        trial.run_dir: Follower(trial.label, trial.run_dir, trial.config.train.batch_size) for trial in trials
    }
    for run_dir, follower in followers.items():
        if (summary := read_summary(run_dir)) is not None:
            follower.values |= summary["metrics"]

    def on_failure(failure: Failure) -> None:
        followers[failure.trial.run_dir].failed = True
        say(f"{failure.trial.label}  failed, the others go on: {failure.reason}")

    status = "KILLED"  # unless the trials end by themselves
    try:
        with shown(list(followers.values()), say):
            failures = run_trials(trials, study.folder, study.name, parent, study.bases, search, on_failure)
        status = "FAILED" if failures else "FINISHED"
    finally:
        if uri and parent:
            close_parent(uri, parent, status)
    return failures


def _tracked_in(trial: Trial, uri: str | None) -> Trial:
    """With the one store of all runs of a study, which lies beside the study's folder and not in it."""
    tracking = trial.config.tracking.model_copy(update={"mlflow": uri})
    return replace(trial, config=trial.config.model_copy(update={"tracking": tracking}))


def _generate_data(study: Study) -> None:
    """Generate the data set of the study's profile, if there is one and the study reads it."""
    generate = study.file.profiles[study.profile].generate if study.profile else None
    if generate is None or study.base.data.root != generate.root:
        return
    from mpformer.data.synthetic import generate as make

    settings = generate.model_dump(exclude={"root", "train", "val"})
    fresh = make(Path(generate.root), {"train": generate.train, "val": generate.val}, **settings)
    say(f"data in {generate.root}" + (", generated" if fresh else ", as it was"))


def _write_report(study: Study, results: Results) -> None:
    """Write and print a study's table and curves of the results so far."""
    from mpformer.ablation.report import write_report
    from mpformer.tracking.mlflow import attach_report

    text, files = write_report(study, results)
    say(f"\n{text}")
    _say_where(files)
    if (problem := attach_report(study.folder, files)) is not None:
        say(problem)


def _say_where(files: Sequence[Path]) -> None:
    page = next(path for path in files if path.suffix == ".html")
    say(f"report: {page}")
    say("beside it: " + ", ".join(path.name for path in files if path != page))


def report(place: str, settings: Sequence[str]) -> None:
    """The report of a study file, with `from=mlflow` from its MLflow store alone; or of one run's folder."""
    if Path(place).is_dir():
        from mpformer.ablation.runpage import write_run_report

        text, files = write_run_report(Path(place))
        say(f"\n{text}")
        _say_where(files)
        return
    from mpformer.ablation.results import collect, collect_mlflow
    from mpformer.tracking.mlflow_store import store_uri

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
        start = command("ablate", Path(place), *(text for text in settings if text not in source))
        raise InputError(f"{where}: no run of this study, with these settings: {start} starts them")
    _write_report(study, results)


def _load_study(path: str | Path, settings: Sequence[str]) -> Study:
    study = load_study(path, settings)
    bases = {part: stored_absolutely(config) for part, config in study.bases.items()}
    return replace(study, bases=bases, runs={key: stored_absolutely(c) for key, c in study.runs.items()})
