"""A schedule: the rate falls along half a cosine from its base to `floor` times its base.

train.schedule: {kind: cosine_schedule:cosine, options: {floor: 0.01}}
"""

import math


def cosine(done: float, floor: float = 0.0) -> float:
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
