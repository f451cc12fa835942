"""Shapes, parameter counts and initialisation of the encoders."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import probes
from encoders import CAPTION_LENGTHS, TINY_OUTPUT, ImageEncoder, MLPEncoder, SmallOutputConv2d, TextEncoder, initialise, narrowed


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


class Residual(nn.Module):
    """An encoder of one's own, which is no nn.Sequential."""

    def __init__(self):
        super().__init__()
        self.hidden, self.last = nn.Linear(5, 5), nn.Linear(5, 5)
        nn.init.zeros_(self.hidden.weight)

    def forward(self, x):
        return self.last(x + self.hidden(x))


def test_narrowed_encoders_keep_what_both_know_in_whatever_basis():
    """Two numbers that both know, one of them hardly spread, beside three that are louder and that each knows half right."""
    g = torch.Generator().manual_seed(0)
    shared, own_x, noise = torch.randn(4000, 2, generator=g), *torch.randn(2, 4000, 3, generator=g)
    own_t = (own_x + noise) / 2**0.5
    basis = torch.linalg.qr(torch.randn(5, 5, generator=g))[0]
    observed = [torch.cat((shared * torch.tensor([5.0, 1.0]), 4 * own), dim=1) @ basis for own in (own_x, own_t)]
    encoders = [nn.Sequential(nn.LeakyReLU(1.0), nn.Linear(5, 5)), Residual()]
    with torch.no_grad():
        for layer in (encoders[0][1], encoders[1].last):  # of one basis, as pairs' encodings are
            layer.weight.copy_(torch.eye(5))
        encodings = [encoder(x) for encoder, x in zip(encoders, observed, strict=True)]
        for copied, encoder, x, h in zip(narrowed(encoders, encodings, 2), encoders, observed, encodings, strict=True):
            found = copied(x)
            assert found.shape == (4000, 2) and torch.equal(encoder(x), h), "the encoders themselves stay"
            assert (probes.linear_r2(found, {"both": shared}, found, {"both": shared})["both"]) > 0.95


def test_encodings_that_do_not_vary_are_narrowed_too():
    encoders = [nn.Sequential(nn.Linear(5, 5)) for _ in range(2)]
    line = torch.randn(100, 1, generator=torch.Generator().manual_seed(0)).expand(100, 5)
    for h in (torch.zeros(100, 5), torch.ones(100, 5), line):
        assert all(encoder(h).isfinite().all() and encoder(h).shape == (100, 2) for encoder in narrowed(encoders, (h, h), 2))


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
    with torch.random.fork_rng():  # PyTorch's own draws come from global state
        torch.manual_seed(0)
        reference = MLPEncoder(15, 10)
    for ours, theirs in zip(drawn.parameters(), reference.parameters(), strict=True):
        if ours.numel() > 700:
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.06)
            assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.02)


def test_initialisation_comes_from_the_generator():
    one, again, other = (initialise(MLPEncoder(3, 2), "he", torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one[0].weight, again[0].weight) and not torch.equal(one[0].weight, other[0].weight)
    with pytest.raises(ValueError, match="xavier"):
        initialise(MLPEncoder(3, 2), "xavier", torch.Generator())


def test_narrowed_encoders_project_encodings_and_their_bias():
    g = torch.Generator().manual_seed(0)
    shared, own_x, own_t = torch.randn(4000, 2, generator=g), *torch.randn(2, 4000, 3, generator=g)
    observed = [torch.cat((shared, own), dim=1) for own in (own_x, own_t)]
    encoders = [torch.nn.Sequential(torch.nn.Linear(5, 5)) for _ in range(2)]
    with torch.no_grad():
        for (layer,) in encoders:
            layer.weight.copy_(torch.eye(5))
            layer.bias.copy_(torch.tensor([1.0, 2.0, 50.0, 50.0, 50.0]))  # the modalities agree on it, and it tells nothing
        encodings = [encoder(x) for encoder, x in zip(encoders, observed, strict=True)]
        for copied, x, h in zip(narrowed(encoders, encodings, 2), observed, encodings, strict=True):
            assert probes.linear_r2(copied(x), {"both": shared}, copied(x), {"both": shared})["both"] > 0.99
            torch.testing.assert_close(copied(x), h @ copied[0].weight.T, rtol=1e-4, atol=1e-4)


def test_narrowed_encoders_keep_the_directions_of_the_largest_ratio_also_where_the_covariance_across_is_not_symmetric():
    g = torch.Generator().manual_seed(0)
    a, noise = torch.randn(2, 500, 5, generator=g)
    h_x, h_t = a, a @ torch.randn(5, 5, generator=g) + noise
    encoders = [torch.nn.Sequential(torch.nn.Linear(5, 5)) for _ in range(2)]
    with torch.no_grad():
        for (layer,) in encoders:
            layer.weight.copy_(torch.eye(5))
    kept = narrowed(encoders, (h_x, h_t), 2)[0][0].weight.detach().double().numpy()
    x, t = (h.double().numpy() - h.double().numpy().mean(axis=0) for h in (h_x, h_t))
    ratios, directions = np.linalg.eig(np.linalg.inv(x.T @ x + t.T @ t) @ (x.T @ t + t.T @ x))
    expected = np.linalg.qr(directions[:, np.argsort(-ratios)[:2]])[0]
    assert np.allclose(kept.T @ kept, expected @ expected.T, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------
# images and captions

MEAN, STD = (0.2, 0.3, 0.4), (0.5, 0.25, 0.125)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_image_encoder_is_resnet18_on_normalised_pixels():
    encoder = initialise(ImageEncoder(4, MEAN, STD, hidden_size=7), "default", seeded()).eval()
    images = torch.randint(256, (3, 64, 64, 3), dtype=torch.uint8, generator=seeded(1))
    plain = resnet18(weights=None, num_classes=7).eval()
    plain.load_state_dict(encoder.resnet.state_dict())
    x = (images.permute(0, 3, 1, 2).float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        expected = nn.functional.leaky_relu(plain(x), 0.01) @ encoder.linear.weight.T + encoder.linear.bias
        found = encoder(images)
    assert found.shape == (3, 4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size, stride", [((1, 1), 1), ((2, 2), 1), ((1, 3), 1), ((4, 4), 2), ((3, 4), 2), ((6, 5), 1)])
def test_convolutions_of_small_images_are_convolutions(size, stride):
    """Outputs and gradients, in float64, of 1 × 1, 2 × 2, 1 × 3, 2 × 2, 2 × 2 and 6 × 5 pixels."""
    layer = SmallOutputConv2d(5, 7, 3, stride=stride, padding=1, bias=False).double()
    layer.weight.data.normal_(generator=seeded())
    layer = layer.to(memory_format=torch.channels_last)
    generator = seeded(1)
    x = torch.randn(2, *size, 5, generator=generator, dtype=torch.float64).permute(0, 3, 1, 2).requires_grad_()
    y = layer(x)
    expected = nn.functional.conv2d(x, layer.weight, stride=stride, padding=1)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad((y * weights).sum(), (x, layer.weight))
    for ours, theirs in zip(found, torch.autograd.grad((expected * weights).sum(), (x, layer.weight)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [32, 64, 96])
def test_small_outputs_of_the_image_encoder_need_no_convolution(size, monkeypatch):
    """And its other layers of 3 × 3 are convolutions of the library."""
    encoder, outputs, convolved = ImageEncoder(3, MEAN, STD).eval(), {}, []
    conv2d = nn.functional.conv2d
    monkeypatch.setattr(nn.functional, "conv2d", lambda *args: convolved.append(args[1]) or conv2d(*args))
    layers = [layer for layer in encoder.resnet.modules() if isinstance(layer, nn.Conv2d)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, _, y: outputs.update({id(layer): y[0, 0].numel()}))
    encoder(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    replaced = [layer for layer in layers if layer.kernel_size == (3, 3) and outputs[id(layer)] <= TINY_OUTPUT]
    assert len(replaced) == {32: 8, 64: 4, 96: 0}[size]
    assert {id(weight) for weight in convolved} == {id(layer.weight) for layer in layers if layer not in replaced}


def test_files_of_the_image_encoder_hold_its_weights_alone():
    names = set(ImageEncoder(3, MEAN, STD).state_dict())
    assert {name for name in names if not name.startswith("resnet.")} == {"linear.weight", "linear.bias"}
    assert {name.removeprefix("resnet.") for name in names if name.startswith("resnet.")} == set(resnet18().state_dict())


def test_default_initialisation_of_the_image_encoder_is_torchvision_s():
    drawn = initialise(ImageEncoder(3, MEAN, STD), "default", seeded())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [dict(resnet18(weights=None, num_classes=100).named_parameters()) for _ in range(32)]
    for name, ours in drawn.resnet.named_parameters():
        expected = torch.stack([parameters[name] for parameters in theirs]).std().item()
        assert ours.std().item() == pytest.approx(expected, rel=0.05, abs=1e-9), name
    again = initialise(ImageEncoder(3, MEAN, STD), "default", seeded())
    assert all(torch.equal(a, b) for a, b in zip(drawn.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("length", [4, 5, 9, 20, 164])
def test_text_encoder_is_one_hot_times_linear_then_the_specified_blocks(length):
    encoder = initialise(TextEncoder(11, length, 5), "default", seeded()).double().eval()
    tokens = torch.randint(11, (6, length), generator=seeded(1))
    with torch.no_grad():
        x = encoder.embedding(nn.functional.one_hot(tokens, 11).double()).unsqueeze(1)
        assert x.shape == (6, 1, length, 128)
        layers, channels = iter(encoder.convolutions), []
        while min(x.shape[2:]) >= 4:
            convolution, normalisation, relu = (next(layers) for _ in range(3))
            assert convolution.kernel_size == (4, 4) and convolution.stride == (2, 2) and convolution.padding == (1, 1)
            assert isinstance(normalisation, nn.BatchNorm2d) and isinstance(relu, nn.ReLU)
            channels.append(convolution.out_channels)
            x = normalisation(convolution(x)).relu()
        assert next(layers, None) is None and channels == [25, 50, 100, 200, 200, 200][: len(channels)]
        torch.testing.assert_close(encoder(tokens), encoder.linear(x.flatten(1)))


def test_gradients_of_the_look_up_are_those_of_one_hot_times_linear():
    encoder = initialise(TextEncoder(7, 6, 3), "he", seeded()).double()
    tokens = torch.randint(7, (5, 6), generator=seeded(1))
    found = torch.autograd.grad(encoder(tokens).square().sum(), list(encoder.parameters()))
    x = encoder.embedding(nn.functional.one_hot(tokens, 7).double()).unsqueeze(1)
    loss = encoder.linear(encoder.convolutions(x).flatten(1)).square().sum()
    for ours, expected in zip(found, torch.autograd.grad(loss, list(encoder.parameters())), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("length", [3, 165])
def test_captions_of_other_lengths_are_refused(length):
    with pytest.raises(ValueError, match=f"captions of {length} tokens, expected 4 to 164"):
        TextEncoder(5, length, 3)


def test_all_lengths_leave_something_to_flatten():
    for length in CAPTION_LENGTHS:
        assert TextEncoder(3, length, 1).linear.in_features >= 1


def test_batch_normalisation_of_the_text_encoder_is_pytorch_s():
    for layer in TextEncoder(5, 20, 3).modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.momentum, layer.eps, layer.affine, layer.track_running_stats) == (0.1, 1e-5, True, True)
