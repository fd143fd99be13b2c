"""Estimated hours and price of a study. Imports neither torch nor ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from mpformer.ablation.makespan import Interruptions, makespan
from mpformer.ablation.spec import Study, Trial
from mpformer.config import Config, duration_in_steps
from mpformer.config.messages import described, written_keys
from mpformer.config.section import Count, NonNegative, Positive, Section
from mpformer.config.yamlfile import nearest, read_settings, value_of
from mpformer.tracking.record import read_summary
from mpformer.types import InputError

COSTS_FILE = "costs.yaml"


class PlanOptions(Section):
    """`plan.KEY=value` of the command line."""

    costs: str | None = None
    """File of image counts, hours and prices; null: `costs.yaml` beside the study's folder or in it."""
    gpu_seconds_per_image: Positive | None = None
    """Stated speed of all runs; null: measured in finished runs of the study, else of the costs file."""
    gpus: Count = 8
    """GPUs that can be used at the same time."""
    instance: str | None = None
    """The instance of the costs file for the price."""
    interruptions_per_hour: NonNegative = 0.0
    """How often a run is interrupted."""
    checkpoint_minutes: Positive = 30.0
    """Training between two checkpoints; an interruption loses somewhat less than half of it on average."""
    restart_minutes: NonNegative = 5.0
    """From an interruption until the run trains again."""

    @classmethod
    def read(cls, options: Mapping[str, str]) -> PlanOptions:
        """Of the command line's texts. Raises `InputError` naming the option and the nearest right one."""
        try:
            return cls.model_validate({key: value_of(f"{key}={text}", cls) for key, text in options.items()})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise InputError(
                    f"setting 'plan.{key}': no such option; nearest: plan.{nearest(key, cls.model_fields)}"
                ) from None
            raise InputError(f"setting 'plan.{key}': {described(first, cls, key.split('.'))}") from None


class Hours(Section):
    """A run of known length and hours."""

    dataset: str
    task: str
    backbone: str
    pilots: bool
    gpus: Count
    steps: Count | None = None
    epochs: Positive | None = None
    """Instead of steps."""
    hours: Positive
    batch_size: Count = 16

    @model_validator(mode="after")
    def _check_length(self) -> Hours:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("either `steps` or `epochs` is expected")
        return self

    def gpu_seconds_per_image(self, images_per_epoch: int) -> float:
        epochs = self.epochs or 0
        images = self.steps * self.batch_size if self.steps else epochs * images_per_epoch
        return self.hours * 3600 * self.gpus / images


class Instance(Section):
    gpus: Count
    per_hour: NonNegative
    currency: str = "USD"


class CostFile(Section):
    images: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    hours: tuple[Hours, ...] = ()
    instances: dict[str, Instance] = Field(default_factory=dict)


@dataclass(frozen=True)
class Costs:
    """Known speeds of runs."""

    file: CostFile
    stated: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    """GPU-seconds per image by row or, of all rows together, by ''."""

    @classmethod
    def read(cls, study: Study, options: PlanOptions) -> Costs:
        folders = (study.path.resolve().parent, study.path.resolve().parent.parent)
        here = (folder / COSTS_FILE for folder in folders if (folder / COSTS_FILE).is_file())
        path = Path(options.costs) if options.costs else next(here, None)
        tree = read_settings(path, named_by="plan.costs").tree if path else {}
        try:
            file = CostFile.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            keys = written_keys(first, tree)
            told = described(first, CostFile, keys)
            raise InputError(f"{path}: {'.'.join(keys)}: {told}") from None
        if options.instance is not None and options.instance not in file.instances:
            known = nearest(options.instance, file.instances)
            raise InputError(f"setting 'plan.instance': {path} has no '{options.instance}'; nearest: {known}")
        return cls(file, options.gpu_seconds_per_image, _measured(study))

    def steps(self, config: Config) -> int | None:
        """Optimiser steps of a run; None where its length is in epochs of a data set of unknown size."""
        images = self.file.images.get(config.data.dataset.name)
        if images is None and "epoch" in config.train.length:
            return None
        return duration_in_steps(config.train.length, images or 0, config.train.batch_size)

    def gpu_seconds_per_image(self, trial: Trial) -> tuple[float, str] | None:
        """The speed of a run and where it comes from; None where none is known."""
        if self.stated is not None:
            return self.stated, "as stated"
        if (own := self.measured.get(trial.config.name)) is not None:
            return own, "measured in finished runs of the row"
        if (all_rows := self.measured.get("")) is not None:
            return all_rows, "measured in finished runs of other rows"
        config = trial.config
        for entry in self.file.hours:
            wanted = (config.data.dataset.name, config.data.task, config.model.backbone.name)
            known = (entry.dataset, entry.task, entry.backbone)
            if known == wanted and entry.pilots == (config.model.pilot.queries > 0):
                images = self.file.images.get(entry.dataset, 0)
                return entry.gpu_seconds_per_image(images), "printed hours of the costs file"
        return None

    def priced(self, trial: Trial) -> _Priced | None:
        """The hours of a run; None where its speed or its length is not known."""
        known, steps = self.gpu_seconds_per_image(trial), self.steps(trial.config)
        if known is None or steps is None:
            return None
        speed, source = known
        return _Priced(trial, speed * steps * trial.config.train.batch_size / 3600, source)


def _measured(study: Study) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for trial in study.trials():
        summary = read_summary(trial.run_dir) or {}
        if summary.get("train_seconds") and summary.get("images_seen"):
            speed = summary["train_seconds"] * summary["workers"] / summary["images_seen"]
            found.setdefault(trial.config.name, []).append(speed)
            found.setdefault("", []).append(speed)
    return {name: sum(values) / len(values) for name, values in found.items()}


@dataclass(frozen=True)
class _Priced:
    """A run whose hours are known."""

    trial: Trial
    gpu_hours: float
    source: str
    """Where its speed comes from."""

    @property
    def workers(self) -> int:
        return self.trial.config.cluster.workers

    @property
    def gpus(self) -> int:
        """Of workers and evaluators."""
        return self.workers + self.trial.config.cluster.evaluators


def cost_lines(trials: Sequence[Trial], costs: Costs, options: PlanOptions) -> list[str]:
    """GPU-hours, makespan and price of the runs that are not finished."""
    pending = [trial for trial in trials if not trial.finished]
    known = [priced for trial in pending if (priced := costs.priced(trial)) is not None]
    lines = []
    if len(known) < len(pending):
        named = {id(priced.trial) for priced in known}
        unknown = dict.fromkeys(trial.config.name for trial in pending if id(trial) not in named)
        lines.append(
            f"hours of {len(pending) - len(known)} runs are not known ({', '.join(unknown)}): finish one run "
            "of the study, or give plan.gpu_seconds_per_image="
        )
    if not known:
        return lines
    total = sum(run.gpu_hours for run in known)
    sources = "; ".join(sorted({run.source for run in known}))
    lines.append(f"training: {total:,.1f} GPU-hours in {len(known)} runs ({sources}); evaluation not counted")
    fleet = Interruptions(
        options.interruptions_per_hour,
        options.checkpoint_minutes / 60,
        restart_hours=options.restart_minutes / 60,
    )
    spent = [fleet.spent(run.gpu_hours / run.workers).total for run in known]
    if options.interruptions_per_hour:
        expected = sum(hours * run.workers for hours, run in zip(spent, known))
        lines.append(
            f"with {options.interruptions_per_hour:g} interruptions per hour and run, a checkpoint every "
            f"{options.checkpoint_minutes:g} min and {options.restart_minutes:g} min to start again: "
            f"x {expected / total:.3f} = {expected:,.1f} GPU-hours"
        )
    gpus = [run.gpus for run in known]
    span = makespan(spent, gpus, options.gpus)
    each = str(min(gpus)) if min(gpus) == max(gpus) else f"{min(gpus)} to {max(gpus)}"
    lines.append(f"on {options.gpus} GPUs, {each} a run: {span:,.1f} hours from start to end")
    if options.instance is not None:
        instance = costs.file.instances[options.instance]
        machines = math.ceil(options.gpus / instance.gpus)
        price = span * machines * instance.per_hour
        lines.append(
            f"price: {machines} x {options.instance} x {span:,.1f} h x {instance.per_hour:g} "
            f"{instance.currency}/h = {price:,.0f} {instance.currency}"
        )
    return lines
