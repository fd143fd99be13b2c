"""What a training step may cost a GPU, counted on the device "meta": operator calls and bytes through memory.

The network alone, forward and backward, takes 2,474 calls, and at 1024x1024 in float32 741 GB with pilots and
662 GB without: the rest is that of pilots, matching and losses. MaskFormer's losses are on full masks.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

from mpformer.config import load_config

FILE = Path(__file__).parents[1] / "benchmarks" / "step_budget.py"
BUDGETS = {
    "MP-Former": ("coco-instance-r50", [], 4500, 850e9),
    "MP-Former, released flavour": ("coco-instance-r50", ["model.pilot.flavour=released"], 4500, 850e9),
    "Mask2Former": ("coco-instance-r50", ["model.pilot.queries=0"], 4000, 720e9),
    "MaskFormer": ("maskformer-coco-panoptic-r50", [], 4000, 750e9),
}

SHALLOW = ["model.backbone.name=test_resnet", "model.pixel_decoder.layers=1", "model.decoder.layers=3"]
"""A few layers of each kind: what an image or an object adds is a larger share of them than of all layers."""


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("step_budget", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(
    "name", [n if n == "MP-Former" else pytest.param(n, marks=pytest.mark.slow) for n in BUDGETS]
)
def test_a_step_stays_in_its_budget_whatever_the_batch(name, tool):
    recipe, settings, most_calls, most_bytes = BUDGETS[name]
    whole, shallow = (
        load_config(recipe, [*settings, *changes, "train.micro_batch=null"]) for changes in ([], SHALLOW)
    )

    def cost(config, images, objects, size):
        model = tool.model_on_meta(config)
        return tool.before_the_optimizer(tool.budget(model, config, images, objects, size))

    cost(shallow, 1, 1, 64)  # what is computed once per process
    calls, moved = cost(whole, 16, 7, 1024)
    assert calls <= most_calls
    assert moved <= most_bytes
    few = 1.02 * cost(shallow, 8, 7, 64)[0]
    assert cost(shallow, 16, 7, 1024)[0] <= few  # the size of an image changes bytes only
    assert cost(shallow, 16, 30, 64)[0] <= few


def test_calls_and_bytes_are_those_of_the_operators(tool):
    """By hand: an addition reads two tensors and writes one; a view and a transposition are no calls."""
    import torch

    with torch.device("meta"):
        a, b = torch.empty(10, 20), torch.empty(10, 20)
    with tool.Count() as count, count("some phase"):
        torch.add(a, b).view(20, 10).t()
        a.add_(b)
    assert count.calls == {"some phase": 2}
    assert count.bytes["some phase"] == 3 * 800 + 2 * 800
