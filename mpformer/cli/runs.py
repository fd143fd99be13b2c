"""Commands on single runs: train, sync, show, doctor. Heavy parts are imported where they are used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpformer import shell
from mpformer.ablation.plan import show_value
from mpformer.cli import reference
from mpformer.cli.output import say
from mpformer.cli.relatives import way_on
from mpformer.cli.rundata import ways_on
from mpformer.cli.size import size_line
from mpformer.config import Config, diff, dump_yaml, load_config, run_name
from mpformer.tracking.run_dir import RunDir
from mpformer.train.start import fetch_weights
from mpformer.types import InputError


def train(recipe: str, settings: Sequence[str]) -> None:
    """One run to its end; the same command again resumes it, or prints its final metrics."""
    if Path(recipe).is_dir():
        check = shell.command("data", "check", Path(recipe))
        raise InputError(f"{recipe}: a recipe is expected, not a folder; {check} prints what trains on it")
    config = stored_absolutely(load_config(recipe, settings))
    run_dir = Path(config.storage) / run_name(config)
    label = f"{config.name} s{config.train.seed}"
    say(f"run {run_dir}")
    if (line := way_on(recipe, settings, config, run_dir)) is not None:
        say(line)
    say(f"{label}  loading torch and Ray")
    if config.cluster.mirror is None:  # else the run may have begun elsewhere
        fetch_weights(config, run_dir)  # before Ray is loaded, which takes longer than to find this out
    from mpformer.evaluate.metrics import unmeasured
    from mpformer.model.weights.checkpoints import best
    from mpformer.tracking.progress import Follower, follow
    from mpformer.train.launch import fit
    from mpformer.train.rundata import ChangedDataError

    try:
        with follow([Follower(label, run_dir, config.train.batch_size)], say):
            summary = fit(config, tell=lambda line: say(f"{label}  {line}"))
    except ChangedDataError as error:
        raise InputError(f"{error}; {ways_on(recipe, settings, run_dir)}") from None
    tell_tracking_problems(run_dir)
    for key, value in summary["metrics"].items():
        before = summary["untrained_metrics"].get(key)
        say(f"{key:20} {value:8.2f}" + ("" if before is None else f"   untrained {before:.2f}"))
    measured = [key.removeprefix("val/") for key in summary["metrics"]]
    for key, reason in unmeasured(config.data.task, measured).items() if measured else ():
        say(f"{'val/' + key:20} not measured: {reason}")
    if "stopped_early" in summary:
        say(f"ended at step {summary['steps']}: {summary['stopped_early']}")
    if (kept := best(run_dir)) is not None:
        say(kept.note)
    say(str(RunDir(run_dir).summary))


def sync(run: str) -> None:
    """Bring to MLflow and other trackers what they lack of a run's record."""
    from mpformer.tracking.tracker import sync as sync_run

    say(sync_run(Path(run)))


def tell_tracking_problems(run_dir: Path) -> None:
    """One line for each tracker that lacks a part of the run."""
    from mpformer.tracking.tracker import problems

    for line in problems(run_dir):
        say(line)


def stored_absolutely(config: Config) -> Config:
    """With an absolute storage folder: Ray's workers have working folders of their own."""
    return config.model_copy(update={"storage": str(Path(config.storage).resolve())})


def show(
    recipe: str | None,
    other: str | None,
    help_settings: str | None,
    json_schema: str | None,
    settings: Sequence[str],
) -> None:
    """The resolved settings of a recipe and its model's size, or the settings in which two recipes differ.

    `help_settings`: instead the reference of a section's settings, of all for ""; `json_schema`: the JSON
    Schema of that kind of file.
    """
    if help_settings is not None:
        say(reference.settings_text(help_settings))
        return
    if json_schema is not None:
        say(reference.schema_text(json_schema).rstrip())
        return
    if recipe is None:
        raise InputError("a recipe is expected (usage: mpformer show RECIPE [RECIPE2] [key=value ...])")
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
    from mpformer.cli.doctor import lines

    for line in lines():
        say(line)
