"""Parameters and FLOPs against the papers' tables."""

import pytest
from torch import nn

from mpformer.config_model import Backbone, Decoder, Model, Pilot, PixelDecoder
from mpformer.model.counting import count_parameters, count_size

SWIN = "swin_{}_patch4_window{}"
PARAMETERS = {  # millions, COCO's 80 classes (MP-Former Table 4, Mask2Former Tables 1 and 2)
    "resnet50": (100, 44),
    "resnet101": (100, 63),
    SWIN.format("tiny", "7_224"): (100, 47),
    SWIN.format("small", "7_224"): (100, 69),
    SWIN.format("base", "12_384"): (100, 107),
    SWIN.format("large", "12_384"): (200, 216),
}
FLOPS = {  # G at the crop size, ADE20K's 150 classes (Mask2Former Table V)
    "resnet50": (512, 71),
    "resnet101": (512, 90),
    SWIN.format("tiny", "7_224"): (512, 74),
    SWIN.format("small", "7_224"): (512, 98),
    SWIN.format("base", "12_384"): (640, 223),
    SWIN.format("large", "12_384"): (640, 403),
}


def plain(name: str, queries: int = 100) -> Model:
    return Model(
        backbone=Backbone(name=name, pretrained=None),
        decoder=Decoder(queries=queries),
        pilot=Pilot(queries=0),
    )


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_papers(name):
    queries, millions = PARAMETERS[name]
    size = count_size(plain(name, queries), 80, 64, 64)
    assert round(size.parameters / 1e6) == millions


@pytest.mark.parametrize("name", FLOPS)
def test_flops_are_the_papers(name):
    crop, giga = FLOPS[name]
    size = count_size(plain(name), 150, crop, crop, task="semantic")
    assert size.flops / 1e9 == pytest.approx(giga, rel=0.03)


def test_flops_of_the_decoder_by_hand():
    """One layer of the smallest decoder, each product written out."""
    c, ffn, q, k, side = 16, 24, 5, 3, 64
    config = Model(
        backbone=Backbone(name="resnet18", pretrained=None),
        pixel_decoder=PixelDecoder(layers=0, channels=c, heads=2),
        decoder=Decoder(queries=q, layers=1, heads=2, ffn=ffn),
    )
    keys = (side // 32) ** 2
    cross = 2 * q * c * c + 2 * keys * c * c + 2 * q * keys * c
    self_attention = 4 * q * c * c + 2 * q * q * c
    feed_forward = 2 * q * c * ffn
    mask_head = 3 * q * c * c + q * c * (side // 4) ** 2
    class_head = q * c * (k + 1)  # only of the last head, in inference
    size = count_size(config, k, side, side)
    assert size.flops_by_part["decoder"] == cross + self_attention + feed_forward + 2 * mask_head + class_head
    semantic = count_size(config, k, side, side, task="semantic")
    assert semantic.flops - size.flops == q * k * side * side


def test_pilots_cost_class_embeddings_only():
    with_pilots = plain("resnet50").model_copy(update={"pilot": Pilot()})
    more = (
        count_size(with_pilots, 80, 64, 64).parameters - count_size(plain("resnet50"), 80, 64, 64).parameters
    )
    assert more == 80 * 256


def test_count_parameters_counts_all():
    assert count_parameters(nn.Linear(3, 4)) == 16
