"""An augmentation: crops of any size and shape resized to a square, mirrored, with a random gamma.

data.augment: {kind: gamma_crop:GammaCrop, options: {size: 256}}
"""

import numpy as np

from mpformer.data.augment import Placement
from mpformer.data.masks import Window


class GammaCrop:
    def __init__(self, size: int = 512, smallest: float = 0.3, gamma: float = 0.3) -> None:
        if size % 32:
            raise ValueError(f"size: a multiple of 32 is expected, not {size}")
        self.size, self.smallest, self.gamma = size, smallest, gamma

    def canvas(self) -> tuple[int, int]:
        return self.size, self.size

    def place(self, height: int, width: int, random: np.random.Generator) -> Placement:
        share_y, share_x = random.uniform(self.smallest, 1.0, 2)
        part_height, part_width = max(1, round(height * share_y)), max(1, round(width * share_x))
        y = int(random.integers(height - part_height + 1))
        x = int(random.integers(width - part_width + 1))
        exponent = np.exp(random.uniform(-self.gamma, self.gamma))
        table = np.round(255 * (np.arange(256) / 255) ** exponent).astype(np.uint8)
        return Placement(
            Window(x, y, part_width, part_height, self.size, self.size),
            flip=random.random() < 0.5,
            colors=lambda image: table[image],
        )
