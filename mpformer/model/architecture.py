"""The contract of a model: what training and diagnostics ask of it, and the factory of `model.architecture`.

The training step, mask piloting, losses, diagnostics, optimiser groups, activation checkpointing and
compilation know a model by this contract only; its settings are read by its own files. A new architecture is
a subclass of `Architecture` in a file of its own and a line in `config.model.ARCHITECTURES`, or a plug-in.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpformer import plugin
from mpformer.config.model import ARCHITECTURES
from mpformer.config.model import Model as ModelConfig
from mpformer.config.plugins import Plugin
from mpformer.config.run import Config
from mpformer.model.noise import build_noise
from mpformer.types import ClassTable, InputError, Output, Pilots

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_TABLES = ("relative_position_bias_table", "absolute_pos_embed", "pos_embed", "cls_token")


@dataclass(frozen=True)
class Structure:
    """The features of a model's design that piloting, losses and diagnostics depend on.

    Attention layers are those in which queries attend to cells of the image; they count from 1.
    """

    classes: int
    """K"""
    queries: int
    """Q of the matching part; of a per-pixel model the number of its class maps."""
    attention_strides: tuple[tuple[int, ...], ...]
    """For each attention layer the strides of the maps that it reads, whose cells are laid end to end, each
    map row by row. Every stride is a multiple of the smallest one."""
    head_layers: tuple[int, ...]
    """For each head, in order, the attention layer after which it predicts; 0 is before layer 1."""
    takes_pilots: bool = False
    """Whether `forward` takes `Pilots`."""
    per_pixel: bool = False
    """Whether a head is a map per class, without class logits of queries."""

    def layers_of(self, heads: int) -> tuple[int, ...]:
        """The layers of the last `heads` heads, which is what a forward returns."""
        return self.head_layers[len(self.head_layers) - heads :]

    @property
    def head_prefixes(self) -> tuple[str, ...]:
        """For each head what the names of its losses begin with: 'head_3/'; nothing for the last head."""
        return (*(f"head_{layer}/" for layer in self.head_layers[:-1]), "")


@dataclass(frozen=True)
class ModelParameter:
    """A parameter and what the optimiser's groups depend on."""

    name: str
    parameter: nn.Parameter
    in_backbone: bool
    """Whether it belongs to the (pretrained) backbone, whose learning rate has a factor of its own."""
    depth: int
    """Layers of the backbone up to and including this one, 0 for its stem and embeddings; parameters after
    the backbone are one deeper than its last layer. For layer-wise learning rates."""
    decayed: bool
    """Whether weight decay applies: not to norms, embeddings and position tables."""


class Architecture(nn.Module, ABC):
    """Base class of all models.

    A subclass takes (config, classes), and as keyword arguments the options of a plug-in; it calls
    `super().__init__(config, classes)`, sets `structure` and defines `forward`. Its backbone, if its learning
    rate is to have a factor of its own, is the attribute `backbone`. The other methods have defaults.
    """

    structure: Structure
    progress: float = 1.0
    """Fraction of the training that is done, 0..1; 1, as after training, until `set_progress`."""
    progress_tensor: Tensor
    """The same as a scalar on the model's device, for compiled parts, which a changing number would compile
    anew. Not in the state dict."""
    settings: Config | None = None
    """Those of the run that the weights are of, noted by `mpformer.load`; None for a model that was built."""

    def __init__(self, config: ModelConfig, classes: ClassTable) -> None:
        super().__init__()
        self.config = config
        self.classes = classes
        self.register_buffer("progress_tensor", torch.ones(()), persistent=False)

    @abstractmethod
    def forward(self, images: Tensor, pilots: Pilots | None = None, all_heads: bool = False) -> Output:
        """images [B,3,H,W] uint8 or float in 0..255 RGB, H and W multiples of 32 -> `Output`.

        All heads are returned in training mode, with pilots, or where `all_heads` asks for them; else only
        the last one. Pilots leave the heads of the matching part as they are.
        """

    def set_progress(self, fraction: float) -> None:
        """Tell the model how much of the training is done, in 0..1: before each training step.

        It has to be a function of the step, so that a resumed run continues identically.
        """
        self.progress = fraction
        self.progress_tensor.fill_(fraction)

    def model_parameters(self) -> Iterator[ModelParameter]:
        """Every parameter once, in the order of the modules."""
        seen: set[int] = set()
        for module_name, module in self.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                full_name = f"{module_name}.{name}" if module_name else name
                undecayed = isinstance(module, (*_NORMS, nn.Embedding)) or name in _TABLES
                yield ModelParameter(
                    full_name,
                    parameter,
                    in_backbone=module_name.split(".")[0] == "backbone",
                    depth=self.depth_of(full_name),
                    decayed=not undecayed,
                )

    def depth_of(self, name: str) -> int:
        """`ModelParameter.depth` of the parameter of that name. Default: 0, all the same."""
        return 0

    def compiled_parts(self) -> Iterable[nn.Module]:
        """Modules that `train.compile` compiles one by one. Default: the model's children."""
        return self.children()

    def checkpointed_layers(self) -> Iterable[nn.Module]:
        """Modules whose activations `train.activation_checkpointing` computes again in the backward pass.
        Their inputs are positional. Default: none."""
        return ()

    def use_channels_last(self) -> None:
        """Keep the channels of a cell together in the maps of convolutions (`train.channels_last`).

        Parameters keep their layout, and so do checkpoints. Default: nothing changes.
        """

    @contextlib.contextmanager
    def recorded_attention(self) -> Iterator[list[Tensor]]:
        """The weights [B,Q,S] that queries pay to the cells of each attention layer in turn, rows sum to 1,
        of a forward that runs meanwhile; for diagnostics. Default: none."""
        yield []

    def has_live_statistics(self) -> bool:
        """Whether normalisation statistics change in training, so that workers have to agree on them."""
        return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.modules())


def build_model(config: ModelConfig, classes: ClassTable | int) -> Architecture:
    """The model of `config.architecture`, its backbone pretrained as the settings say, else random.

    `classes`: the data set's class table, or a number of nameless classes. Raises `InputError` for settings
    that the model cannot meet and for a plug-in that does not keep its contract.
    """
    table = ClassTable.numbered(classes) if isinstance(classes, int) else classes
    named = config.architecture
    reference, options = (
        (named.kind, named.options) if isinstance(named, Plugin) else (ARCHITECTURES[named], {})
    )
    model = plugin.build(reference, options, Architecture, "model.architecture", config, table)
    if not isinstance(getattr(model, "structure", None), Structure):
        raise InputError(f"model.architecture: {reference} does not set `structure`, a {__name__}.Structure")
    pilot, layers = config.pilot, len(model.structure.attention_strides)
    if pilot.queries and not model.structure.takes_pilots:
        raise InputError(f"model.pilot.queries: {reference} takes no pilots: 0 is expected")
    if not isinstance(pilot.layers, str) and max(pilot.layers, default=0) > layers:
        raise InputError(f"model.pilot.layers: {reference} has attention layers 1 to {layers}")
    build_noise(pilot)  # a noise that does not fit is an error now, not in the first step
    return model


def check_plugins(config: ModelConfig) -> None:
    """Raise `InputError` unless the plug-ins that the settings name fit their contracts.

    The model is built without memory for its weights.
    """
    with torch.device("meta"):
        build_model(config.without_pretrained(), 1)
