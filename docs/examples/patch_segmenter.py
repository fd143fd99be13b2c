"""An architecture: queries and pilots attend to the patches of an image; no pixel decoder, no pyramid.

model.architecture: {kind: patch_segmenter:PatchSegmenter, options: {channels: 64, layers: 3}}
"""

import torch
from torch import Tensor, nn

from mpformer.config.model import Model
from mpformer.model.architecture import Architecture, Structure
from mpformer.model.attention import Attention
from mpformer.types import ClassTable, Head, Output, Pilots


class PatchSegmenter(Architecture):
    def __init__(self, config: Model, classes: ClassTable, channels: int = 32, layers: int = 2) -> None:
        super().__init__(config, classes)
        count, queries = len(classes), config.decoder.queries
        self.structure = Structure(
            classes=count,
            queries=queries,
            attention_strides=((16,),) * layers,  # every layer reads the patches
            head_layers=tuple(range(1, layers + 1)),  # a head after every layer
            takes_pilots=config.pilot.queries > 0,
        )
        self.backbone = nn.Conv2d(3, channels, 16, stride=16)
        self.mask_features = nn.ConvTranspose2d(channels, channels, 4, stride=4)
        self.queries = nn.Embedding(queries, channels)
        self.layers = nn.ModuleList(Attention(channels, 4) for _ in range(layers))
        self.classify = nn.Linear(channels, count + 1)
        self.pilots = nn.Embedding(count, channels) if config.pilot.queries else None

    def forward(self, images: Tensor, pilots: Pilots | None = None, all_heads: bool = False) -> Output:
        patches = self.backbone((images - 128) / 64)  # [B,C,H/16,W/16]
        cells, features = patches.flatten(2).transpose(1, 2), self.mask_features(patches)
        x = self.queries.weight.expand(len(images), -1, -1)
        count = x.shape[1]
        if pilots is not None and self.pilots is not None:
            embedded = self.pilots(pilots.labels.clamp(min=0)) * (pilots.labels >= 0)[:, :, None]
            x = torch.cat((x, embedded), dim=1)
        heads, piloted = [], []
        for index, layer in enumerate(self.layers):
            mask = None if pilots is None else pilots.attention_masks[index]
            if mask is not None:  # [B,P,cells]; queries attend everywhere, and so does an empty mask
                mask = torch.cat((mask.new_ones(len(mask), count, mask.shape[2]), mask), dim=1)
                mask = mask | ~mask.any(dim=2, keepdim=True)
            x = x + layer(x, cells, cells, mask)
            classes, masks = self.classify(x), torch.einsum("bqc,bchw->bqhw", x, features)
            heads.append(Head(classes[:, :count], masks[:, :count]))
            piloted.append(Head(classes[:, count:], masks[:, count:]))
        if pilots is not None:
            return Output(tuple(heads), tuple(piloted))
        return Output(tuple(heads if all_heads or self.training else heads[-1:]))

    def checkpointed_layers(self) -> nn.ModuleList:
        return self.layers
