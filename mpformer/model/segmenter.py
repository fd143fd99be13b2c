"""The whole model: normalisation, backbone, encoder if any, pixel decoder, transformer decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpformer.config.model import Model as ModelConfig
from mpformer.model.decoder import PixelClassifier, QueryDecoder
from mpformer.model.encoder import Encoder
from mpformer.model.pixel_decoder import build_pixel_decoder
from mpformer.types import STRIDE, ClassTable, InputError, Output, Pilots

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
"""ImageNet statistics, RGB, 0..255."""


class Segmenter(nn.Module):
    """A model of the MaskFormer family. `classes` is the class table that its labels refer to."""

    def __init__(self, config: ModelConfig, classes: ClassTable) -> None:
        super().__init__()
        # timm takes seconds to load, which those who start, follow or look up runs need not wait for
        from mpformer.model.backbone import Backbone

        self.config = config
        self.classes = classes
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
        for name, values in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, pilots: Pilots | None = None, all_heads: bool = False) -> Output:
        """images [B,3,H,W] uint8 or float in 0..255 RGB, H and W multiples of 32 -> `Output`.

        All heads are returned in training mode, with pilots, or where `all_heads` asks for them; else only
        the last one. Raises `InputError` for other sizes, and for pilots where the model has none.
        """
        height, width = images.shape[-2:]
        if height % STRIDE or width % STRIDE:
            raise InputError(f"images of {height}x{width}: height and width must be multiples of {STRIDE}")
        if pilots is not None and self.decoder.pilot_embed is None:
            raise InputError("pilots for a model without mask piloting (model.pilot.queries is 0)")
        normalized = (images - self.pixel_mean) / self.pixel_std
        features = self.backbone(normalized)
        if self.encoder is not None:
            features = (*features[:-1], self.encoder(features[-1]))
        mask_features, memories = self.pixel_decoder(features)
        if self.config.decoder.memory == "backbone":
            memories = features[-1:]
        every = all_heads or self.training or pilots is not None
        return self.decoder(mask_features, memories, pilots, all_heads=every)


def build_model(config: ModelConfig, classes: ClassTable | int) -> Segmenter:
    """A model with pretrained backbone as the settings say, else random weights.

    `classes`: the data set's class table, or a number of nameless classes.
    """
    return Segmenter(config, ClassTable.numbered(classes) if isinstance(classes, int) else classes)
