"""The settings of one run: `Config`, with training, evaluation, cluster and tracking. Imports no torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from mpformer.config import plugins
from mpformer.config.data import Data
from mpformer.config.figures import AVERAGED, PLAIN
from mpformer.config.members import words
from mpformer.config.model import Model
from mpformer.config.plugins import BY_NAME, PLUGIN_TAG, Plugin
from mpformer.config.section import Count, Described, Fraction, Positive, Section, setting
from mpformer.plugin import is_reference

_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(epochs?|steps?|images?)\s*$")


def _check_duration(value: Any) -> Any:
    found = _DURATION.match(value) if isinstance(value, str) else None
    if found is None or not float(found[1]):
        raise ValueError("expected a length such as '50 epochs', '368750 steps' or '9600 images'")
    return " ".join(value.split())


Duration = Annotated[
    str,
    BeforeValidator(_check_duration),
    Described("a length such as '50 epochs', '368750 steps' or '9600 images'"),
]
"""A length of training: '50 epochs', '600 steps' (of the global batch) or '9600 images'."""


def duration_in_steps(duration: str, images_per_epoch: int, batch_size: int) -> int:
    """Optimiser steps of a `Duration`, rounded up, at least 1."""
    if (found := _DURATION.match(duration)) is None:
        raise ValueError(f"not a duration: {duration!r}")
    amount, unit = found.groups()
    per_step = {"e": batch_size / max(images_per_epoch, 1), "s": 1.0, "i": batch_size}[unit[0]]
    return max(1, -int(-float(amount) // per_step))


class StepSchedule(Section):
    """The rate is multiplied by a factor at fractions of the run."""

    kind: Literal["step"] = "step"
    at: tuple[Fraction, ...] = (0.9, 0.95)
    """Fractions of the run at which the rate is multiplied by `factor`."""
    factor: Positive = 0.1
    """What the rate is multiplied by at each of them."""


class PolySchedule(Section):
    """The rate falls to 0 as a power of the share of the run that is left."""

    kind: Literal["poly"] = "poly"
    power: Positive = 0.9
    """1: linearly."""


AnySchedule = Annotated[
    Annotated[StepSchedule, Tag("step")]
    | Annotated[PolySchedule, Tag("poly")]
    | Annotated[Plugin, Tag(PLUGIN_TAG)],
    Discriminator(plugins.kind),
]


def _figure(value: Any) -> Any:
    if isinstance(value, str) and not value.startswith((PLAIN, AVERAGED)):
        raise ValueError(f"a figure of the evaluations is expected, such as {PLAIN}AP")
    return value


Figure = Annotated[
    str, BeforeValidator(_figure), Described("a figure of the evaluations such as val/AP or val/loss")
]
"""A figure of the evaluations by its key in the record: val/AP, val/PQ, val/loss, val_ema/AP, ..."""


class Keep(Section):
    """The checkpoints of a run that are kept."""

    best: Figure | None = setting(None)
    """Also keep the checkpoint that is best by this figure, such as val/AP or val/loss (the smallest). Every
    evaluation then writes a checkpoint, and evaluate, predict, export, load and the `init` of another run
    take the best one by default. null: none."""
    last: Count = setting(2)
    """The newest so many checkpoints."""


class StopEarly(Section):
    """When training ends before its length."""

    metric: Figure
    """The figure that has to get better, such as val/AP."""
    patience: Count
    """Training ends at the evaluation that is this many after the best one."""


class Train(Section):
    seed: Annotated[int, Field(ge=0)] = 0
    """Of all random numbers of the run: weights, order of the images, augmentation, noise, loss points."""
    init: str | None = None
    """Weights of a whole model to start from: a run, a checkpoint, what `mpformer weights import` wrote, a
    name of `mpformer weights list`, `hf:OWNER/NAME[@REVISION]`, or a URL. What does not fit, such as the
    class head for other classes, is initialised randomly and listed; at least half of every other part has to
    fit. null: a random model with the backbone of `model.backbone.pretrained`."""
    resume_from: str | None = None
    """A run (its newest checkpoint) or one of its checkpoints to go on from under changed settings, such as a
    longer `length` or another `lr`: weights, optimiser state, step and record are taken over, `init` is not
    looked at. Model, optimiser and batch size have to be the same. null: a run of its own."""
    length: Duration = "50 epochs"
    """Of the training, in epochs, optimiser steps or images."""
    batch_size: Count = 16
    """Images of the global batch, whatever the number of workers."""
    lr: Positive = 1e-4
    """Learning rate, after the warm-up and before the schedule lowers it."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    """Of all parameters but norms and embeddings."""
    backbone_lr_factor: Annotated[float, Field(ge=0.0)] = 0.1
    """Learning rate of the backbone as a factor on `lr`; 0 keeps it as it is."""
    clip_norm: Annotated[float, Field(ge=0.0)] = 0.01
    """Largest gradient norm of the full model; 0 does not clip."""
    warmup: Fraction = 0.0
    """Fraction of the run over which the rate rises linearly from 0."""
    schedule: AnySchedule = StepSchedule()
    """How the learning rate falls."""
    optimizer: Annotated[Literal["adamw"] | Plugin, BY_NAME] = "adamw"
    """AdamW, or any `torch.optim.Optimizer`, such as `torch.optim:SGD`. Rate and weight decay of its
    parameter groups come from `lr`, `backbone_lr_factor` and `weight_decay`, the rest from its options."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on GPUs that have it, else float32."""
    micro_batch: Count | None = setting(None)
    """Most images of one forward; null: the worker's whole share of the global batch."""
    compile: bool = setting(False)
    """torch.compile of backbone, pixel decoder and decoder: for long runs, with fixed crops."""
    channels_last: bool = setting(False)
    """Maps of the backbone with the channels of a cell together, which suits the convolutions of some GPUs;
    not measured on any yet (docs/speed.md)."""
    activation_checkpointing: bool = setting(False)
    """Layers of the pixel decoder and the decoder keep only their inputs for the backward pass, and are
    computed again there: less memory, more time."""
    checkpoint_every: Duration = setting("1 epoch")
    """Interval of the checkpoints from which an interrupted run goes on."""
    keep: Keep = Keep()
    stop_early: StopEarly | None = None
    """End training once a figure of the evaluations has not become better for a while. null: never."""
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Also keep an exponential moving average of the weights, with this decay per step, such as 0.999 (after
    step t at most (1 + t) / (10 + t)). It is evaluated beside the weights, as val_ema/AP and so on. null:
    none."""
    log_every: Count = setting(20)
    """Steps between points of the metrics record."""
    profile: Annotated[int, Field(ge=0)] = setting(0)
    """Steps to profile, after the first ten of each start of the run: a trace in the run's folder, which
    chrome://tracing and ui.perfetto.dev show (docs/speed.md). 0: none."""

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, values: Any) -> Any:
        """`keep_checkpoints` was the name of `keep.last`: recipes, run folders and checkpoints have it."""
        if not isinstance(values, dict) or "keep_checkpoints" not in values:
            return values
        others = {key: value for key, value in values.items() if key != "keep_checkpoints"}
        keep, last = others.get("keep", {}), values["keep_checkpoints"]
        if not isinstance(keep, dict) or "last" in keep:
            raise ValueError("keep_checkpoints: the old name of keep.last: one of the two is expected")
        try:  # here, where it has the name that is written
            last = _COUNT.validate_python(last)
        except ValidationError:
            raise ValueError(f"keep_checkpoints: expected {words(Count)} (given: {last!r})") from None
        return {**others, "keep": {**keep, "last": last}}


_COUNT: TypeAdapter[int] = TypeAdapter(Count)


def _metric(value: Any) -> Any:
    if isinstance(value, str) and not is_reference(value):
        raise ValueError("the built-in metrics are always computed; another one is 'package.module:Name'")
    return value


class Evaluate(Section):
    every: Duration | None = None
    """Interval of evaluations during training; null: only at the end."""
    at_start: bool = False
    """Also evaluate the untrained model."""
    limit: Count | None = None
    """Use only the first images of the split; null: all."""
    score_threshold: Fraction = 0.0
    """Instances below this score are dropped."""
    top_k: Count = 100
    """Instances kept per image."""
    class_confidence: Fraction = 0.8
    """Panoptic: a query below this class probability is dropped."""
    overlap: Fraction = 0.8
    """Panoptic: a segment that is assigned less than this fraction of its mask is dropped."""
    panoptic: Literal["general", "detr"] = "general"
    """Panoptic segments by class times mask probability (MaskFormer section 3.4), or by DETR's rule (its
    class_confidence: 0.85): the largest mask of each pixel, small segments removed, `overlap` unused."""
    semantic: Literal["marginalise", "general"] = "marginalise"
    """Semantic labels from the probabilities of all queries, or of the best one (MaskFormer section 3.4)."""
    general_confidence: Fraction = 0.3
    """General inference: a query below this class probability is dropped."""
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)
    """Test-time augmentation of semantic and panoptic results: factors on the size of `data.test_resize`."""
    flip: bool = False
    """Test-time augmentation: also flip each scale horizontally."""
    boundary: bool = False
    """Also compute boundary AP."""
    metrics: tuple[Annotated[Plugin, BY_NAME, BeforeValidator(_metric)], ...] = ()
    """Further metrics, each `package.module:Name` or {kind:, options:}; see docs/extending.md."""
    layers: bool = True
    """Also compute mIoU-L and query utilisation of the decoder layers (MP-Former section 3)."""
    loss: bool = False
    """Also compute the training loss of the matching part on the images of the evaluation: val/loss."""
    batch: Count = setting(1)
    """`predict`: of so many consecutive files those of one size form a batch (evaluation predicts one at a
    time)."""
    pictures: Annotated[int, Field(ge=0)] = setting(8)
    """Images on the page of an evaluation; 0: no page."""


def _yes_or_no(value: Any) -> Any:
    """YAML reads a bare yes or no as a truth value."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


class Cluster(Section):
    workers: Count = 1
    """Training workers; the global batch does not change with them."""
    cpus_per_worker: Positive = 0.5
    """Logical CPUs of a worker; the rest is Ray Data's."""
    gpu: Annotated[Literal["auto", "yes", "no"], BeforeValidator(_yes_or_no)] = "auto"
    """Whether each worker takes a GPU; auto: when the cluster has one for each."""
    threads: Count | None = None
    """CPU threads of a worker that trains on the CPU; null: the machine's cores shared among the workers."""
    min_workers: Count | None = None
    """Fewest workers with which a run may start, or continue after a loss; null: `workers`."""
    evaluators: Annotated[int, Field(ge=0)] = 0
    """Ray tasks that evaluate in the background, each with the resources of a worker; 0: training pauses, and
    its workers evaluate. The last evaluation of a run is always done by its workers."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Restarts of a run after worker failures; -1: unlimited. Preempted machines do not count."""
    mirror: str | None = None
    """Folder or URI (s3://bucket/path, gs://bucket/path) that each run is copied to at its checkpoints, and
    restored from where it is not in the storage folder; null: none."""

    @property
    def least_workers(self) -> int:
        """With how many workers a run may start."""
        return self.min_workers or self.workers

    @model_validator(mode="after")
    def _check(self) -> Cluster:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers: {self.min_workers} is more than workers: {self.workers}")
        if self.mirror is not None:
            _without_password("cluster.mirror", self.mirror)
        return self


def _store(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("auto, null (no MLflow) or a tracking URI is expected")
    return value


class Tracking(Section):
    mlflow: Annotated[str | None, BeforeValidator(_store)] = "auto"
    """MLflow store: 'auto' is sqlite in the storage folder, null none, else a tracking URI."""
    also: tuple[Annotated[Plugin, BY_NAME], ...] = ()
    """Further trackers, fed like MLflow from the record at each checkpoint (docs/extending.md)."""

    @model_validator(mode="after")
    def _check(self) -> Tracking:
        if self.mlflow is not None:
            _without_password("tracking.mlflow", self.mlflow)
        return self


_SECRETS = {"access_key", "secret_key", "password", "token", "session_token", "sig", "x-amz-signature"}


class SecretError(ValueError):
    """A setting holds a secret; no message may repeat it."""


def _without_password(key: str, uri: str) -> None:
    """Settings are written to run folders and to MLflow, which must not hold secrets."""
    if "://" not in uri:
        return
    parts = urlsplit(uri)
    secret = _SECRETS & {name.lower() for name in parse_qs(parts.query)}
    if parts.password is not None or secret:
        raise SecretError(
            f"{key} holds a secret: leave it out, and set MLFLOW_TRACKING_USERNAME and _PASSWORD, "
            "PGPASSWORD, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role"
        )


class Config(Section):
    """All settings of one run."""

    name: str = "run"
    """Recipe name; the file's stem if not set."""
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()
    storage: str = "runs"
    """Folder of the runs."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        for key, place in (("data.root", self.data.root), ("train.init", self.train.init)):
            _without_password(key, place or "")
        for asked, name in (
            (self.model.output == "per_pixel", "model.output: per_pixel"),
            (self.model.loss.assignment == "fixed", "model.loss.assignment: fixed"),
        ):
            if asked and self.data.task != "semantic":
                raise ValueError(f"{name} needs one object per class: data.task must be semantic")
        return self
