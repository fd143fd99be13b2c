"""Hours and money of a study, reckoned beforehand. Imports neither torch nor ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from mpformer.ablation.makespan import Interruptions, makespan
from mpformer.ablation.spec import Study, Trial
from mpformer.ablation.studyfile import message
from mpformer.config import Config, duration_in_steps
from mpformer.config.section import Count, NonNegative, Positive, Section
from mpformer.config.yamlfile import nearest, read_yaml
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
    """GPUs that are there at the same time."""
    instance: str | None = None
    """The machine of the costs file whose price is reckoned."""
    interruptions_per_hour: NonNegative = 0.0
    """How often a run is interrupted."""
    checkpoint_minutes: Positive = 30.0
    """Training between two checkpoints: what an interruption loses is on average somewhat less than half."""
    restart_minutes: NonNegative = 5.0
    """From the interruption until the run trains again."""

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> PlanOptions:
        """Raises `InputError` naming the option and the nearest right one."""
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise InputError(
                    f"setting 'plan.{key}': no such option; nearest: plan.{nearest(key, cls.model_fields)}"
                ) from None
            raise InputError(f"setting 'plan.{key}': {message(first)}") from None


class Hours(Section):
    """A run whose hours are known."""

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

    def gpu_seconds_per_image(self, images_per_epoch: int) -> float:
        images = self.steps * self.batch_size if self.steps else self.epochs * images_per_epoch
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
    """What is known of the speed of runs."""

    file: CostFile
    stated: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    """GPU-seconds per image by row or, of all rows together, by ''."""

    @classmethod
    def read(cls, study: Study, options: PlanOptions) -> Costs:
        folders = (study.path.resolve().parent, study.path.resolve().parent.parent)
        here = (folder / COSTS_FILE for folder in folders if (folder / COSTS_FILE).is_file())
        path = Path(options.costs) if options.costs else next(here, None)
        tree = read_yaml(path, named_by="plan.costs").tree if path else {}
        try:
            file = CostFile.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {message(first)}") from None
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
        """The speed of a run and where it comes from; None where nothing is known."""
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

    def gpu_hours(self, trial: Trial) -> float | None:
        speed, steps = self.gpu_seconds_per_image(trial), self.steps(trial.config)
        if speed is None or steps is None:
            return None
        return speed[0] * steps * trial.config.train.batch_size / 3600


def _measured(study: Study) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for trial in study.trials():
        summary = read_summary(trial.run_dir) or {}
        if summary.get("train_seconds") and summary.get("images_seen"):
            speed = summary["train_seconds"] * summary["workers"] / summary["images_seen"]
            found.setdefault(trial.config.name, []).append(speed)
            found.setdefault("", []).append(speed)
    return {name: sum(values) / len(values) for name, values in found.items()}


def cost_lines(trials: Sequence[Trial], costs: Costs, options: PlanOptions) -> list[str]:
    """GPU-hours, makespan and price of the runs that are not finished."""
    pending = [trial for trial in trials if not trial.finished]
    hours = {id(trial): costs.gpu_hours(trial) for trial in pending}
    unknown = [trial for trial in pending if hours[id(trial)] is None]
    known = [trial for trial in pending if hours[id(trial)] is not None]
    lines = []
    if unknown:
        names = ", ".join(dict.fromkeys(trial.config.name for trial in unknown))
        lines.append(
            f"hours of {len(unknown)} runs are not known ({names}): finish one run of the study, or give "
            "plan.gpu_seconds_per_image="
        )
    if not known:
        return lines
    total = sum(hours[id(trial)] for trial in known)
    sources = "; ".join(sorted({costs.gpu_seconds_per_image(trial)[1] for trial in known}))
    lines.append(f"training: {total:,.1f} GPU-hours in {len(known)} runs ({sources}); evaluation not counted")
    fleet = Interruptions(
        options.interruptions_per_hour,
        options.checkpoint_minutes / 60,
        restart_hours=options.restart_minutes / 60,
    )
    widths = [trial.config.cluster.workers for trial in known]
    spent = [fleet.spent(hours[id(trial)] / width).total for trial, width in zip(known, widths)]
    expected = sum(time * width for time, width in zip(spent, widths))
    if options.interruptions_per_hour:
        lines.append(
            f"with {options.interruptions_per_hour:g} interruptions per hour and run, a checkpoint every "
            f"{options.checkpoint_minutes:g} min and {options.restart_minutes:g} min to start again: "
            f"x {expected / total:.3f} = {expected:,.1f} GPU-hours"
        )
    held = [width + trial.config.cluster.evaluators for trial, width in zip(known, widths)]
    span = makespan(spent, held, options.gpus)
    lines.append(f"on {options.gpus} GPUs, {_widths(held)} a run: {span:,.1f} hours from start to end")
    if options.instance is not None:
        instance = costs.file.instances[options.instance]
        machines = math.ceil(options.gpus / instance.gpus)
        price = span * machines * instance.per_hour
        lines.append(
            f"price: {machines} x {options.instance} x {span:,.1f} h x {instance.per_hour:g} "
            f"{instance.currency}/h = {price:,.0f} {instance.currency}"
        )
    return lines


def _widths(widths: Sequence[int]) -> str:
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low} to {high}"
