"""The probes against scikit-learn, one target at a time."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import matthews_corrcoef, r2_score
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler

import kernel_ridge
import mlp_probes
import probes
from benchmarks.numeric_eval import grid_search

# networks that use all their epochs belong to what is compared
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def make_data(samples, seed=0, size=3):
    """Standardised encodings x and t, and targets from predictable to noise, with `samples` rows to fit and to test."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(2 * samples, *shape, generator=generator)

    latent = normal(size)
    encodings = {}
    for name in ("x", "t"):
        h = torch.tanh(latent @ torch.randn(size, size, generator=generator) / 2) + latent / 2 + 0.02 * normal(size)
        encodings[name] = probes.standardise(h[:samples], h[samples:])
    targets = {
        "linear": latent[:, :1],
        "square": latent[:, :1] ** 2 - latent[:, 1:2],
        "half": latent[:, 1:2] + normal(1),
        "noise": normal(1),
        "several": torch.cat((latent[:, :2], normal(1)), dim=1),
    }
    fit_targets = {name: target[:samples] for name, target in targets.items()}
    return encodings, fit_targets, {name: target[samples:] for name, target in targets.items()}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_standardise_agrees_with_scikit_learn_constant_features_too():
    h = torch.randn(500, 4, generator=generator()) * torch.tensor([1e-3, 1.0, 50.0, 1.0]) + 3
    h[:, 3] = 0.1
    expected = StandardScaler().fit(h[:300].double().numpy())
    for part, own in zip((h[:300], h[300:]), probes.standardise(h[:300], h[300:]), strict=True):
        assert own.dtype == torch.float32
        transformed = torch.from_numpy(expected.transform(part.double().numpy()))
        torch.testing.assert_close(own.double(), transformed, rtol=1e-5, atol=1e-5)


def test_r2_agrees_with_scikit_learn_constant_outputs_too():
    target, prediction = torch.randn(2, 50, 4, generator=generator(), dtype=torch.float64)
    target[:, 2:], prediction[:, 2] = 1.5, 1.5  # constant, and predicted exactly in one of two outputs
    expected = r2_score(target.numpy(), prediction.numpy())
    found = probes.r2_by_name({"all": target, "one": target[:, 0]}, {"all": prediction, "one": prediction[:, 0]})
    assert found["all"] == pytest.approx(expected, abs=1e-12) and found["one"] < 0


def test_linear_agrees_with_scikit_learn():
    encodings, fit_targets, test_targets = make_data(400)
    fit_h, test_h = encodings["x"]
    # a duplicate and a constant feature leave the least squares problem singular
    fit_h, test_h = (torch.cat((h, h[:, :1], torch.zeros(len(h), 1)), dim=1) for h in (fit_h, test_h))
    scores = probes.linear_r2(fit_h, fit_targets, test_h, test_targets)
    predictions = probes.linear_predictions(fit_h, fit_targets, test_h)
    for name in fit_targets:
        model = LinearRegression().fit(fit_h.double().numpy(), fit_targets[name].double().numpy())
        expected = model.predict(test_h.double().numpy())
        torch.testing.assert_close(predictions[name], torch.from_numpy(expected), rtol=0, atol=1e-6)
        assert scores[name] == pytest.approx(r2_score(test_targets[name].numpy(), expected), abs=1e-6)
    assert scores["linear"] > 0.9 and scores["noise"] < 0.05


@pytest.mark.parametrize("outputs", [1, 3])
def test_networks_follow_mlp_regressor_step_by_step(outputs, monkeypatch):
    """From the same weights over the same minibatches: the same number of epochs and the same predictions."""
    monkeypatch.setattr(mlp_probes, "MAX_EPOCHS", 200)  # one output takes a thousand, over which rounding adds up
    encodings, fit_targets, _ = make_data(430)
    fit_h, test_h = encodings["x"]
    target = fit_targets["several" if outputs == 3 else "square"]
    networks, epochs = train({"x": (fit_h, test_h)}, [target])
    shared = generator()
    row = mlp_probes.initial_row(4, outputs, shared)
    hidden, output, bias = (part.double().numpy()[0] for part in mlp_probes.views(row[None], 4, outputs))
    monkeypatch.setattr(
        MLPRegressor,
        "_init_coef",
        lambda self, fan_in, fan_out, dtype: (
            (hidden[:-1].copy(), hidden[-1].copy()) if fan_out == 100 else (output.T.copy(), bias[:, 0].copy())
        ),
    )
    monkeypatch.setattr(
        "sklearn.neural_network._multilayer_perceptron.shuffle",
        lambda index, random_state: torch.randperm(len(index), generator=shared).numpy(),
    )
    expected = MLPRegressor(max_iter=mlp_probes.MAX_EPOCHS).fit(fit_h.double().numpy(), target.squeeze(1).double().numpy())
    assert expected.n_iter_ == epochs[0]
    parameters = mlp_probes.views(networks, 4, outputs)
    own = mlp_probes.network_outputs(parameters, mlp_probes.with_ones(test_h)[None], torch.tensor([0]))[0].T
    prediction = torch.from_numpy(expected.predict(test_h.double().numpy()).reshape(len(test_h), outputs))
    torch.testing.assert_close(own.double(), prediction, rtol=0, atol=2e-3)


def train(encodings, targets):
    inputs = torch.stack([mlp_probes.with_ones(fit_h) for fit_h, _ in encodings.values()])
    source = torch.arange(len(targets)) % len(encodings)
    return mlp_probes.train_networks(inputs, source, torch.stack(targets, dim=1), mlp_probes.squared_error, generator())


def test_mlp_agrees_with_scikit_learn():
    encodings, fit_targets, test_targets = make_data(1000)
    scores = probes.mlp_r2(encodings, fit_targets, test_targets, generator())
    assert list(scores) == [(encoding, target) for encoding in encodings for target in fit_targets]
    for (encoding, target), score in scores.items():
        fit_h, test_h = encodings[encoding]
        model = MLPRegressor(max_iter=mlp_probes.MAX_EPOCHS, random_state=0)
        model.fit(fit_h.numpy(), fit_targets[target].squeeze(1).numpy())
        expected = r2_score(test_targets[target].numpy(), model.predict(test_h.numpy()).reshape(len(test_h), -1))
        # at this size MLPRegressor differs by as much from itself with another seed, most of all on noise
        assert score == pytest.approx(expected, abs=0.06 if expected < 0.2 else 0.02)
    assert scores["x", "square"] > 0.9 and 0.3 < scores["x", "half"] < 0.6 and scores["x", "noise"] < 0.05


def test_fast_probes_score_as_the_exact_ones():
    encodings, fit, test = make_data(4_096)

    def scores(*schedule):
        found = probes.mlp_r2(encodings, fit, test, generator(), *schedule)
        return {key: max(score, 0) for key, score in found.items()}

    exact = scores()
    assert scores(*mlp_probes.FAST_PROBES) == pytest.approx(exact, abs=0.02)  # "square" is harder than any encoding's factor
    assert scores(30)["x", "square"] < exact["x", "square"] - 0.01


def test_a_number_of_steps_changes_nothing_else(monkeypatch):
    """So many steps as the rule to stop would take are the same steps, by the same rate, to the bit; one that falls is not."""
    monkeypatch.setattr(mlp_probes, "MAX_EPOCHS", 8)  # none stalls before
    data = make_data(1000)
    steps = 8 * math.ceil(1000 / mlp_probes.BATCH_SIZE)
    by_the_rule = probes.mlp_r2(*data, generator())
    assert probes.mlp_r2(*data, generator(), steps) == by_the_rule
    rates, real = [], mlp_probes.adam_step
    monkeypatch.setattr(mlp_probes, "adam_step", lambda *call: rates.append(call[6]) or real(*call))
    assert probes.mlp_r2(*data, generator(), steps, 10.0) != by_the_rule
    assert rates[:steps] == pytest.approx([10 * (1 - step / steps) for step in range(steps)])


def test_a_target_alone_gives_the_same_as_among_others(monkeypatch):
    """Each network stops by its own loss, and neither the others nor their leaving change it, but by rounding.

    Were all to stop with the first, the R² of `square` would change by 0.03, and its epochs by 87.
    """
    monkeypatch.setattr(mlp_probes, "MAX_EPOCHS", 200)  # over five hundred rounding changes when `square` stops
    encodings, fit_targets, test_targets = make_data(600)
    together = probes.mlp_r2(encodings, fit_targets, test_targets, generator())
    columns = [fit_targets[name] for name in ("linear", "square", "half", "noise")]
    _, epochs = train({"x": encodings["x"]}, columns)
    assert len(set(epochs.tolist())) > 1  # not all stop at once
    for name, column, count in zip(("linear", "square", "half", "noise"), columns, epochs, strict=True):
        assert abs(train({"x": encodings["x"]}, [column])[1].item() - count.item()) <= 1
        alone = probes.mlp_r2({"t": encodings["t"]}, {name: fit_targets[name]}, test_targets, generator())
        assert alone["t", name] == pytest.approx(together["t", name], abs=2e-3)


def test_mlp_repeats_exactly_and_leaves_the_global_generator_alone():
    data = make_data(300)
    state = torch.get_rng_state()
    first = probes.mlp_r2(*data, generator())
    assert first == probes.mlp_r2(*data, generator())
    assert first != probes.mlp_r2(*data, generator(1))
    assert torch.equal(state, torch.get_rng_state())


def test_encodings_of_several_sizes():
    encodings, fit_targets, test_targets = make_data(300)
    narrow = {"n": tuple(h[:, :2] for h in encodings["x"])}
    both = probes.mlp_r2(encodings | narrow, fit_targets, test_targets, generator())
    alone = probes.mlp_r2(narrow, fit_targets, test_targets, generator())
    for key, score in alone.items():
        assert both[key] == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize(("samples", "direct_size"), [(301, 4096), (302, 0)])
def test_kernel_ridge_agrees_with_grid_search(samples, direct_size, monkeypatch):
    """The same α, γ and R², with a factorisation for each α and with one for all."""
    monkeypatch.setattr(kernel_ridge, "DIRECT_SIZE", direct_size)
    encodings, fit_targets, test_targets = make_data(samples)
    fit_h, test_h = (torch.cat((h, h[:, :1]), dim=1) for h in encodings["x"])
    fit_h[1] = fit_h[0]  # a duplicate sample
    scores, best = kernel_ridge.kernel_ridge_r2(fit_h, fit_targets, test_h, test_targets, return_best=True)
    assert scores == kernel_ridge.kernel_ridge_r2(fit_h, fit_targets, test_h, test_targets)
    for name, target in fit_targets.items():
        search = grid_search(fit_h, target)
        assert best[name] == (search.best_params_["alpha"], search.best_params_["gamma"])
        expected = r2_score(test_targets[name].numpy(), search.predict(test_h.double().numpy()))
        assert scores[name] == pytest.approx(expected, abs=1e-6 if direct_size else 1e-4)
    assert len(set(best.values())) > 1


def test_kernel_ridge_breaks_ties_as_grid_search_does():
    encodings, _, _ = make_data(60)
    constant = {"constant": torch.zeros(60, 1)}  # predicted exactly by every α and γ
    _, best = kernel_ridge.kernel_ridge_r2(encodings["x"][0], constant, encodings["x"][1], constant, return_best=True)
    assert best == {"constant": (kernel_ridge.ALPHAS[0], kernel_ridge.GAMMAS[0])}


@pytest.mark.parametrize("gamma", kernel_ridge.GAMMAS)
def test_shared_coefficients_equal_a_factorisation_for_each_alpha(gamma):
    encodings, fit_targets, _ = make_data(500)
    h, targets = encodings["x"][0].double(), torch.cat(list(fit_targets.values()), dim=1).double()
    centre = math.sqrt(kernel_ridge.ALPHAS[0] * kernel_ridge.ALPHAS[-1])
    solve = kernel_ridge._ridge_solver(h, gamma, centre, torch.float64)
    kernel = torch.exp(-gamma * torch.cdist(h, h).square())
    shared = kernel_ridge._shared_coefficients(solve, targets, centre, kernel_ridge.ALPHAS)
    for alpha, own in zip(kernel_ridge.ALPHAS, shared, strict=True):
        expected = torch.linalg.solve(kernel + alpha * torch.eye(len(h), dtype=torch.float64), targets)
        assert (own - expected).norm() < 1e-2 * expected.norm()


def test_precision_follows_the_largest_eigenvalue():
    h = make_data(3000)[0]["x"][0].double()
    assert kernel_ridge._precision(h, 0.01) == torch.float64  # nearly all entries are 1
    assert kernel_ridge._precision(h, 100.0) == torch.float32
    assert kernel_ridge._precision(torch.zeros_like(h), 100.0) == torch.float64


def test_a_float32_factor_that_fails_is_made_in_float64():
    h, targets = torch.zeros(50, 2, dtype=torch.float64), torch.randn(50, 1, generator=generator()).double()
    alpha = 1e-8  # lost in float32 beside 1
    solution = kernel_ridge._ridge_solver(h, 1.0, alpha, torch.float32)(targets)
    kernel = torch.ones(50, 50, dtype=torch.float64) + alpha * torch.eye(50, dtype=torch.float64)
    torch.testing.assert_close(kernel @ solution, targets, rtol=0, atol=1e-4)


def test_wrong_inputs_are_named():
    encodings, fit_targets, test_targets = make_data(20)
    fit_h, test_h = encodings["x"]

    def all_probes(fit_h, fit_targets, test_h, test_targets):
        yield lambda: probes.linear_r2(fit_h, fit_targets, test_h, test_targets)
        yield lambda: probes.mlp_r2({"x": (fit_h, test_h)}, fit_targets, test_targets, generator())
        yield lambda: kernel_ridge.kernel_ridge_r2(fit_h, fit_targets, test_h, test_targets)

    damaged = fit_h.clone()
    damaged[3, 1] = math.nan
    infinite = fit_targets | {"half": fit_targets["half"] / 0}
    fewer = {name: target[:10] for name, target in test_targets.items()}
    cases = [
        ((damaged, fit_targets, test_h, test_targets), "fitting encoding.*not finite"),
        ((fit_h, fit_targets, test_h / 0, test_targets), "test encoding.*not finite"),
        ((fit_h, infinite, test_h, test_targets), "half.*not finite"),
        ((fit_h, fit_targets, test_h, fewer), r"linear.*\(10, 1\).*\(20, k\)"),
        ((fit_h, fit_targets, test_h, {"linear": test_targets["linear"]}), "no test targets for: square"),
        ((fit_h, fit_targets, test_h[:, :2], test_targets), "must have shapes"),
    ]
    for arguments, message in cases:
        for probe in all_probes(*arguments):
            with pytest.raises(ValueError, match=message):
                probe()
    with pytest.raises(ValueError, match="5 samples to fit"):
        kernel_ridge.kernel_ridge_r2(fit_h[:5], {"y": fit_targets["half"][:5]}, test_h, {"y": test_targets["half"]})
    with pytest.raises(ValueError, match="diverged"):
        probes.mlp_r2({"x": (fit_h * 1e30, test_h)}, fit_targets, test_targets, generator())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu():
    encodings, fit_targets, test_targets = make_data(500)
    results = {}
    for device in ("cpu", "cuda"):
        fit_h, test_h = (h.to(device) for h in encodings["x"])
        fit, test = ({name: y.to(device) for name, y in part.items()} for part in (fit_targets, test_targets))
        results[device] = (
            probes.linear_r2(fit_h, fit, test_h, test),
            kernel_ridge.kernel_ridge_r2(fit_h, fit, test_h, test),
            probes.mlp_r2({"x": (fit_h, test_h)}, fit, test, generator()),
        )
    for own, expected, tolerance in zip(results["cuda"], results["cpu"], (1e-6, 1e-6, 1e-2), strict=True):
        assert own == pytest.approx(expected, abs=tolerance)


def test_the_grid_of_kernel_ridge_is_the_specified_one():
    assert kernel_ridge.ALPHAS == (1.0, 0.1, 0.01, 0.001) and kernel_ridge.FOLDS == 3
    assert pytest.approx(np.logspace(-2, 2, 4)) == kernel_ridge.GAMMAS


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_initial_weights_are_those_of_mlp_regressor():
    row = mlp_probes.initial_row(11, 2, torch.Generator().manual_seed(0))
    hidden, output, bias = (part[0] for part in mlp_probes.views(row[None], 11, 2))
    model = MLPRegressor(max_iter=1, learning_rate_init=1e-12, random_state=0).fit(np.zeros((300, 10)), np.zeros((300, 2)))
    for own, theirs in ((hidden[:-1], model.coefs_[0]), (hidden[-1], model.intercepts_[0]), (output, model.coefs_[1])):
        assert own.abs().max().item() == pytest.approx(np.abs(theirs).max(), rel=0.06)
        assert own.std().item() == pytest.approx(theirs.std(), rel=0.25)
    assert 0 < bias.abs().max() <= output.abs().max() * 1.05


def test_a_shared_factor_has_the_precision_that_it_needs(monkeypatch):
    monkeypatch.setattr(kernel_ridge, "DIRECT_SIZE", 0)
    needed, given, real = {0.01: torch.float64, 100.0: torch.float32}, {}, kernel_ridge._ridge_solver
    monkeypatch.setattr(kernel_ridge, "_precision", lambda h, gamma: needed[gamma])
    monkeypatch.setattr(kernel_ridge, "GAMMAS", tuple(needed))
    monkeypatch.setattr(kernel_ridge, "_ridge_solver", lambda h, gamma, alpha, dtype: (
        given.setdefault(gamma, dtype) and real(h, gamma, alpha, dtype)))  # fmt: skip
    h, y = torch.randn(2, 60, 2, generator=torch.Generator().manual_seed(0))
    kernel_ridge.kernel_ridge_r2(h, {"y": y}, h, {"y": y})
    assert given == needed


# --------------------------------------------------------------------------------------------------------------
# classification


def make_classes(samples, seed=0):
    """Standardised encodings x and t of several factors, and those factors: 2 to 40 classes, from separable to noise."""
    rng = generator(seed)
    count = 2 * samples
    sizes = {"four": 4, "two": 2, "three": 3, "forty": 40, "noisy": 2, "unseen": 4}
    factors = {name: torch.randint(size, (count,), generator=rng) for name, size in sizes.items()}
    centres = torch.randn(4, 3, generator=rng) * 2
    h = centres[factors["four"]] + 0.8 * torch.randn(count, 3, generator=rng)
    h[:, 0] += 2.0 * factors["two"] + (torch.rand(count, generator=rng) < 0.8) * factors["noisy"]
    h[:, 1] += 0.25 * factors["forty"]
    h[:, 2] *= 1 + factors["three"]
    factors["constant"] = torch.full((count,), 3)
    factors["numbered from 5"] = factors["three"] + 5
    encodings = {"x": probes.standardise(h[:samples], h[samples:])}
    other = torch.tanh(h @ torch.randn(3, 3, generator=rng))
    encodings["t"] = probes.standardise(other[:samples], other[samples:])
    fit = {name: factor[:samples] for name, factor in factors.items()}
    return encodings, fit, {name: factor[samples:] for name, factor in factors.items()}


def test_matthews_correlation_agrees_with_scikit_learn():
    for classes, seed in ((2, 0), (4, 1), (40, 2)):
        target, noise = torch.randint(classes, (2, 300), generator=generator(seed))
        prediction = torch.where(torch.rand(300, generator=generator(seed)) < 0.6, target, noise)
        expected = matthews_corrcoef(target, prediction)
        assert probes.matthews_correlation(target, prediction) == pytest.approx(expected, abs=1e-12)
    constant = torch.ones(300, dtype=torch.long)
    assert probes.matthews_correlation(target, constant) == probes.matthews_correlation(constant, target) == 0.0
    assert probes.matthews_correlation(target, target) == pytest.approx(1)


def test_logistic_regression_agrees_with_scikit_learn():
    encodings, fit, test = make_classes(1000)
    for fit_h, test_h in encodings.values():
        scores = probes.logistic_mcc(fit_h, fit, test_h, test)
        assert list(scores) == list(fit)
        for name in set(fit) - {"constant"}:
            model = LogisticRegression(max_iter=1000, tol=1e-6).fit(fit_h.double().numpy(), fit[name])
            expected = matthews_corrcoef(test[name], model.predict(test_h.double().numpy()))
            assert scores[name] == pytest.approx(expected, abs=0.01), name
        assert scores["constant"] == 0.0 and scores["four"] > 0.2


def test_logistic_regression_finds_scikit_learn_s_weights():
    """Few samples, so that the penalty counts, also for two classes, where scikit-learn has one vector of weights."""
    encodings, fit, _ = make_classes(60)
    fit_h, test_h = (mlp_probes.with_ones(h).double() for h in encodings["x"])
    for name in set(fit) - {"constant"}:
        place = fit[name].unique(return_inverse=True)[1]
        logits = test_h @ probes._logistic_weights(fit_h, torch.nn.functional.one_hot(place).double()).T
        model = LogisticRegression(max_iter=5000, tol=1e-8).fit(fit_h[:, :-1].numpy(), fit[name])
        expected = torch.from_numpy(model.decision_function(test_h[:, :-1].numpy()))
        if expected.ndim == 1:
            expected = torch.stack((-expected / 2, expected / 2), dim=1)
        # with half or twice the penalty they would differ by 0.04 and more
        own, expected = (part - part.mean(dim=1, keepdim=True) for part in (logits, expected))
        torch.testing.assert_close(own, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("classes", [2, 4, 40])
def test_networks_follow_mlp_classifier_step_by_step(classes, monkeypatch):
    """From the same weights over the same minibatches: the same number of epochs and the same probabilities."""
    if classes == 40:  # thousands of epochs, over which rounding adds up
        monkeypatch.setattr(mlp_probes, "MAX_EPOCHS", 200)
    encodings, fit, test = make_classes(430)
    fit_h, test_h = encodings["x"]
    name = {2: "two", 4: "four", 40: "forty"}[classes]
    target, outputs = fit[name], 1 if classes == 2 else classes
    truth = target[:, None, None] if classes == 2 else torch.nn.functional.one_hot(target, classes)[:, None]
    loss = mlp_probes.binary_cross_entropy if classes == 2 else mlp_probes.cross_entropy
    inputs, source = mlp_probes.with_ones(fit_h)[None], torch.tensor([0])
    networks, epochs = mlp_probes.train_networks(inputs, source, truth.float(), loss, generator())
    shared = generator()
    row = mlp_probes.initial_row(4, outputs, shared)
    hidden, output, bias = (part.double().numpy()[0] for part in mlp_probes.views(row[None], 4, outputs))
    initial = {100: (hidden[:-1].copy(), hidden[-1].copy()), outputs: (output.T.copy(), bias[:, 0].copy())}
    monkeypatch.setattr(MLPClassifier, "_init_coef", lambda self, fan_in, fan_out, dtype: initial[fan_out])
    monkeypatch.setattr(
        "sklearn.neural_network._multilayer_perceptron.shuffle",
        lambda index, random_state: torch.randperm(len(index), generator=shared).numpy(),
    )
    expected = MLPClassifier(max_iter=mlp_probes.MAX_EPOCHS).fit(fit_h.double().numpy(), target.numpy())
    assert expected.n_iter_ == epochs[0]
    assert epochs[0] > 200 or classes == 40  # which is scikit-learn's default limit
    parameters = mlp_probes.views(networks, 4, outputs)
    logits = mlp_probes.network_outputs(parameters, mlp_probes.with_ones(test_h)[None], source)[0].T
    own = torch.cat((1 - logits.sigmoid(), logits.sigmoid()), dim=1) if classes == 2 else logits.softmax(dim=1)
    prediction = torch.from_numpy(expected.predict_proba(test_h.double().numpy()))
    torch.testing.assert_close(own.double(), prediction, rtol=0, atol=2e-3)
    scores = (matthews_corrcoef(test[name], probabilities.argmax(dim=1)) for probabilities in (own, prediction))
    assert next(scores) == pytest.approx(next(scores), abs=0.01)


def test_mlp_classifiers_agree_with_scikit_learn(monkeypatch):
    """All but the forty classes stop by their loss."""
    monkeypatch.setattr(mlp_probes, "MAX_EPOCHS", 600)
    encodings, fit, test = make_classes(800)
    scores = probes.mlp_mcc(encodings, fit, test, generator())
    assert list(scores) == [(encoding, target) for encoding in encodings for target in fit]
    fit_h, test_h = encodings["x"]
    for name in ("four", "two", "three", "forty"):
        model = MLPClassifier(max_iter=mlp_probes.MAX_EPOCHS, random_state=0).fit(fit_h, fit[name])
        expected = matthews_corrcoef(test[name], model.predict(test_h))
        # at this size MLPClassifier differs by as much from itself with another seed
        assert scores["x", name] == pytest.approx(expected, abs=0.03), name
    for encoding in encodings:
        assert scores[encoding, "constant"] == 0.0 and abs(scores[encoding, "unseen"]) < 0.1
        # the same network at another place of the batch, whose products a processor may round otherwise
        assert scores[encoding, "numbered from 5"] == pytest.approx(scores[encoding, "three"], abs=0.02)
    assert scores["x", "three"] > probes.logistic_mcc(fit_h, fit, test_h, test)["three"] + 0.1


def test_a_class_that_is_not_fitted_counts_as_wrong():
    encodings, fit, test = make_classes(300)
    fit, test = {"four": fit["four"].clamp(max=2)}, {"four": test["four"]}
    h = encodings["x"]
    assert 0 < probes.logistic_mcc(h[0], fit, h[1], test)["four"] < 0.9
    assert 0 < probes.mlp_mcc({"x": h}, fit, test, generator())["x", "four"] < 0.9


def test_the_paper_s_number_of_steps_is_taken_exactly():
    encodings, fit, test = make_classes(430)
    fit_h, _ = encodings["x"]
    calls = []

    def counted(outputs, targets):
        calls.append(len(targets))
        return mlp_probes.binary_cross_entropy(outputs, targets)

    truth = fit["noisy"][:, None, None].float()
    mlp_probes.train_networks(mlp_probes.with_ones(fit_h)[None], torch.tensor([0]), truth, counted, generator(), 1001)
    assert len(calls) == 1001
    few, many = (probes.mlp_mcc(encodings, fit, test, generator(), steps) for steps in (3, 600))
    assert few["x", "four"] < many["x", "four"]


def test_wrong_classes_are_named():
    encodings, fit, test = make_classes(30)
    fit_h, test_h = encodings["x"]

    def both(fit, test):
        yield lambda: probes.logistic_mcc(fit_h, fit, test_h, test)
        yield lambda: probes.mlp_mcc({"x": (fit_h, test_h)}, fit, test, generator())

    cases = [
        ({"four": fit["four"].float()}, test, "four is torch.float32"),
        ({"four": fit["four"][:5]}, test, r"four is torch.int64 \(5,\); expected \(30,\)"),
        ({"four": fit["four"]}, {"two": test["two"]}, "no test targets for: four"),
    ]
    for fit_part, test_part, message in cases:
        for probe in both(fit_part, test_part):
            with pytest.raises(ValueError, match=message):
                probe()
