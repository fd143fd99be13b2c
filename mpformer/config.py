"""Every setting of mpformer: one frozen schema; loading, overriding, dumping, hashing, comparing.

A recipe is a YAML file whose keys mirror `Config`. It may name one other recipe as its `base`; its own
settings and then `key.sub=value` overrides are laid over it. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from mpformer.config_data import (  # noqa: F401
    Data,
    DataSet,
    LabelMaps,
    LabelSplit,
    LargeScaleJitter,
    MaskFiles,
    MaskSplit,
    Packed,
    ShortEdgeJitter,
    ShortestEdge,
    Split,
    TestResize,
)
from mpformer.config_model import Backbone, Decoder, Loss, Model, Pilot, PixelDecoder  # noqa: F401
from mpformer.section import Count, Fraction, Positive, Section, setting
from mpformer.types import InputError
from mpformer.yamlfile import Source, nearest, read_yaml

_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(epochs?|steps?|images?)\s*$")


def _check_duration(value: Any) -> Any:
    if not isinstance(value, str) or not _DURATION.match(value):
        raise ValueError("expected a length such as '50 epochs', '368750 steps' or '9600 images'")
    return " ".join(value.split())


Duration = Annotated[str, BeforeValidator(_check_duration)]
"""A length of training: '50 epochs', '600 steps' (of the global batch) or '9600 images'."""


def duration_in_steps(duration: str, images_per_epoch: int, batch_size: int) -> int:
    """Optimiser steps of a `Duration`, rounded up, at least 1."""
    amount, unit = _DURATION.match(duration).groups()
    per_step = {"e": batch_size / max(images_per_epoch, 1), "s": 1.0, "i": batch_size}[unit[0]]
    return max(1, -int(-float(amount) // per_step))


# --- training -------------------------------------------------------------------------------------


class StepSchedule(Section):
    kind: Literal["step"] = "step"
    at: tuple[Fraction, ...] = (0.9, 0.95)
    """Fractions of the run at which the rate is multiplied by `factor`."""
    factor: Positive = 0.1


class PolySchedule(Section):
    kind: Literal["poly"] = "poly"
    power: Positive = 0.9


class Train(Section):
    seed: Annotated[int, Field(ge=0)] = 0
    init: str | None = None
    """Weights of a whole model to start from: a run, a checkpoint, or what `mpformer weights import` wrote.
    What does not fit, such as the class head for other classes, starts anew and is listed. null: a random
    model with the backbone that `model.backbone.pretrained` says."""
    length: Duration = "50 epochs"
    batch_size: Count = 16
    """Images of the global batch, whatever the number of workers."""
    lr: Positive = 1e-4
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    backbone_lr_factor: Annotated[float, Field(ge=0.0)] = 0.1
    clip_norm: Annotated[float, Field(ge=0.0)] = 0.01
    """Largest gradient norm of the full model; 0 does not clip."""
    warmup: Fraction = 0.0
    """Fraction of the run over which the rate rises linearly from 0."""
    schedule: Annotated[StepSchedule | PolySchedule, Field(discriminator="kind")] = StepSchedule()
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on GPUs that have it, else float32."""
    micro_batch: Count | None = setting(None)
    """Most images of one forward; null: the worker's whole share of the global batch."""
    compile: bool = setting(False)
    """torch.compile of backbone, pixel decoder and decoder: for long runs, with fixed crops."""
    activation_checkpointing: bool = setting(False)
    """Layers of the pixel decoder and the decoder keep only their inputs for the backward pass, and are
    computed again there: less memory, more time."""
    checkpoint_every: Duration = setting("1 epoch")
    keep_checkpoints: Count = setting(2)
    log_every: Count = setting(20)
    """Steps between points of the metrics record."""


class Evaluate(Section):
    every: Duration | None = None
    """Evaluate during training, too; null: only at the end."""
    at_start: bool = False
    """Evaluate the untrained model, too."""
    limit: Count | None = None
    """At most that many images of the split, in its order."""
    score_threshold: Fraction = 0.0
    """Instances below this score are not kept."""
    top_k: Count = 100
    """Instances kept per image."""
    class_confidence: Fraction = 0.8
    """Panoptic: a query below this class probability is dropped."""
    overlap: Fraction = 0.8
    """Panoptic: a segment that keeps less than this share of its mask is dropped."""
    panoptic: Literal["general", "detr"] = "general"
    """Panoptic segments by class times mask probability (MaskFormer section 3.4), or as DETR finds them
    (its class_confidence: 0.85): each pixel to its largest mask, specks dropped, `overlap` unused."""
    semantic: Literal["marginalise", "general"] = "marginalise"
    """Semantic labels from all queries' probabilities, or the one best query's (MaskFormer section 3.4)."""
    general_confidence: Fraction = 0.3
    """General inference: a query below this class probability is dropped."""
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)
    """Test-time augmentation of semantic and panoptic results: factors on the size of `data.test_resize`."""
    flip: bool = False
    """Test-time augmentation: each scale mirrored, too."""
    boundary: bool = False
    """Also measure boundary AP."""
    layers: bool = True
    """Also measure the decoder's layers: mIoU-L and query utilisation (MP-Former section 3)."""
    batch: Count = setting(1)
    """`predict`: images of one size that go through the model together (evaluation takes one at a time)."""
    pictures: Annotated[int, Field(ge=0)] = 8
    """Overlays drawn at the end of a run."""


def _yes_or_no(value: Any) -> Any:
    """YAML reads a bare yes or no as a truth value."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


class Cluster(Section):
    workers: Count = 1
    """Training workers; the global batch does not change with them."""
    cpus_per_worker: Positive = 0.5
    """Logical CPUs a worker claims; the rest is Ray Data's."""
    gpu: Annotated[Literal["auto", "yes", "no"], BeforeValidator(_yes_or_no)] = "auto"
    """Whether each worker takes a GPU; auto: when the cluster has one for each."""
    threads: Count | None = None
    """CPU threads of a worker that trains on the CPU; null: the machine's cores shared among the workers."""
    min_workers: Count | None = None
    """With how many workers a run may start, or go on after a loss; null: with `workers` only."""
    evaluators: Annotated[int, Field(ge=0)] = 0
    """Tasks that evaluate beside training, each claiming what a worker claims; 0: training waits, and its
    workers evaluate. A run's last evaluation is its workers' either way."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Restarts of a run after worker failures; -1: without limit. Machines that the cloud takes back do not
    count."""
    mirror: str | None = None
    """Folder or URI (s3://bucket/path, gs://bucket/path) that each run is copied to at its checkpoints, and
    fetched from where the storage folder lacks it; null: none."""

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

    @model_validator(mode="after")
    def _check(self) -> Tracking:
        if self.mlflow is not None:
            _without_password("tracking.mlflow", self.mlflow)
        return self


def _without_password(key: str, uri: str) -> None:
    """Settings are written to run folders and to MLflow: a secret in them would be, too."""
    parts = urlsplit(uri)
    secret = {"access_key", "secret_key", "password", "token", "session_token"} & set(parse_qs(parts.query))
    if parts.password is not None or secret:
        raise ValueError(
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
        for asked, name in (
            (self.model.output == "per_pixel", "model.output: per_pixel"),
            (self.model.loss.assignment == "fixed", "model.loss.assignment: fixed"),
        ):
            if asked and self.data.task != "semantic":
                raise ValueError(f"{name} needs one object per class: data.task must be semantic")
        return self


# --- loading --------------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The settings of a recipe file with `key.sub=value` overrides laid over it.

    Raises `InputError` naming file, line, key and the nearest right key.
    """
    source = read_recipe(Path(path))
    return build_config(inline_dataset(source.overridden(overrides), Path()))


def read_recipe(path: Path) -> Source:
    """A recipe laid over its `base`, data-set file inlined; not yet checked against the schema."""
    source = read_yaml(path)
    base = source.tree.pop("base", None)
    if base is not None:
        parent = read_yaml((path.parent / str(base)).resolve(), named_by=f"{path}: base")
        if "base" in parent.tree:
            raise InputError(
                f"{parent.path}: a base has no base of its own; lay {path.name} over {parent.tree['base']}"
            )
        if isinstance(_section(source, "data").get("dataset"), str):
            _section(parent, "data").pop("dataset", None)  # nothing of the base's data set stays
        source = inline_dataset(parent, parent.path.parent).laid_under(inline_dataset(source, path.parent))
    else:
        source = inline_dataset(source, path.parent)
    source.tree.setdefault("name", path.stem)
    return source


def _section(source: Source, name: str) -> dict[str, Any]:
    found = source.tree.get(name)
    return found if isinstance(found, dict) else {}


def inline_dataset(source: Source, folder: Path) -> Source:
    """With the file that `data.dataset` names, if it names one, read in its place; relative to `folder`."""
    data = source.tree.get("data")
    if isinstance(data, dict) and isinstance(data.get("dataset"), str):
        dataset = read_dataset(
            folder / data["dataset"], named_by=f"{source.place(['data', 'dataset'])}: data.dataset"
        )
        tree = {**source.tree, "data": {**data, "dataset": dataset.tree}}
        places = {f"data.dataset.{key}": place for key, place in dataset.places.items()}
        return Source(source.path, tree, {**source.places, **places})
    return source


def read_dataset(path: Path, named_by: str = "") -> Source:
    """A data-set file; not yet checked against the schema."""
    source = read_yaml(path.resolve(), named_by)
    source.tree.setdefault("name", path.stem)
    return source


def build_config(source: Source) -> Config:
    """Check a tree of settings against the schema; `InputError` names the place of the first error."""
    try:
        return Config.model_validate(source.tree)
    except ValidationError as error:
        raise InputError(_explain(error, source)) from None


def _explain(error: ValidationError, source: Source) -> str:
    first = error.errors()[0]
    keys = _written_keys(first["loc"], source.tree, first["type"] == "missing")
    if first["type"] == "union_tag_invalid":
        keys.append(first["ctx"]["discriminator"].strip("'"))
    key = ".".join(keys)
    place = source.place(keys)
    if first["type"] == "extra_forbidden":
        known = flatten(Config().model_dump())
        return f"{place}: no setting '{key}'; nearest: {nearest(key, known, sections=True)}"
    if first["type"] in ("union_tag_invalid", "literal_error"):
        return f"{place}: {_explain_choice(key, first)}"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = "" if isinstance(given, BaseModel | dict) else f" (given: {given!r})"
    return f"{place}: {key + ': ' if key else ''}{message}{shown}"


def _explain_choice(key: str, error: ErrorDetails) -> str:
    """A value that is none of those there are, with the nearest of them."""
    context = error["ctx"]
    given = context.get("tag", error["input"])
    expected = context.get("expected_tags") or context["expected"]
    names = re.findall(r"'([^']*)'", expected)
    return f"{key}: {given!r} is none of {expected}; nearest: {nearest(str(given), names)}"


def _written_keys(location: Sequence[int | str], tree: Any, missing: bool) -> list[str]:
    """The keys of a pydantic location as they stand in the file, without the tags of its unions.

    Only the last key may be absent from the file, and only if that is the error.
    """
    keys = []
    for i, part in enumerate(location):
        inside = isinstance(tree, Mapping)
        if inside and part not in tree and not (missing and i + 1 == len(location)):
            continue
        keys.append(str(part))
        if inside or (isinstance(tree, Sequence) and isinstance(part, int) and part < len(tree)):
            tree = tree.get(part) if inside else tree[part]
        else:
            tree = None
    return keys


# --- comparing ------------------------------------------------------------------------------------


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'train.lr': 1e-4, ...}: a nested mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def diff(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Settings in which two configs differ: {dotted key: (value in a, value in b)}; None where absent."""
    left, right = flatten(a.model_dump(mode="json")), flatten(b.model_dump(mode="json"))
    keys = [*left, *(k for k in right if k not in left)]
    return {k: (left.get(k), right.get(k)) for k in keys if left.get(k) != right.get(k)}


def dump_yaml(config: Config) -> str:
    """The resolved settings as YAML; `load_config` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def identity_settings(config: Config) -> dict[str, Any]:
    """Settings of model, data and train that differ from their defaults and change what is computed."""
    neutral = set(_neutral_keys(Config))
    neutral.add("train.seed")  # the seed stands in the run's name by itself
    changed = diff(config, Config())
    return {
        key: value[0]
        for key, value in sorted(changed.items())
        if key.split(".")[0] in ("model", "data", "train") and key not in neutral
    }


def _neutral_keys(section: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in section.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("identity") is False:
            yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _neutral_keys(field.annotation, f"{prefix}{name}.")


def config_hash(config: Config) -> str:
    """Eight hexadecimal digits that depend on `identity_settings` alone."""
    text = json.dumps(identity_settings(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_name(config: Config) -> str:
    """The run's identity within its storage: recipe or row name, settings' hash, seed; no time stamp."""
    return f"{config.name}-{config_hash(config)}-s{config.train.seed}"
