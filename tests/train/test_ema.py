"""The average of the weights: its formula, its place in checkpoints, and the model as it was afterwards."""

import torch

from mpformer.model.architecture import build_model
from mpformer.model.weights.checkpoints import EMA_FILE
from mpformer.model.weights.loading import load_checkpoint
from mpformer.train import checkpoint
from mpformer.train.checkpoint import restored_average
from mpformer.train.ema import WeightAverage
from mpformer.train.optim import build_optimizer


def _built(config, seed=0):
    torch.manual_seed(seed)
    return build_model(config.model, 3)


def _move(model, step):
    """Other weights, a function of the step."""
    random = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random))


def _bias(average):
    return average.state_dict()["decoder.class_embed.bias"]


def test_the_average_is_the_sum_of_all_weights_by_their_share(tiny_config):
    model = _built(tiny_config)
    average = WeightAverage(model, 0.5)
    seen, shares = [model.decoder.class_embed.bias.detach().double().clone()], [1.0]
    for step in range(1, 13):
        _move(model, step)
        average.update(step)
        seen.append(model.decoder.class_embed.bias.detach().double().clone())
        decay = min(0.5, (1 + step) / (10 + step))  # 2/11, 3/12, ..., from step 8 on one half
        shares = [*(share * decay for share in shares), 1 - decay]
    expected = sum(share * weights for share, weights in zip(shares, seen))
    assert abs(sum(shares) - 1) < 1e-12
    torch.testing.assert_close(_bias(average).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_model_has_the_average_for_a_while_and_then_its_own_weights_bit_for_bit(tiny_config):
    model = _built(tiny_config)
    average = WeightAverage(model, 0.9)
    _move(model, 1)
    average.update(1)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = [parameter.data_ptr() for parameter in model.parameters()]
    with average.in_place():
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), average._averages.values()))
        assert not torch.equal(model.decoder.class_embed.bias, own["decoder.class_embed.bias"])
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == places


def test_a_checkpoint_has_it_as_a_model_of_its_own_and_a_restart_goes_on_with_it(tmp_path, tiny_config):
    model = _built(tiny_config)
    average = WeightAverage(model, 0.9)
    for step in (1, 2):
        _move(model, step)
        average.update(step)
    optimizer = build_optimizer(model, tiny_config.train)
    saved = checkpoint.save(tmp_path, 2, model, optimizer, tiny_config, {}, average)
    loaded, config = load_checkpoint(saved.path / EMA_FILE)
    # with the normalisation of its images
    assert config == tiny_config.model_copy(update={"model": model.config})
    assert torch.equal(loaded.state_dict()["decoder.class_embed.bias"], _bias(average))
    assert not torch.equal(loaded.decoder.class_embed.bias, model.decoder.class_embed.bias)

    other = _built(tiny_config, seed=9)
    checkpoint.restore(saved, other, build_optimizer(other, tiny_config.train))
    again = restored_average(saved, other, 0.9)
    for one, of_it in ((model, average), (other, again)):
        _move(one, 3)
        of_it.update(3)
    assert all(torch.equal(a, b) for a, b in zip(average._averages.values(), again._averages.values()))


def test_where_a_checkpoint_has_none_it_begins_with_the_weights(tmp_path, tiny_config):
    model = _built(tiny_config)
    saved = checkpoint.save(tmp_path, 1, model, build_optimizer(model, tiny_config.train), tiny_config, {})
    assert not (saved.path / EMA_FILE).exists()
    assert torch.equal(_bias(restored_average(saved, model, 0.9)), model.decoder.class_embed.bias)
