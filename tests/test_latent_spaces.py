"""Subsets against itertools, samplers against their moments, mixing networks against a numerical inverse."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import wishart
from sklearn.linear_model import LinearRegression

import latent_spaces
from latent_spaces import (
    MisalignedLatents,
    MixingNetwork,
    condition_numbers,
    index_from_subset,
    random_unit_column_matrices,
    seed_sequence,
    seeded_generator,
    subset_count,
    subset_from_index,
    with_marginal,
)

PREFIXES = [0, 10, 55, 175, 385, 637, 847, 967, 1012, 1022]


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_subsets_are_numbered_in_graded_lexicographic_order(n):
    listed = [subset for size in range(1, n + 1) for subset in itertools.combinations(range(n), size)]
    assert len(listed) == subset_count(n)
    assert [subset_from_index(index, n) for index in range(len(listed))] == listed
    assert [index_from_subset(subset, n) for subset in listed] == list(range(len(listed)))


def test_prefixes_of_ten_have_the_paper_s_numbers():
    assert [index_from_subset(range(size), 10) for size in range(1, 11)] == PREFIXES


def test_subsets_of_thirty_and_of_two_hundred_are_not_enumerated():
    assert subset_from_index(2**30 - 2, 30) == tuple(range(30))
    subset = (3, 50, 99, 180)
    assert subset_from_index(index_from_subset(subset, 200), 200) == subset


def test_the_empty_subset_and_numbers_out_of_range():
    assert subset_from_index(-1, 10) == () and index_from_subset((), 10) == -1
    for index in (-2, 1023):
        with pytest.raises(ValueError, match="outside"):
            subset_from_index(index, 10)
    with pytest.raises(ValueError, match="not a subset"):
        index_from_subset((1, 10), 10)


N = 400_000


def moments(z):
    z = z.double()
    return z.mean(dim=0), torch.cov(z.T)


def assert_covariance(z, expected):
    """Within six standard errors, elementwise, of mean zero and a covariance."""
    mean, covariance = moments(z)
    expected = torch.as_tensor(expected)
    variance = expected.diagonal()
    assert torch.all(mean.abs() < 6 * (variance / len(z)).sqrt())
    error = ((variance[:, None] * variance[None] + expected**2) / len(z)).sqrt()
    assert torch.all((covariance - expected).abs() < 6 * error)


@pytest.mark.parametrize("protocol", ["code", "paper"])
@pytest.mark.parametrize("dependence", [False, True])
def test_covariances_of_the_samples(protocol, dependence):
    latents = MisalignedLatents(6, 3, 62, 6, 5, causal_dependence=dependence, protocol=protocol, cond_param=0.5, margin_param=2.0)
    drawn = latents.sample(N, seeded_generator(5, "train"))
    for name in ("s", "m_x", "m_t"):
        assert_covariance(getattr(drawn, name), latents.covariances[name])
    _, joint = moments(torch.cat((drawn.s, drawn.m_x, drawn.m_t), dim=1))
    scale = joint.diagonal().sqrt()
    correlation = joint / scale[:, None] / scale[None]
    blocks = torch.block_diag(torch.ones(6, 6), torch.ones(3, 3), torch.ones(3, 3)).bool()
    assert correlation[~blocks].abs().max() < 6 / N**0.5
    # b ε has the covariance of ε thinned by change_prob off the diagonal squared
    assert_perturbation(latents, drawn)


def assert_perturbation(latents, drawn):
    difference = (drawn.s_tilde - drawn.s).double()
    touched = difference != 0
    perturbed = list(latents.perturbed)
    others = [i for i in range(6) if i not in perturbed]
    assert not touched[:, others].any()
    frequency = touched[:, perturbed].double().mean(dim=0)
    assert torch.all((frequency - 0.75).abs() < 6 * (0.75 * 0.25 / N) ** 0.5)
    i, j = perturbed[:2]
    both = (touched[:, i] & touched[:, j]).double().mean()
    assert abs(both - 0.75**2) < 6 * (0.5625 * 0.4375 / N) ** 0.5, "the coins of two dimensions must be independent"
    epsilon = latents.covariances["epsilon"]
    for i in perturbed:
        values = difference[touched[:, i], i]
        assert abs(values.var() / epsilon[i, i] - 1) < 6 * (2 / len(values)) ** 0.5
    pair = difference[touched[:, perturbed].all(dim=1)][:, perturbed]
    assert_covariance(pair, epsilon[np.ix_(perturbed, perturbed)])


def test_protocols_draw_the_covariances_together_or_apart():
    def covariances(protocol, dependence):
        return MisalignedLatents(5, 5, 0, -1, 3, causal_dependence=dependence, protocol=protocol).covariances

    same = covariances("code", True)
    assert np.array_equal(same["s"], same["epsilon"]) and np.array_equal(same["m_x"], same["m_t"])
    assert not np.array_equal(same["s"], same["m_x"])
    apart = list(covariances("paper", True).values())
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(apart, 2))
    independent = covariances("code", False)
    assert all(np.array_equal(matrix, np.eye(5)) for matrix in independent.values())
    paper = covariances("paper", False)
    assert np.array_equal(paper["s"], np.eye(5)) and not np.array_equal(paper["m_x"], paper["m_t"])
    assert not np.array_equal(paper["m_x"], np.eye(5))


def test_dependent_covariances_are_wishart():
    """The mean of Wishart(n, I) is n I; the variance of an element is n (1 + [i = j])."""
    drawn = np.array([MisalignedLatents(4, 4, 0, -1, seed, causal_dependence=True).covariances["s"] for seed in range(1500)])
    assert np.all(np.linalg.eigvalsh(drawn) > 0)
    assert np.abs(drawn.mean(axis=0) - 4 * np.eye(4)).max() < 6 * (8 / 1500) ** 0.5
    reference = wishart(4, np.eye(4)).rvs(1500, random_state=0)
    assert np.abs(drawn.var(axis=0) / reference.var(axis=0) - 1).max() < 0.5


def test_covariances_depend_on_the_seed_alone():
    one, again, other = (MisalignedLatents(4, 2, 0, -1, seed, causal_dependence=True) for seed in (1, 1, 2))
    assert np.array_equal(one.covariances["s"], again.covariances["s"])
    assert not np.array_equal(one.covariances["s"], other.covariances["s"])


def test_only_what_is_selected_is_perturbed_and_spoken_of():
    # I_θ = {0, 2}, I_ρ = {2, 3}: the text speaks of s_0 and a perturbed s_2
    latents = MisalignedLatents(4, 2, index_from_subset((0, 2), 4), index_from_subset((2, 3), 4), 0)
    assert (latents.selected, latents.perturbed, latents.unbiased) == ((0, 2), (2,), (0,))
    drawn = latents.sample(1000, seeded_generator(0, "train"))
    changed = (drawn.s != drawn.s_tilde).any(dim=0)
    assert changed.tolist() == [False, False, True, False]
    assert torch.equal(drawn.z_x, torch.cat((drawn.s, drawn.m_x), dim=1))
    assert torch.equal(drawn.z_t, torch.cat((drawn.s_tilde[:, [0, 2]], drawn.m_t), dim=1))


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_change_probability_at_its_ends(probability):
    latents = MisalignedLatents(3, 1, 6, 0, 0, change_prob=probability)
    drawn = latents.sample(5000, seeded_generator(0, "train"))
    assert (drawn.s_tilde[:, 0] != drawn.s[:, 0]).double().mean() == probability


@pytest.mark.parametrize("protocol", ["code", "paper"])
def test_what_the_unbiased_block_tells_of_each_factor_is_what_a_regression_on_it_finds(protocol):
    theta, beta = (index_from_subset(subset, 5) for subset in ((0, 1, 2, 3), (0, 2)))
    latents = MisalignedLatents(5, 3, theta, beta, 4, causal_dependence=True, change_prob=0.6, protocol=protocol)
    z = latents.sample(200_000, torch.Generator().manual_seed(1))
    block = z.s[:, [1, 3]].double().numpy()
    targets = {f"s_{i}": z.s[:, i] for i in range(5)} | {f"tilde_s_{i}": z.s_tilde[:, i] for i in (0, 2)}
    found = {}
    for name, target in (targets | {"m_x": z.m_x[:, 0], "m_t": z.m_t[:, 1], "s_inv": z.s[:, 1]}).items():
        target = target.double().numpy()
        found[name] = LinearRegression().fit(block, target).score(block, target)
    assert {name: latents.identified_r2(name) for name in found} == pytest.approx(found, abs=0.01)
    assert latents.identified_r2("s_1") == pytest.approx(1) and latents.identified_r2("tilde_s_0") < latents.identified_r2("s_0")
    for name in ("s_5", "s", "m_y", "tilde_s_"):
        with pytest.raises(ValueError, match="no factor"):
            latents.identified_r2(name)


def test_no_unbiased_block_is_an_error():
    with pytest.raises(ValueError, match="no unbiased semantics"):
        MisalignedLatents(4, 2, 4, 14, 0)


def test_two_batches_of_one_generator_are_independent():
    latents = MisalignedLatents(4, 2, 14, -1, 0)
    generator = seeded_generator(0, "train")
    anchors, negatives = (latents.sample(200_000, generator).z_x.double() for _ in range(2))
    correlation = anchors.T @ negatives / len(anchors)
    assert correlation.abs().max() < 6 / len(anchors) ** 0.5


def test_sampling_and_mixing_come_from_their_generators_alone():
    latents = MisalignedLatents(4, 2, 14, 0, 0)

    def draw(global_seed):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        mixing = MixingNetwork(4, 3).draw(np.random.default_rng(seed_sequence(4, "mixing")))
        return [latents.sample(100, seeded_generator(9, "train")).z_t, *mixing.parameters()]

    one, again = draw(0), draw(1)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(parameter.requires_grad for parameter in one[1:])


def test_streams_of_a_seed_differ():
    draws = [torch.randn(4, generator=seeded_generator(1, stream)) for stream in ("train", "monitor", "evaluate", "probe")]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws, 2))
    assert not torch.equal(draws[0], torch.randn(4, generator=seeded_generator(2, "train")))


def test_mixing_is_inverted_numerically():
    network = MixingNetwork(8, 3).draw(np.random.default_rng(1)).double()
    z = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = network(z)
    for position, layer in reversed(list(enumerate(network.layers))):
        x = torch.linalg.solve(layer.weight, x.T).T
        if position > 0:
            x = torch.where(x < 0, x / 0.2, x)
    assert torch.allclose(x, z, atol=1e-9)


def test_mixing_weights_are_unit_columns_of_the_best_thousandth():
    size = 7
    weights = np.stack([layer.weight.numpy() for layer in MixingNetwork(size, 3).draw(np.random.default_rng(2)).layers])
    assert np.allclose(np.linalg.norm(weights, axis=1), 1, atol=1e-6)
    bound = np.quantile(np.linalg.cond(random_unit_column_matrices(50_000, size, np.random.default_rng(3))), 0.001)
    assert np.all(np.linalg.cond(weights) <= bound * 1.1), "the bound is a quantile of random draws, known to a few per cent"


def test_condition_numbers_against_numpy():
    matrices = random_unit_column_matrices(50, 6, np.random.default_rng(0))
    assert np.allclose(condition_numbers(matrices), np.linalg.cond(matrices))


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "uniform"])
def test_semantics_have_the_distribution_of_the_flag(kind):
    from scipy import stats

    latents = MisalignedLatents(3, 2, 6, 0, 1, margin_param=1.5, marginal=kind)
    sample = latents.sample(100_000, seeded_generator(3, "train"))
    wide = {"gaussian": stats.norm(scale=1.5), "laplace": stats.laplace(scale=1.5 / 2**0.5),
            "uniform": stats.uniform(-1.5 * 3**0.5, 3 * 3**0.5)}[kind]  # fmt: skip
    for i in range(3):
        assert stats.kstest(sample.s[:, i].double().numpy(), wide.cdf).pvalue > 1e-4
    assert sample.s.std().item() == pytest.approx(1.5, rel=0.01)
    assert abs(torch.corrcoef(sample.s.T) - torch.eye(3)).max() < 0.02, "independent"
    for other in (sample.m_x, sample.m_t, (sample.s_tilde - sample.s)[:, :1][sample.s_tilde[:, 0] != sample.s[:, 0]]):
        values = other.double().flatten().numpy()
        assert stats.kstest(values / values.std(), "norm").pvalue > 1e-4, "all else stays Gaussian"


def test_marginals_by_quantiles_keep_their_tails_and_the_gaussian_its_bits():
    from scipy import stats

    normal = torch.tensor([-9.0, -3.0, -0.1, 0.0, 0.1, 3.0, 9.0])
    assert torch.equal(with_marginal(normal, "gaussian"), normal)
    for kind, distribution in (("laplace", stats.laplace(scale=2**-0.5)), ("uniform", stats.uniform(-(3**0.5), 2 * 3**0.5))):
        exact = [distribution.ppf(stats.norm.cdf(u)) if u < 0 else -distribution.ppf(stats.norm.cdf(-u)) for u in normal.tolist()]
        assert with_marginal(normal, kind).tolist() == pytest.approx(exact, rel=1e-6, abs=1e-7)
    with pytest.raises(ValueError, match="latents 'student', expected one of gaussian, laplace, uniform"):
        with_marginal(normal, "student")


def test_dependent_semantics_are_gaussian():
    with pytest.raises(ValueError, match="laplace latents are independent"):
        MisalignedLatents(3, 2, 6, -1, 1, causal_dependence=True, marginal="laplace")
    with pytest.raises(ValueError, match="none of: gaussian, laplace, uniform"):
        MisalignedLatents(3, 2, 6, -1, 1, marginal="cauchy")


@pytest.mark.parametrize("probability", [0.3, 1.0])
def test_texts_omit_each_selected_semantic_at_random_and_a_mask_says_which(probability):
    theta, beta = index_from_subset((0, 2, 3), 4), index_from_subset((3,), 4)
    latents = MisalignedLatents(4, 2, theta, beta, 1, omission_prob=probability)
    size = 40_000
    z = latents.sample(size, seeded_generator(3, "train"))
    assert latents.mask_size == 3 and z.mask.shape == (size, 3) and set(z.mask.unique().tolist()) <= {0.0, 1.0}
    deviation = (probability * (1 - probability) / size) ** 0.5
    assert (1 - z.mask.mean(dim=0)).tolist() == pytest.approx([probability] * 3, abs=4 * deviation)
    assert abs(torch.cov(z.mask.T) - torch.eye(3) * probability * (1 - probability)).max() < 0.01, "each by itself"
    stated = torch.where(z.mask == 1, z.s_tilde[:, [0, 2, 3]], 0.0)
    assert torch.equal(z.z_t, torch.cat((stated, z.m_t), dim=1)), "0 for what is omitted, all else untouched"
    told = MisalignedLatents(4, 2, theta, beta, 1).sample(size, seeded_generator(3, "train"))
    assert told.mask.shape == (size, 0)
    for name in ("s", "s_tilde", "m_x", "m_t"):
        assert torch.equal(getattr(z, name), getattr(told, name)), "the same samples, omitted or not"


@pytest.mark.parametrize("protocol", ["code", "paper"])
def test_standard_deviations_are_those_of_the_flags(protocol):
    latents = MisalignedLatents(3, 2, 6, 0, 1, margin_param=2.0, cond_param=0.5, protocol=protocol)
    expected = {"s": 4 * np.eye(3), "epsilon": 0.25 * np.eye(3), "m_x": 4 * np.eye(2), "m_t": 4 * np.eye(2)}
    for name in expected if protocol == "code" else ("s", "epsilon"):
        assert np.array_equal(latents.covariances[name], expected[name])


def test_no_two_streams_are_one():
    draws = [torch.randn(4, generator=seeded_generator(1, stream)) for stream in latent_spaces.STREAMS]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


def test_the_bound_on_condition_numbers_is_the_specified_element_and_no_stricter(monkeypatch):
    monkeypatch.setattr(latent_spaces, "CONDITION_DRAWS", 5000)
    drawn = latent_spaces.random_unit_column_matrices(5000, 4, np.random.default_rng(5))
    bound = np.sort(np.linalg.cond(drawn))[25]
    kept = np.linalg.cond(latent_spaces.well_conditioned_matrices(60, 4, np.random.default_rng(5)))
    assert 0.95 * bound < kept.max() <= bound * (1 + 1e-12)
