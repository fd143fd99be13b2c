"""Every row of every study is a model that can be built and predicts."""

from pathlib import Path

import pytest
import torch

from mpformer.ablation.spec import load_study
from mpformer.model.architecture import build_model

STUDIES = sorted((Path(__file__).parents[2] / "experiments/ablations").glob("*.yaml"))
CLASSES = 7
built: set[str] = set()


@pytest.mark.slow  # about a hundred small models
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_row_s_model_is_built_and_predicts(path):
    profiles = load_study(path).file.profiles
    for config in load_study(path, ["profile=smoke"] if profiles else []).runs.values():
        backbone = config.model.backbone.model_copy(update={"pretrained": None})
        model_config = config.model.model_copy(update={"backbone": backbone})
        settings = model_config.model_dump_json()
        if settings in built:
            continue
        built.add(settings)
        torch.manual_seed(0)
        model = build_model(model_config, CLASSES).eval()
        with torch.no_grad():
            out = model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        assert out.heads[-1].mask_logits.shape == (1, config.model.queries(CLASSES), 16, 16)
        assert out.heads[-1].mask_logits.isfinite().all()
