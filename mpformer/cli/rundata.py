"""What commands say where the data of a run are not those that it was begun on. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mpformer.ablation.spec import Study, Trial
from mpformer.cli.output import say
from mpformer.shell import command
from mpformer.tracking.run_dir import RunDir

if TYPE_CHECKING:
    from mpformer.ablation.tune import Failure
    from mpformer.data.version import DataVersion


def ways_on(recipe: str, settings: Sequence[str], run_dir: Path) -> str:
    """What to do where a run's data have changed; `recipe` and `settings` as they were given."""
    stem = run_dir.name.rsplit("-", 2)[0]
    name = f"name={_free(run_dir.parent, stem)}"
    kept = [text for text in settings if not text.startswith("name=")]
    anew = command("train", Path(recipe), *kept, name)
    kept = [text for text in kept if not text.startswith(("train.init=", "train.resume_from="))]
    onward = command("train", Path(recipe), *kept, name, f"train.init={run_dir}")
    return f"restore them, or begin another run: {anew} - or one from this run's weights: {onward}"


def study_ways_on(study: Study, settings: Sequence[str], only: str | None) -> str:
    """What to do where the data of a study's runs have changed."""
    storage = Path(study.base.storage)
    kept = [text for text in settings if not text.startswith("storage=")]
    row = ["--only", only] if only else []
    anew = command(
        "ablate", study.path, *row, *kept, f"storage={storage.with_name(_free(storage.parent, storage.name))}"
    )
    return f"restore them, or begin the study elsewhere: {anew}"


def _free(folder: Path, stem: str) -> str:
    """A name that nothing in the folder begins with."""
    number = 2
    names = [path.name for path in folder.iterdir()]
    while any(name == f"{stem}-{number}" or name.startswith(f"{stem}-{number}-") for name in names):
        number += 1
    return f"{stem}-{number}"


def changed_trials(trials: Sequence[Trial], ways: str) -> list[Failure]:
    """The trials whose data are not those that they were begun on, as failures.

    A line is printed for finished ones whose data cannot be compared.
    """
    from mpformer.data.version import DataVersion

    versions: dict[str, DataVersion] = {}
    failures: list[Failure] = []
    not_compared: dict[str, int] = {}
    for trial in trials:
        if not (trial.finished or RunDir(trial.run_dir).data.exists()):
            continue
        data = trial.config.data
        version = versions.setdefault(data.model_dump_json(), DataVersion(data))
        changed, problem = _changes(trial, version)
        if changed:
            from mpformer.ablation.tune import Failure  # it loads ray

            failures.append(Failure(trial, f"{changed}; {ways}", bad_input=True))
            say(f"{trial.label}  failed, the others go on: {failures[-1].reason}")
        if problem:
            not_compared[problem] = not_compared.get(problem, 0) + 1
    for problem, count in not_compared.items():
        say(f"{count} finished {'run' if count == 1 else 'runs'}: {problem}")
    return failures


def _changes(trial: Trial, version: DataVersion) -> tuple[str, str]:
    """What has changed, and why that is not known of a finished trial; empty for nothing."""
    from mpformer.model.weights.checkpoints import complete
    from mpformer.train.rundata import ChangedDataError, check

    if not trial.finished and not complete(trial.run_dir):
        return "", ""  # it begins anew, on the data as they are
    try:
        problem = check(trial.run_dir, version)
        return "", (problem or "") if trial.finished else ""  # that of another run is told when it starts
    except ChangedDataError as error:
        return str(error), ""
