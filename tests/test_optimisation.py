"""Adam and Muon against torch's, the preconditioner against its formula in float64 and against what it is for."""

import argparse
from argparse import Namespace

import pytest
import torch
from torch import nn

from losses import LabelLoss
from running import optimisation
from running.optimisation import Adam, InputWhitening, Muon, fan_in_rates, make_optimiser, matrices_for_muon, orthogonalised


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
        own.update(0.1 / (step + 1))
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6) and not torch.equal(a, torch.ones_like(a))


def test_adam_is_torch_s_whatever_the_order_in_memory():
    """Weights of convolutions in channels_last, and of a look-up whose gradient comes transposed."""
    networks = []
    for _ in range(2):
        network = nn.ModuleDict({"image": nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), "text": nn.Linear(4, 2)})
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
        own.update(0.1)
        reference.step()
    for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(6, 6), (5, 40), (40, 5), (1, 9), (64, 576)])
def test_orthogonalising_keeps_the_directions_and_evens_the_singular_values(shape):
    """Against the singular value decomposition, and against Newton–Schulz steps as a textbook has them, in float64."""
    generator = torch.Generator().manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    for smallest in (-1.5, -7):
        values = torch.logspace(0, smallest, min(shape), dtype=torch.float64)
        matrix = 100 * u * values @ vt
        result = orthogonalised(matrix.float())
        assert result.dtype == torch.float32
        inner = u.T @ result.double() @ vt.T
        if smallest > -2:
            assert ((inner.diagonal() > 0.6) & (inner.diagonal() < 1.3)).all(), inner.diagonal()
            assert (inner - inner.diagonal().diag()).abs().max() < 1e-4
        assert inner.diagonal().abs().max() < 1.3
        a, b, c = optimisation.NEWTON_SCHULZ
        plain = matrix / matrix.norm()
        for _ in range(optimisation.NEWTON_SCHULZ_STEPS):
            square = plain @ plain.T
            plain = a * plain + (b * square + c * square @ square) @ plain
        torch.testing.assert_close(result.double(), plain, rtol=0, atol=1e-3)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon to compare with")
def test_muon_is_torch_s_for_filters_and_adam_for_all_else(monkeypatch):
    """In two orders of memory, with the state taken over half-way; torch's Muon takes matrices alone."""
    monkeypatch.setattr(optimisation, "LARGEST_FILTERS", 300)
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, 2, 2), (30, 2, 2, 2), (20, 4, 2, 2), (5, 4), (7,)]  # the third is too large
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    filters = [weight.flatten(1).clone().requires_grad_() for weight in start[:2]]
    others = [weight.clone().requires_grad_() for weight in start[2:]]
    momentum, rate = optimisation.MUON_MOMENTUM, optimisation.MUON_RATE
    muon = torch.optim.Muon(filters, weight_decay=0, momentum=momentum, nesterov=True, adjust_lr_fn="original")
    adam = torch.optim.Adam(others, foreach=False)

    def gradient(parameter, step):
        return torch.sin(parameter.detach() * 3 + step)

    for layout in (torch.contiguous_format, torch.channels_last):
        ours = [weight.clone(memory_format=layout if weight.dim() == 4 else torch.preserve_format) for weight in start]
        ours = [weight.requires_grad_() for weight in ours]
        own = Muon(ours, [0.5] * 5)
        for step in range(6):
            for parameter in ours:
                parameter.grad = gradient(parameter, step)
            if step == 3:
                state, own = own.state_dict(), Muon(ours, [0.5] * 5)
                own.load_state_dict(state)
            own.update(0.02 / (step + 1))
            if layout == torch.contiguous_format:
                for reference, parameters, factor in ((muon, filters, rate), (adam, others, 1)):
                    for parameter in parameters:
                        parameter.grad = gradient(parameter, step)
                    reference.param_groups[0]["lr"] = 0.5 * factor * 0.02 / (step + 1)
                    reference.step()
        for a, b in zip(ours, [*filters, *others], strict=True):
            torch.testing.assert_close(a.flatten(), b.flatten(), rtol=0, atol=0.02 if a.dim() == 4 else 1e-5)
    assert all((a.flatten() - b.flatten()).abs().max() > 0.1 for a, b in zip(start[:2], filters, strict=True))


def test_muon_takes_the_weights_of_networks_of_linear_layers_alone_but_the_last_s():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(5, 6), nn.LeakyReLU(), nn.Linear(6, 6), nn.LeakyReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    cnn = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3), nn.Linear(3, 3))
    modules = {"mlp": mlp, "cnn": cnn}
    taken = matrices_for_muon(modules)
    assert [id(weight) for weight in taken] == [id(mlp[i].weight) for i in (0, 2, 4)]
    optimiser = make_optimiser(modules, argparse.Namespace(layer_lr="fan-in", preconditioner="none", optimiser="muon"))
    before = [parameter.detach().clone() for parameter in mlp.parameters()]
    for parameter in mlp.parameters():
        parameter.grad = torch.randn(parameter.shape)
    optimiser.update(1e-3)
    for place, (parameter, earlier) in enumerate(zip(mlp.parameters(), before, strict=True)):
        step = (earlier - parameter).detach()
        if place in (0, 2, 4):  # those of one shape go together, each by its own gradient, whatever the fan-in
            expected = orthogonalised(parameter.grad * (1 + optimisation.MUON_MOMENTUM))
            stretch = max(1, parameter.shape[0] / parameter.shape[1]) ** 0.5
            torch.testing.assert_close(step, 1e-3 * optimisation.MUON_RATE * stretch * expected, rtol=1e-4, atol=1e-6)
        else:
            assert step.abs().max().item() == pytest.approx(
                1e-3 * optimisation.REFERENCE_FAN_IN / (5 if place == 1 else 6), rel=1e-3
            )


def test_muon_leaves_the_maps_to_labels_to_adam():
    """They are last layers, all of them, wherever they stand."""
    labels = {"shape": torch.arange(4), "x": torch.rand(4), "colour": torch.arange(4) % 3}
    heads = nn.ModuleDict({name: LabelLoss(5, labels) for name in ("image", "text")})
    assert matrices_for_muon({"objective": heads}) == matrices_for_muon({"objective": heads["text"]}) == []


def test_rates_are_larger_where_the_fan_in_is_smaller():
    network = nn.Sequential(nn.Linear(30, 750), nn.LeakyReLU(), nn.Linear(750, 375), nn.LeakyReLU(), nn.Linear(375, 2))
    rates = fan_in_rates({"m": network})
    assert [rates[id(p)] for p in network.parameters()] == [25, 25, 1, 1, 2, 2]
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.ones(1)
    Adam(parameters, [1.0, 5.0]).update(0.01)
    assert [p.item() for p in parameters] == pytest.approx([-0.01, -0.05])


def test_a_parameter_without_a_gradient_stays():
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    used.grad = torch.ones(2)
    optimiser = Adam([unused, used])
    optimiser.update(0.1)
    assert torch.equal(unused, torch.ones(2)) and torch.allclose(used, torch.full((2,), 0.9))
    optimiser.zero_grad()
    assert used.grad is None
    with pytest.raises(ValueError):
        optimiser.load_state_dict(Adam([used]).state_dict())


def whitened(layer, preconditioner, batches):
    """Gradient of the layer on the last batch, as backward gives it and as the preconditioner leaves it, a step a batch."""
    for step, inputs in enumerate(batches):
        layer.zero_grad()
        preconditioner.before_forward(step)
        layer(inputs).square().sum().backward()
        plain = layer.weight.grad.clone()
        preconditioner.precondition()
    return plain, layer.weight.grad


def batches_of(count, rows=400, width=8, seed=0):
    """Batches whose inputs vary far more in some directions than in others."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(1, -2, width)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return [(torch.randn(rows, width, generator=generator) * scales) @ rotation.T for _ in range(count)]


def test_gradients_are_multiplied_by_the_damped_inverse_of_a_moving_average():
    layer, batches = nn.Linear(8, 5), batches_of(45)
    preconditioner = InputWhitening({"m": layer}, damping=0.1, interval=2, inverse_interval=8)
    average, inverse = None, None
    for step in range(45):
        plain, found = None, None
        layer.zero_grad()
        preconditioner.before_forward(step)
        layer(batches[step]).square().sum().backward()
        plain = layer.weight.grad.clone().double()
        preconditioner.precondition()
        found = layer.weight.grad.double()
        if step % 2 == 0:
            h = batches[step].double()
            covariance = torch.stack([torch.outer(row, row) for row in h]).mean(dim=0)
            average = covariance if average is None else 0.9 * average + 0.1 * covariance
            if step < 8 or step % 8 == 0:
                level = 0.1 * torch.linalg.eigvalsh(average).mean()
                inverse = torch.linalg.inv(average / level + torch.eye(8, dtype=torch.float64))
        torch.testing.assert_close(found, plain @ inverse, rtol=1e-3, atol=1e-4 * plain.abs().max().item())
    assert (plain - found).norm() > 0.5 * plain.norm(), "there must be something to scale down"


def test_all_rows_of_a_batch_count_in_blocks_too():
    """An encoder on a CPU takes 1,100 rows in blocks, on a GPU at once: of both the covariance is that of all rows."""
    layer, (inputs,) = nn.Linear(8, 5), batches_of(1, rows=1100)
    inputs *= torch.linspace(0.1, 3, 1100)[:, None]  # the last block varies more than the first
    preconditioner = InputWhitening({"m": layer})
    preconditioner.before_forward(0)
    torch.cat([layer(block) for block in inputs.chunk(3)]).square().sum().backward()
    preconditioner.precondition()
    (covariance, _) = preconditioner.state_dict()["m."]
    expected = inputs.double().T @ inputs.double() / 1100
    torch.testing.assert_close(covariance.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_directions_below_the_damping_stay_and_those_above_are_scaled_down():
    inputs = torch.diag(torch.tensor([30.0, 3.0, 0.01])).repeat(100, 1)
    layer = nn.Linear(3, 2, bias=False)
    plain, found = whitened(layer, InputWhitening({"m": layer}, damping=0.01), [inputs])
    shrink = (found / plain).mean(dim=0)
    variances = inputs.square().mean(dim=0)
    level = 0.01 * variances.mean()
    assert shrink.tolist() == pytest.approx((1 / (variances / level + 1)).tolist(), rel=1e-3)
    assert shrink[2] > 0.99 and shrink[0] < 0.01


def test_the_state_is_taken_over():
    layer, batches = nn.Linear(8, 5), batches_of(60)
    one, other = InputWhitening({"m": layer}), InputWhitening({"m": layer})
    whitened(layer, one, batches[:33])
    other.load_state_dict(one.state_dict())
    gradients = []
    for preconditioner in (one, other):  # through an update of the average and one of the inverse
        for step in range(33, 60):
            layer.zero_grad()
            preconditioner.before_forward(step)
            layer(batches[step]).square().sum().backward()
            preconditioner.precondition()
        gradients.append(layer.weight.grad.clone())
    assert torch.equal(*gradients)
    with pytest.raises(ValueError, match="of other layers"):
        InputWhitening({"other": layer}).load_state_dict(one.state_dict())


def test_passes_without_gradients_are_not_watched():
    layer = nn.Linear(12, 3)
    preconditioner = InputWhitening({"m": layer})
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
        preconditioner = InputWhitening({"m": layer})
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


@pytest.mark.parametrize("rows", [1, 4, 16, 1000])
def test_small_batches_and_dead_layers_stay_finite(rows):
    network = nn.Sequential(nn.Linear(3, 40), nn.LeakyReLU(0.01), nn.Linear(40, 2), nn.ReLU(), nn.Linear(2, 1))
    nn.init.constant_(network[2].bias, -100.0)  # the last layer sees zeros alone
    preconditioner = InputWhitening({"m": network})
    preconditioner.before_forward(0)
    network(torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    preconditioner.precondition()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_gradients_are_whitened_first_then_clipped(kind):
    args = Namespace(layer_lr="uniform", preconditioner="inputs", optimiser=kind)
    network = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
    inputs = torch.diag(torch.tensor([30.0, 3.0, 0.3])).repeat(100, 1)
    optimiser = make_optimiser({"m": network}, args)
    for factor, is_clipped in ((100.0, True), (0.01, False)):
        optimiser.zero_grad()
        (factor * network(inputs)).square().mean().backward()
        plain = network[0].weight.grad.clone()
        other = InputWhitening({"m": network})
        other.before_forward(0)
        network(inputs)
        other.precondition()
        whitened, network[0].weight.grad = network[0].weight.grad, plain.clone()
        norm = optimiser.step(1e-9)
        assert norm.item() == pytest.approx(whitened.norm().item(), rel=1e-4)
        assert whitened.norm() < 0.5 * plain.norm() and (whitened.norm() > 2) == is_clipped
        expected = whitened * (2 / whitened.norm() if is_clipped else 1)
        torch.testing.assert_close(network[0].weight.grad, expected, rtol=1e-3, atol=1e-6)
