"""Four strides from the one map of a plain vision transformer (ViTDet, Li et al. 2022, section 3)."""

from __future__ import annotations

from torch import Tensor, nn

_NORM_GROUPS = 32


class SimpleFeaturePyramid(nn.Module):
    """Strides 4, 8, 16 and 32 from a stride-16 map [B,C,h,w]; each level by itself, nothing top-down."""

    def __init__(self, channels: int, out_channels: int = 256) -> None:
        super().__init__()
        self.channels = (out_channels,) * 4
        half, quarter = channels // 2, channels // 4
        self.levels = nn.ModuleList(
            (
                nn.Sequential(
                    nn.ConvTranspose2d(channels, half, 2, stride=2),
                    nn.GroupNorm(1, half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, stride=2),
                    _smooth(quarter, out_channels),
                ),
                nn.Sequential(
                    nn.ConvTranspose2d(channels, half, 2, stride=2),
                    _smooth(half, out_channels),
                ),
                _smooth(channels, out_channels),
                nn.Sequential(nn.MaxPool2d(2), _smooth(channels, out_channels)),
            )
        )

    def forward(self, feature: Tensor) -> tuple[Tensor, ...]:
        """[B,C,H/16,W/16] -> four maps [B,out_channels,H/s,W/s], finest first."""
        return tuple(level(feature) for level in self.levels)


def _smooth(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 1, bias=False),
        nn.GroupNorm(_NORM_GROUPS, out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.GroupNorm(_NORM_GROUPS, out_channels),
    )
