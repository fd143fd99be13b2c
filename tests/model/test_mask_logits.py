"""Mask logits and their gradients against einsum, with queries that no loss asks for."""

import pytest
import torch

from mpformer.model.mask_logits import mask_logits_of


@pytest.mark.parametrize("asked", [[[1, 3], [0]], [[], [2]], [[], []], [[0, 1, 2, 3], [0, 1, 2, 3]]])
def test_gradients_of_the_queries_that_are_asked_for(asked):
    random = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 4, 6, dtype=torch.float64, generator=random)
    features = torch.randn(2, 6, 5, 7, dtype=torch.float64, generator=random)
    weights = torch.zeros(2, 4, 5, 7, dtype=torch.float64)
    for b, queries in enumerate(asked):
        weights[b, queries] = torch.randn(len(queries), 5, 7, dtype=torch.float64, generator=random)
    results = []
    for function in (mask_logits_of, lambda e, f: torch.einsum("bqc,bchw->bqhw", e, f)):
        leaves = [t.clone().requires_grad_(True) for t in (embeddings, features)]
        logits = function(*leaves)
        (logits * weights).sum().backward()
        results.append((logits.detach(), *(leaf.grad for leaf in leaves)))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected)


def test_not_a_number_is_not_lost():
    embeddings, features = torch.ones(1, 2, 3, requires_grad=True), torch.ones(1, 3, 4, 4, requires_grad=True)
    weights = torch.zeros(1, 2, 4, 4)
    weights[0, 1, 2, 2] = float("nan")
    (mask_logits_of(embeddings, features) * weights).sum().backward()
    assert embeddings.grad[0, 1].isnan().all()
    assert features.grad[0, :, 2, 2].isnan().all()


def test_autocast_multiplies_in_bfloat16():
    embeddings, features = (
        torch.randn(1, 2, 8, requires_grad=True),
        torch.randn(1, 8, 4, 4, requires_grad=True),
    )
    with torch.autocast("cpu", torch.bfloat16):
        logits = mask_logits_of(embeddings, features)
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    expected = features.detach().sum((2, 3)).expand_as(embeddings)
    torch.testing.assert_close(embeddings.grad, expected, atol=0.1, rtol=0.05)
