"""A noise: each cell of an object's mask is switched off with probability `ratio`.

model.pilot.noise: {kind: erase_noise:EraseNoise, options: {ratio: 0.3}}
"""

from torch import Tensor

from mpformer.model.streams import Draws


class EraseNoise:
    def __init__(self, ratio: float = 0.2) -> None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio: 0 to 1 is expected, not {ratio}")
        self.ratio = ratio

    def __call__(self, masks: Tensor, draws: Draws) -> Tensor:
        return masks & (draws.uniform(*masks.shape[1:]) >= self.ratio)
