"""The released flavour against what the released MP-Former decoder put out."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mpformer.config.model import Decoder, Model, Pilot, PixelDecoder
from mpformer.model.decoder import QueryDecoder
from mpformer.model.streams import SampleRandom
from mpformer.model.weights.names import official_names
from mpformer.types import Target
from tests.model.samples import pilots_for

FILE = "mpformer_decoder_1.npz"
PILOTS = {
    "points_all_layers_no_noise": {"layers": "all", "noise": {"kind": "point", "ratio": 0.0}},
    "points_first_layers_no_noise": {"layers": "first_three", "noise": {"kind": "point", "ratio": 0.0}},
    # drawn once at stride 8, where 1e-9 of a box moves nothing
    "shift_all_layers_tiny_noise": {"layers": "all", "noise": {"kind": "shift", "ratio": 1e-9}},
    "inference": None,
}


@pytest.fixture(scope="module")
def goldens():
    folder = Path(os.environ.get("MPFORMER_GOLDENS", Path(__file__).parents[3] / "shared" / "goldens"))
    if not (folder / FILE).is_file():
        pytest.skip(f"no {FILE} at {folder}: set MPFORMER_GOLDENS to the folder that holds it")
    return np.load(folder / FILE)


def settings(case: str) -> Model:
    return Model(
        pixel_decoder=PixelDecoder(channels=64),
        decoder=Decoder(queries=20, layers=9, heads=8, ffn=128),
        # the reference was made with one group: its fullest image has five objects
        pilot=Pilot(queries=5, flavour="released", label_noise=0.0, **(PILOTS[case] or {})),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", PILOTS)
def test_all_heads_agree(goldens, case, dtype):
    config = settings(case)
    decoder = QueryDecoder(config, classes=7, backbone_channels=64)
    state = {
        name: torch.from_numpy(goldens["w/" + official_names(f"decoder.{name}")[0].split("predictor.")[1]])
        for name in decoder.state_dict()
    }
    decoder.load_state_dict(state)
    decoder = decoder.to(dtype).eval()
    assert {k for k in goldens.files if k.startswith("w/")} == {
        "w/" + official_names(f"decoder.{name}")[0].split("predictor.")[1] for name in state
    }

    def tensor(key):
        return torch.from_numpy(goldens[key])

    targets = []
    for b in range(2):
        shape = tuple(goldens[f"in/masks_shape_{b}"])
        masks = np.unpackbits(goldens[f"in/masks_{b}"])[: np.prod(shape)].reshape(shape)
        targets.append(Target(tensor(f"in/labels_{b}"), torch.from_numpy(masks).bool()))
    pilots = None
    if PILOTS[case] is not None:
        pilots = pilots_for(targets, config, classes=7)
    with torch.no_grad():
        out = decoder(
            tensor("in/mask_features").to(dtype),
            tuple(tensor(f"in/memory_{i}").to(dtype) for i in range(3)),
            pilots,
        )
    parts = {"match": out.heads, "pilot": out.pilots}
    for part in ("match", "pilot") if pilots is not None else ("match",):
        classes = torch.stack([h.class_logits for h in parts[part]]).float()
        masks = torch.stack([h.mask_logits[:, :, ::4, ::4] for h in parts[part]]).float()
        torch.testing.assert_close(classes, tensor(f"out/{case}/{part}/class"), atol=1e-4, rtol=0)
        torch.testing.assert_close(masks, tensor(f"out/{case}/{part}/mask"), atol=1e-4, rtol=0)


def test_the_paper_flavour_is_another_function(goldens):
    """The comparison above can fail: uninverted masks give other pilots."""
    shape = tuple(goldens["in/masks_shape_0"])
    masks = np.unpackbits(goldens["in/masks_0"])[: np.prod(shape)].reshape(shape)
    target = Target(torch.from_numpy(goldens["in/labels_0"]), torch.from_numpy(masks).bool())
    draws = SampleRandom(0, (0,), torch.device("cpu"))
    released = settings("shift_all_layers_tiny_noise")
    paper = released.model_copy(update={"pilot": released.pilot.model_copy(update={"flavour": "paper"})})
    a = pilots_for([target], released, draws, classes=7).attention_masks[1]
    b = pilots_for([target], paper, draws, classes=7).attention_masks[1]
    assert float((a == b).float().mean()) < 0.3
