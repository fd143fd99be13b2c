"""Model FLOP utilisation: the card's peak by its name, and what is said where there is none."""

import logging

import pytest
import torch

from mpformer.config import Config
from mpformer.model.architecture import build_model
from mpformer.train import utilization
from mpformer.train.group import Group
from mpformer.train.utilization import Utilization, peak_flops

CARDS = [
    ("NVIDIA A10G", 70),
    ("NVIDIA A10", 125),
    ("NVIDIA A100-SXM4-40GB", 312),
    ("NVIDIA A100 80GB PCIe", 312),
    ("NVIDIA L4", 121),
    ("NVIDIA L40", 181),
    ("NVIDIA L40S", 362),
    ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H100 NVL", 835),
    ("NVIDIA H200", 989),
    ("NVIDIA GH200 480GB", 989),
    ("NVIDIA B200", 2250),
    ("Tesla T4", 65),
    ("Tesla V100-SXM2-16GB", 125),
    ("Tesla V100-PCIE-16GB", 112),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ("NVIDIA GeForce GTX 1080", None),
    ("NVIDIA T400", None),
    ("NVIDIA A1000", None),
]


@pytest.mark.parametrize(("card", "tera"), CARDS)
def test_the_peak_of_a_card(card, tera):
    assert peak_flops(card) == (tera and tera * 1e12)


@pytest.fixture
def card(monkeypatch):
    def use(name):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return Group(0, 2, torch.device("cuda", 0))

    return use


def config_of(tiny_config, **augment) -> Config:
    content = tiny_config.model_dump()
    return Config.model_validate({**content, "data": {**content["data"], "augment": augment}})


def test_the_share_is_flops_over_what_all_cards_could_do(tiny_config, card, monkeypatch):
    asked = []

    def count(model, height, width):
        asked.append((height, width))
        return 156e9

    monkeypatch.setattr(utilization, "count_training_flops", count)
    config = config_of(tiny_config, kind="large_scale_jitter", size=(64, 96))
    found = Utilization.of(build_model(config.model, 3), config, card("NVIDIA A100-SXM4-40GB"))
    assert found.at(images_per_second=1000) == pytest.approx(1000 * 156e9 / (2 * 312e12))
    assert asked == [(64, 96)]


def test_a_model_is_counted_in_training(tiny_config, card):
    config = config_of(tiny_config, kind="large_scale_jitter", size=(64, 64))
    model = build_model(config.model, 3).eval()
    found = Utilization.of(model, config, card("NVIDIA L4"))
    assert 0 < found.at(1.0) < 1e-3
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "augment", "said"),
    [
        ("NVIDIA GeForce GTX 1080", {"kind": "large_scale_jitter"}, "'NVIDIA GeForce GTX 1080' is not known"),
        ("NVIDIA L4", {"kind": "shortest_edge"}, "with this data.augment images differ in size"),
    ],
)
def test_why_there_is_none_is_said_once(tiny_config, card, caplog, name, augment, said):
    config = config_of(tiny_config, **augment)
    with caplog.at_level(logging.WARNING, "mpformer"):
        assert Utilization.of(build_model(config.model, 3), config, card(name)) is None
    (record,) = caplog.records
    assert said in record.getMessage()


def test_a_model_that_cannot_be_counted(tiny_config, card, caplog, monkeypatch):
    def count(*_):
        raise NotImplementedError("Could not run 'my::op' with arguments from the 'Meta' backend.\nDetails")

    monkeypatch.setattr(utilization, "count_training_flops", count)
    config = config_of(tiny_config, kind="large_scale_jitter", size=(64, 64))
    assert Utilization.of(build_model(config.model, 3), config, card("NVIDIA L4")) is None
    assert caplog.records[0].getMessage().endswith("'Meta' backend.")


def test_none_on_a_cpu_and_none_but_rank_0s(tiny_config, card):
    model = build_model(tiny_config.model, 3)
    assert Utilization.of(model, tiny_config, Group(0, 1, torch.device("cpu"))) is None
    card("NVIDIA L4")
    assert Utilization.of(model, tiny_config, Group(1, 2, torch.device("cuda", 1))) is None
