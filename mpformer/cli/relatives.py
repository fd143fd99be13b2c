"""What `train` says of a run of the same settings but for a length or a rate. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mpformer.config import Config, duration_in_steps, identity_settings, load_config
from mpformer.shell import command
from mpformer.tracking.run_dir import RunDir, step_of
from mpformer.types import InputError

LENGTHS_AND_RATES = (
    *("train.length", "train.lr", "train.backbone_lr_factor", "train.weight_decay", "train.warmup"),
    *("train.schedule", "train.stop_early", "train.ema", "train.resume_from", "evaluate"),
)
"""Settings, or sections, in which a run may differ from that which it goes on from. (Only with early stopping
do those of the evaluation belong to a run's identity.)"""


def way_on(recipe: str, settings: Sequence[str], config: Config, run_dir: Path) -> str | None:
    """How a run that does not exist yet could go on from one that does; None where there is no such run.

    Of several the one that has got furthest. `recipe` and `settings` as they were given.
    """
    if run_dir.exists() or config.train.resume_from is not None:
        return None
    found = max(_relatives(config, run_dir), key=lambda one: one[1], default=None)
    if found is None:
        return None
    other, step, differing = found
    onward = command("train", Path(recipe), *settings, f"train.resume_from={other}")
    return f"{other}, at step {step}, differs in {differing} alone; to go on from there: {onward}"


def _relatives(config: Config, run_dir: Path) -> Iterator[tuple[Path, int, str]]:
    """(folder, step of its newest checkpoint, differing settings) of each run that could be gone on from."""
    from mpformer.model.weights.checkpoints import complete

    ours = identity_settings(config)
    for other in sorted(run_dir.parent.glob("*")):
        if not other.name.startswith(f"{config.name}-") or not (found := complete(other)):
            continue
        try:
            theirs = load_config(RunDir(other).config)
            differing = _differing(ours, identity_settings(theirs))
        except InputError:
            continue  # a run of another version, or without its plug-in, is none to propose
        step = step_of(found[-1]) or 0
        if theirs.train.seed == config.train.seed and differing and not _is_over(config, step):
            # those of evaluation count only for a run that they may end
            both = config.train.stop_early and theirs.train.stop_early
            told = [key for key in differing if both or not key.startswith("evaluate.")]
            yield other, step, ", ".join(told)


def _differing(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The settings in which two runs differ; none where one of them is no length and no rate."""
    keys = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    same_but = all(any(key == of or key.startswith(f"{of}.") for of in LENGTHS_AND_RATES) for key in keys)
    return keys if same_but else []


def _is_over(config: Config, step: int) -> bool:
    """Whether a run with these settings ends before a step; False where that takes the data to know."""
    length = config.train.length
    return "epoch" not in length and duration_in_steps(length, 0, config.train.batch_size) <= step
