"""The plug-ins of a run: checked before anything starts, and made importable on every worker."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mpformer import plugin
from mpformer.config import Config, Plugin
from mpformer.config.model import Model as ModelConfig
from mpformer.config.plugins import references
from mpformer.data.augment import augmentation
from mpformer.evaluate.metrics import build_metrics
from mpformer.plugin import is_reference
from mpformer.train import optim
from mpformer.types import InputError

_BACKBONE_CHANNELS = (8, 16, 32, 64)
"""Channels of a backbone's maps for which a pixel decoder is made to be checked."""


def check(config: Config) -> None:
    """Import the plug-ins that the settings name and check them against the contracts of their kinds.

    Raises `InputError`. A data set's reader is checked where the data set is opened.
    """
    for key, reference in references(config):
        plugin.load(reference, key)
    if any(key.startswith("model.") for key, _ in references(config)):
        _check_model(config.model)
    augmentation(config.data.augment)
    optim.check_plugins(config.train)
    build_metrics(config.evaluate)


def _check_model(config: ModelConfig) -> None:
    # imported here: they take long, and only workers need them otherwise
    from mpformer.model.architecture import Architecture
    from mpformer.model.attention import build_cross_attention
    from mpformer.model.noise import build_noise
    from mpformer.model.pixel_decoder import build_pixel_decoder

    if isinstance(config.architecture, Plugin):
        found = plugin.load(config.architecture.kind, "model.architecture")
        if not (isinstance(found, type) and issubclass(found, Architecture)):
            raise InputError(f"model.architecture: {config.architecture.kind} is no subclass of Architecture")
    build_noise(config.pilot)
    if isinstance(config.decoder.attention, Plugin):
        build_cross_attention(config.decoder, config.pixel_decoder.channels)
    if is_reference(config.pixel_decoder.kind):
        build_pixel_decoder(config.pixel_decoder, _BACKBONE_CHANNELS)


def runtime_env(configs: Iterable[Config]) -> dict[str, Any]:
    """Ray's `runtime_env` that brings the plug-ins of these settings to the machines of a cluster."""
    found = (reference for config in configs for _, reference in references(config))
    return {"py_modules": modules} if (modules := plugin.modules_to_send(found)) else {}
