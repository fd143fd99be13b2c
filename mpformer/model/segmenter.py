"""The Mask2Former family: backbone, encoder if any, pixel decoder, transformer decoder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mpformer.config.model import Model as ModelConfig
from mpformer.model.architecture import Architecture, Structure
from mpformer.model.attention import recorded_weights
from mpformer.model.decoder import PixelClassifier, QueryDecoder
from mpformer.model.encoder import Encoder
from mpformer.model.pixel_decoder import build_pixel_decoder
from mpformer.types import STRIDE, ClassTable, InputError, Output, Pilots


class Segmenter(Architecture):
    """Mask2Former, MP-Former and MaskFormer, with the per-pixel baselines of the latter."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: ModelConfig, classes: ClassTable) -> None:
        # timm takes seconds to import: only where a model is built
        from mpformer.model.backbone import Backbone, normalization

        backbone = normalization(config.backbone)
        super().__init__(config.model_copy(update={"backbone": backbone}), classes)
        self.structure = structure_of(config, len(classes))
        self.backbone = Backbone(config.backbone)
        channels = config.pixel_decoder.channels
        *finer, coarsest = self.backbone.channels
        self.encoder: Encoder | None = None
        if config.decoder.encoder_layers:
            self.encoder = Encoder(config.decoder, coarsest, channels)
            coarsest = channels
        self.pixel_decoder = build_pixel_decoder(config.pixel_decoder, (*finer, coarsest))
        self.decoder: QueryDecoder | PixelClassifier
        if config.output == "per_pixel" and not config.decoder.layers:
            self.decoder = PixelClassifier(channels, len(classes))
        else:
            self.decoder = QueryDecoder(config, len(classes), coarsest)
        for name, values in (("pixel_mean", backbone.mean), ("pixel_std", backbone.std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, pilots: Pilots | None = None, all_heads: bool = False) -> Output:
        """As `Architecture.forward`.

        Raises `InputError` for sizes that are no multiples of 32, and for pilots where the model takes none.
        """
        height, width = images.shape[-2:]
        if height % STRIDE or width % STRIDE:
            raise InputError(f"images of {height}x{width}: height and width must be multiples of {STRIDE}")
        normalized = (images - self.pixel_mean) / self.pixel_std
        features = self.backbone(normalized)
        if self.encoder is not None:
            features = (*features[:-1], self.encoder(features[-1]))
        mask_features, memories = self.pixel_decoder(features)
        if self.config.decoder.memory == "backbone":
            memories = features[-1:]
        every = all_heads or self.training or pilots is not None
        return self.decoder(mask_features, memories, pilots, all_heads=every)

    def depth_of(self, name: str) -> int:
        part, _, rest = name.partition(".")
        return self.backbone.depth_of(rest) if part == "backbone" else self.backbone.depth + 1

    def checkpointed_layers(self) -> Iterator[nn.Module]:
        """The layers of encoder, pixel decoder and decoder."""
        for part in (self.encoder, self.pixel_decoder, self.decoder):
            yield from getattr(part, "layers", ())

    def use_channels_last(self) -> None:
        self.backbone.memory_format = torch.channels_last

    @contextlib.contextmanager
    def recorded_attention(self) -> Iterator[list[Tensor]]:
        attentions = self.decoder.cross_attentions if isinstance(self.decoder, QueryDecoder) else ()
        with recorded_weights(attentions) as weights:
            yield weights


def structure_of(config: ModelConfig, classes: int) -> Structure:
    decoder = config.decoder
    per_pixel = config.output == "per_pixel"
    # a per-pixel model without layers has one head whatever its queries start from
    first = 0 if per_pixel and not decoder.layers else 1 - decoder.heads_before_layers
    return Structure(
        classes=classes,
        queries=config.queries(classes),
        attention_strides=decoder.strides(),
        head_layers=tuple(range(first, decoder.layers + 1)),
        takes_pilots=config.pilot.queries > 0,
        per_pixel=per_pixel,
    )
