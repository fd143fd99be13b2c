"""The plug-ins of a run: checked before anything starts, and made importable on every worker."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mpformer import plugin
from mpformer.config import Config
from mpformer.config.plugins import references
from mpformer.data.augment import augmentation
from mpformer.evaluate.metrics import build_metrics
from mpformer.tracking.plugins import TrackerPlugin
from mpformer.train import optim


def check(config: Config) -> None:
    """Import the plug-ins that the settings name and check them against the contracts of their kinds.

    Raises `InputError`. A data set's reader is checked where the data set is opened.
    """
    for key, reference in references(config):
        plugin.load(reference, key)
    if any(references(config.model)):
        from mpformer.model.architecture import check_plugins  # torch and timm take seconds to load

        check_plugins(config.model)
    augmentation(config.data.augment)
    optim.check_plugins(config.train)
    build_metrics(config.evaluate)
    for index, tracker in enumerate(config.tracking.also):
        plugin.build(tracker.kind, tracker.options, TrackerPlugin, f"tracking.also.{index}")


def runtime_env(configs: Iterable[Config]) -> dict[str, Any]:
    """Ray's `runtime_env` that brings the plug-ins of these settings to the machines of a cluster."""
    found = (reference for config in configs for _, reference in references(config))
    return {"py_modules": modules} if (modules := plugin.modules_to_send(found)) else {}
