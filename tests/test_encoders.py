"""Shapes, parameter counts and initialisation of the encoders."""

import itertools
import math

import pytest
import torch
from torch import nn

from encoders import MLPEncoder, initialise


@pytest.mark.parametrize("d, size", [(15, 10), (6, 1), (10, 5)])
def test_mlp_encoder_has_the_specified_layers(d, size):
    encoder = MLPEncoder(d, size)
    widths = [d, 10 * d, 50 * d, 50 * d, 50 * d, 50 * d, 10 * d, size]
    linear = [layer for layer in encoder if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == list(itertools.pairwise(widths))
    assert sum(p.numel() for p in encoder.parameters()) == sum((a + 1) * b for a, b in itertools.pairwise(widths))
    assert [type(layer) for layer in encoder] == [nn.Linear, nn.LeakyReLU] * 6 + [nn.Linear]
    assert all(layer.negative_slope == 0.01 for layer in encoder if isinstance(layer, nn.LeakyReLU))
    assert encoder(torch.zeros(4, d)).shape == (4, size)


def test_gradients_in_place_are_those_of_a_plain_network():
    encoder = initialise(MLPEncoder(5, 3), "he", torch.Generator().manual_seed(0)).double()
    plain = nn.Sequential(*(nn.LeakyReLU(0.01) if isinstance(layer, nn.LeakyReLU) else layer for layer in encoder))
    x = torch.randn(1100, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(encoder(x).square().sum(), list(encoder.parameters()))
    expected = torch.autograd.grad(plain(x).square().sum(), list(encoder.parameters()))
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


def test_he_initialisation_keeps_the_scale_and_the_default_one_shrinks_it():
    x = torch.randn(2000, 15, generator=torch.Generator().manual_seed(0))
    he, default = (initialise(MLPEncoder(15, 10), init, torch.Generator().manual_seed(1)) for init in ("he", "default"))
    with torch.no_grad():
        assert 0.5 < he(x).square().mean() / x.square().mean() < 4
        assert default(x).var(dim=0).mean() / x.square().mean() < 0.01
    layer = he[6]
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 1.0001 / layer.in_features), rel=0.01)
    assert layer.bias.abs().max() == 0


def test_default_initialisation_is_pytorch_s_distribution():
    drawn = initialise(MLPEncoder(15, 10), "default", torch.Generator().manual_seed(1))
    for ours, theirs in zip(drawn.parameters(), MLPEncoder(15, 10).parameters(), strict=True):
        if ours.numel() > 700:
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.06)
            assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.02)


def test_initialisation_comes_from_the_generator():
    one, again, other = (initialise(MLPEncoder(3, 2), "he", torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one[0].weight, again[0].weight) and not torch.equal(one[0].weight, other[0].weight)
    with pytest.raises(ValueError, match="xavier"):
        initialise(MLPEncoder(3, 2), "xavier", torch.Generator())
