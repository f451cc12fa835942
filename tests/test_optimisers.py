"""The preconditioner against an eigendecomposition, and against what it is for."""

import pytest
import torch
from torch import nn

from optimisers import Adam, InputDeflation, fan_in_rates


def test_adam_is_torch_s():
    weights = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    ours = [weights.clone().requires_grad_(), torch.ones(2, requires_grad=True)]
    theirs = [weights.clone().requires_grad_(), torch.ones(2, requires_grad=True)]
    own, reference = Adam(ours), torch.optim.Adam(theirs)
    for step in range(20):
        for parameters in (ours, theirs):
            for parameter in parameters:
                parameter.grad = torch.sin(parameter.detach() * 3 + step)
        if step == 10:  # the state moves to a new optimiser half-way
            state, own = own.state_dict(), Adam(ours)
            own.load_state_dict(state)
        reference.param_groups[0]["lr"] = 0.1 / (step + 1)
        own.step(0.1 / (step + 1))
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6) and not torch.equal(a, torch.ones_like(a))


def test_adam_is_torch_s_whatever_the_order_in_memory():
    """Weights of convolutions in channels_last, and of a look-up whose gradient comes transposed."""
    networks = []
    for _ in range(2):
        network = nn.ModuleDict(
            {"image": nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), "text": nn.Linear(4, 2)}
        )
        generator = torch.Generator().manual_seed(0)
        for parameter in network.parameters():
            parameter.data.normal_(generator=generator)
        networks.append(network)
    tokens, images = torch.tensor([0, 1, 2, 0]), torch.randn(4, 5, 5, 2, generator=generator).permute(0, 3, 1, 2)
    own = Adam(list(networks[0].parameters()))
    reference = torch.optim.Adam(networks[1].parameters(), lr=0.1, foreach=False)
    for _ in range(5):
        for network in networks:
            network.zero_grad()
            h = nn.functional.embedding(tokens, network["text"].weight.T) + network["text"].bias
            (network["image"](images).square().sum() + h.square().sum()).backward()
        own.step(0.1)
        reference.step()
    for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_rates_are_larger_where_the_fan_in_is_smaller():
    network = nn.Sequential(nn.Linear(30, 750), nn.LeakyReLU(), nn.Linear(750, 375), nn.LeakyReLU(), nn.Linear(375, 2))
    rates = fan_in_rates({"m": network})
    assert [rates[id(p)] for p in network.parameters()] == [25, 25, 1, 1, 2, 2]
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.ones(1)
    Adam(parameters, [1.0, 5.0]).step(0.01)
    assert [p.item() for p in parameters] == pytest.approx([-0.01, -0.05])


def test_a_parameter_without_a_gradient_stays():
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    used.grad = torch.ones(2)
    optimiser = Adam([unused, used])
    optimiser.step(0.1)
    assert torch.equal(unused, torch.ones(2)) and torch.allclose(used, torch.full((2,), 0.9))
    optimiser.zero_grad()
    assert used.grad is None
    with pytest.raises(ValueError):
        optimiser.load_state_dict(Adam([used]).state_dict())


def deflated(layer, preconditioner, inputs, steps):
    """Gradient of the layer, as backward gives it and as the preconditioner leaves it, after `steps` steps on one batch."""
    for step in range(steps):
        layer.zero_grad()
        preconditioner.before_forward(step)
        layer(inputs).square().sum().backward()
        plain = layer.weight.grad.clone()
        preconditioner.precondition()
    return plain, layer.weight.grad


def test_the_leading_directions_are_inverted_up_to_the_smallest_of_them():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([20.0, 9.0, 4.0, 2.0, 0.5, 0.4, 0.3, 0.2])
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    inputs = (torch.randn(400, 8, generator=generator) * scales) @ rotation.T
    layer = nn.Linear(8, 5)
    plain, found = deflated(layer, InputDeflation({"m": layer}, rank=4, interval=1), inputs, steps=30)
    eigenvalues, vectors = torch.linalg.eigh((inputs.T @ inputs / len(inputs)).double())
    leading, top = vectors[:, -4:], eigenvalues[-4:]
    expected = plain.double() - plain.double() @ leading @ torch.diag(1 - top[0] / top) @ leading.T
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert (plain - found).norm() > 0.5 * plain.norm(), "there must be something to deflate"


def test_between_updates_the_directions_stay():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(12, 3)
    preconditioner = InputDeflation({"m": layer}, rank=4, interval=10)
    states = []
    for step in range(12):
        preconditioner.before_forward(step)
        layer(torch.randn(64, 12, generator=generator)).square().sum().backward()
        preconditioner.precondition()
        states.append(preconditioner.state_dict()["m."][0])
    assert all(torch.equal(states[0], state) for state in states[1:10])
    assert not torch.equal(states[0], states[10]) and torch.equal(states[10], states[11])


def test_the_state_is_taken_over():
    generator = torch.Generator().manual_seed(0)
    layer, inputs = nn.Linear(12, 3), torch.randn(64, 12, generator=generator)
    one, other = InputDeflation({"m": layer}), InputDeflation({"m": layer})
    deflated(layer, one, inputs, steps=1)
    one.before_forward(1)
    other.load_state_dict(one.state_dict())
    layer.zero_grad()
    layer(inputs).square().sum().backward()
    again = layer.weight.grad.clone()
    one.precondition()
    expected, layer.weight.grad = layer.weight.grad, again
    other.precondition()
    assert torch.equal(layer.weight.grad, expected)


def test_passes_without_gradients_are_not_watched():
    layer = nn.Linear(12, 3)
    preconditioner = InputDeflation({"m": layer})
    preconditioner.before_forward(0)
    with torch.no_grad():
        layer(torch.randn(64, 12, generator=torch.Generator().manual_seed(0)))
    preconditioner.precondition()
    assert preconditioner.state_dict() == {}


def test_a_step_that_the_leading_directions_forbid_becomes_possible():
    """What it is for: least squares whose targets lie in the tail, at a learning rate that the tail needs."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.cat((torch.full((4,), 10.0), torch.full((28,), 0.3)))
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    truth = torch.randn(6, 32, generator=generator) @ rotation.T
    errors = {}
    for use in (False, True):
        draws = torch.Generator().manual_seed(1)
        layer = nn.Linear(32, 6, bias=False)
        nn.init.zeros_(layer.weight)
        preconditioner = InputDeflation({"m": layer}, rank=8)
        for step in range(300):
            inputs = (torch.randn(256, 32, generator=draws) * scales) @ rotation.T
            preconditioner.before_forward(step)
            loss = (layer(inputs) - inputs @ truth.T).square().sum(dim=1).mean()
            layer.zero_grad()
            loss.backward()
            if use:
                preconditioner.precondition()
            with torch.no_grad():  # gradient descent at a fifth of the largest rate that is stable in the tail
                layer.weight.sub_(0.2 / 0.09 * layer.weight.grad)
        errors[use] = ((layer.weight - truth).norm() / truth.norm()).item()
    assert errors[True] < 0.01 and not errors[False] < 1


@pytest.mark.parametrize("rows", [4, 16, 1000])
def test_small_batches_and_narrow_layers_stay_finite(rows):
    network = nn.Sequential(nn.Linear(3, 40), nn.LeakyReLU(0.01), nn.Linear(40, 2))
    preconditioner = InputDeflation({"m": network})
    preconditioner.before_forward(0)
    network(torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    preconditioner.precondition()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
