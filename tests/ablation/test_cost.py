"""Hours and money against hand-worked cases and the hours that MP-Former prints."""

import math
import re
from pathlib import Path

import pytest
import yaml

from mpformer.ablation.cost import Hours, PlanOptions
from mpformer.ablation.plan import plan_text
from mpformer.ablation.spec import load_study
from mpformer.types import InputError

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
GUIDE = EXPERIMENTS.parent / "docs" / "ablations.md"
COSTS = yaml.safe_load((EXPERIMENTS / "costs.yaml").read_text())


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(InputError, match=r"plan\.gpu.*nearest: plan\.gpus"):
        PlanOptions.read({"gpu": 3})


def test_the_guide_lists_every_option_with_its_default():
    rows = re.findall(r"^\| `plan\.(\w+)` \| (.+?) \|", GUIDE.read_text(), re.MULTILINE)
    defaults = {name: field.default for name, field in PlanOptions.model_fields.items()}
    shown = {name: "none" if value is None else f"{value:g}" for name, value in defaults.items()}
    assert dict(rows) == {**shown, "costs": "`costs.yaml`"}


def speeds() -> dict[tuple[str, str, bool], float]:
    """GPU-seconds per image of Table 6 by (data set and task, backbone, pilots)."""
    entries = [Hours.model_validate(entry) for entry in COSTS["hours"]]
    return {
        (f"{e.dataset} {e.task}", e.backbone, e.pilots): e.gpu_seconds_per_image(COSTS["images"][e.dataset])
        for e in entries
    }


def test_a_step_time_of_table_6_by_hand():
    # 62.5 h x 3600 s x 4 GPUs / (50 epochs x 118,287 images)
    assert speeds()["coco instance", "resnet50", False] == pytest.approx(0.152172, rel=1e-5)
    # 12.3 h x 3600 x 2 / (80,000 steps x 16)
    assert speeds()["ade20k-semantic semantic", "resnet50", True] == pytest.approx(0.0691875)


def test_the_hours_of_table_6_from_step_times_of_its_other_rows():
    """What piloting costs per image, taken from the R50 rows, foretells the MP-Former hours of the others.

    Each prediction is the Mask2Former row of the same data set, task and backbone, times that cost, times the
    images. Worst case ADE20K instances of Swin-L, where the paper's own rows gain more than anywhere else.
    """
    speed = speeds()
    cost = {task: speed[task, "resnet50", True] / speed[task, "resnet50", False] for task, _, _ in speed}
    errors = {}
    for (task, backbone, pilots), printed in speed.items():
        if pilots and backbone != "resnet50":
            errors[task, backbone] = speed[task, backbone, False] * cost[task] / printed - 1
    assert {key: round(100 * error) for key, error in errors.items()} == {
        ("ade20k-panoptic panoptic", "swin_large_patch4_window12_384"): -10,
        ("ade20k-panoptic instance", "swin_large_patch4_window12_384"): 22,
        ("ade20k-semantic semantic", "swin_large_patch4_window12_384"): 7,
        ("coco-panoptic panoptic", "resnet101"): 2,
        ("coco instance", "resnet101"): -2,
    }
    assert math.sqrt(sum(e**2 for e in errors.values()) / len(errors)) < 0.13


def test_the_plan_of_table_6_has_the_printed_hours():
    """Every run of Table 6 in its paper profile is a printed one, so the sum is hours x GPUs x seeds."""
    printed = sum(entry["hours"] * entry["gpus"] for entry in COSTS["hours"])
    text = plan_text(load_study(EXPERIMENTS / "ablations/mpformer-table6.yaml", ["seeds=1"]))
    assert f"training: {printed:,.1f} GPU-hours in 20 runs" in text


def test_the_price_is_of_whole_machines():
    study = load_study(
        EXPERIMENTS / "ablations/mpformer-table10.yaml",
        ["seeds=1", "plan.gpu_seconds_per_image=0.1", "plan.gpus=12", "plan.instance=eight-gpus"],
    )
    hours = 0.1 * 16 * math.ceil(12 * 118287 / 16) / 3600  # each of the three rows on a GPU of its own
    text = plan_text(study)
    assert f"training: {3 * hours:,.1f} GPU-hours in 3 runs (as stated)" in text
    assert f"price: 2 x eight-gpus x {hours:,.1f} h x 20 USD/h = {2 * hours * 20:,.0f} USD" in text


def test_interruptions_lengthen_the_plan():
    settings = ["seeds=1", "plan.gpu_seconds_per_image=0.1", "plan.interruptions_per_hour=0.5"]
    text = plan_text(load_study(EXPERIMENTS / "ablations/mpformer-table10.yaml", settings))
    factor = math.exp(0.5 / 12) * math.expm1(0.5 * 0.5) / (0.5 * 0.5)
    assert f"x {factor:.3f} = " in text
