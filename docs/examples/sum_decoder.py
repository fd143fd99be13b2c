"""A pixel decoder: every map of the backbone projected; their sum at stride 4 gives the mask features.

model.pixel_decoder: {kind: sum_decoder:SumDecoder}
"""

from torch import Tensor, nn
from torch.nn import functional as F


class SumDecoder(nn.Module):
    def __init__(self, channels: int, backbone_channels: tuple[int, ...], kernel: int = 3) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in backbone_channels)
        self.mask_features = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        maps = [lateral(feature) for lateral, feature in zip(self.laterals, features, strict=True)]
        size = maps[0].shape[2:]
        total = maps[0] + sum(F.interpolate(x, size=size, mode="nearest") for x in maps[1:])
        return self.mask_features(total), tuple(reversed(maps[1:]))
