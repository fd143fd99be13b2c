"""Model FLOP utilisation: the arithmetic that a model needs, as a share of what its cards could do."""

from __future__ import annotations

import logging
import re

import torch

from mpformer.config import Config
from mpformer.data.augment import augmentation
from mpformer.model.architecture import Architecture
from mpformer.model.counting import count_training_flops
from mpformer.train.group import Group

log = logging.getLogger(__name__)

PEAKS = {
    r"B200": 2250,
    r"B100": 1800,
    r"H200|GH200": 989,
    r"H100 PCIe": 756,
    r"H100 NVL": 835,
    r"H100": 989,
    r"A100|A800": 312,
    r"A40": 150,
    r"A30": 165,
    r"A10G": 70,
    r"A10": 125,
    r"L40S": 362,
    r"L40": 181,
    r"L4": 121,
    r"V100-PCIE": 112,
    r"V100": 125,
    r"T4": 65,
}
"""Peak of a card in TFLOP/s: dense bfloat16 products (V100 and T4: float16), by its name; the first that
matches. From NVIDIA's data sheets, whose larger figures are with sparsity."""


def peak_flops(card: str) -> float | None:
    """FLOP/s of a card by the name that CUDA gives it; None where it is not known, or a part of a card."""
    if " MIG " in card:
        return None
    found = (
        peak for name, peak in PEAKS.items() if re.search(rf"(?<![A-Z\d])(?:{name})(?![A-Za-z\d])", card)
    )
    return next((peak * 1e12 for peak in found), None)


class Utilization:
    """The utilisation of a run's cards, None where it cannot be told; why is said once, in the log."""

    def __init__(self, flops_per_image: float, peak: float) -> None:
        """peak: FLOP/s of all cards of the run together."""
        self._seconds_per_image = flops_per_image / peak

    @classmethod
    def of(cls, model: Architecture, config: Config, group: Group) -> Utilization | None:
        """That of a run on GPUs of one kind, for rank 0, which records it. None on CPUs."""
        if group.device.type != "cuda" or group.rank:
            return None
        card = torch.cuda.get_device_name(group.device)
        if (peak := peak_flops(card)) is None:
            log.warning("speed/mfu is not recorded: the peak of '%s' is not known", card)
            return None
        if (size := augmentation(config.data.augment).canvas()) is None:
            log.warning("speed/mfu is not recorded: with this data.augment images differ in size")
            return None
        try:
            flops = count_training_flops(model, *size)
        except Exception as error:  # noqa: BLE001  (plug-ins raise anything where tensors have no values)
            log.warning("speed/mfu is not recorded: the model's FLOPs cannot be counted: %s", _line(error))
            return None
        return cls(flops, peak * group.world)

    def at(self, images_per_second: float) -> float:
        """The share, 0..1, of the peak at a speed of the whole run."""
        return images_per_second * self._seconds_per_image


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
