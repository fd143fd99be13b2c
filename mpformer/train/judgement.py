"""What the figures of a run's evaluations decide: which checkpoint is the best, and an early end."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from mpformer.config import Config
from mpformer.config.figures import AVERAGED, FIGURES, LOSSES, PLAIN
from mpformer.config.nearest import nearest
from mpformer.model.weights.checkpoints import ranked
from mpformer.tracking.lineage import read_parent
from mpformer.tracking.record import read_points
from mpformer.types import InputError


def judged(config: Config) -> bool:
    """Whether anything depends on the evaluations, so that each of them needs a checkpoint of its step."""
    return bool(_choices(config))


def _choices(config: Config) -> dict[str, str]:
    """The figures that decide something, by setting."""
    train, found = config.train, {}
    if train.keep.best is not None:
        found["train.keep.best"] = train.keep.best
    if train.stop_early is not None:
        found["train.stop_early.metric"] = train.stop_early.metric
    return found


def check(config: Config) -> None:
    """Raise `InputError` for a figure that no evaluation of the run will have, and for settings that exclude
    each other."""
    for setting, figure in _choices(config).items():
        known = list(_measured(config))
        if figure not in known and not (config.evaluate.metrics and figure not in _every(config)):
            advice = _advice(config, figure, known)
            raise InputError(f"{setting}: no evaluation of this run has {figure}; {advice}")
    if config.train.stop_early is not None and config.evaluate.every is None:
        raise InputError("train.stop_early needs evaluate.every: it decides at evaluations during training")
    if config.train.keep.best and config.train.keep.best.startswith(AVERAGED) and not config.train.ema:
        raise InputError(f"train.keep.best: {config.train.keep.best} needs train.ema")
    if config.cluster.evaluators:
        for setting, value, reason in (
            ("train.stop_early", config.train.stop_early, "where training ends would depend on their speed"),
            ("train.ema", config.train.ema, "they evaluate one set of weights"),
        ):
            if value is not None:
                raise InputError(f"{setting} needs cluster.evaluators=0: {reason}")


def _every(config: Config) -> list[str]:
    """The figures that some evaluation of the task may have."""
    names = (*FIGURES[config.data.task], *LOSSES)
    return [f"{kind}{name}" for kind in (PLAIN, AVERAGED) for name in names]


def _measured(config: Config) -> Iterator[str]:
    """Those that the evaluations of this run have; whether the data have such objects is another matter."""
    options = config.evaluate
    for key in _every(config):
        kind, name = key.split("/")
        asked = options.loss or not name.startswith("loss")
        if asked and (options.boundary or "boundary" not in name) and (config.train.ema or kind == "val"):
            yield key


def _advice(config: Config, figure: str, known: list[str]) -> str:
    if figure in _every(config):
        needed = {
            "evaluate.loss=true": "/loss" in figure,
            "evaluate.boundary=true": "boundary" in figure,
            "train.ema": figure.startswith(AVERAGED) and not config.train.ema,
        }
        return f"it needs {' and '.join(setting for setting, is_needed in needed.items() if is_needed)}"
    return f"nearest: {nearest(figure, known)}"


def check_measured(config: Config, values: Collection[str]) -> None:
    """Raise `InputError` where an evaluation lacks a figure that decides, for want of such objects."""
    for setting, figure in _choices(config).items():
        if figure not in values:
            there = ", ".join(key for key in values if key.startswith((PLAIN, AVERAGED)))
            raise InputError(f"{setting}: the evaluation has no {figure}; it has {there}")


def stops_early(run_dir: Path, config: Config, step: int) -> str | None:
    """Why training ends at the evaluation of a step, by the run's record up to there; None: it goes on.

    Of a run that goes on from another the evaluations since then count, but the best may be the other's.
    """
    rule = config.train.stop_early
    if rule is None:
        return None
    parent = read_parent(run_dir)
    first = parent.step + 1 if parent is not None else 0
    steps = [p.step for p in read_points(run_dir) if rule.metric in p.values and p.step <= step]
    if not (found := ranked(run_dir, rule.metric, steps)):
        return None
    best = found[0][0]
    since = [one for one in steps if one > best and one >= first]
    if len(since) < rule.patience:
        return None
    return f"no better {rule.metric} in {len(since)} evaluations after step {best}"
