"""Latents of misaligned image/text pairs and the mixing networks that turn them into observations.

    s ~ N(0, Σ_s)                                     semantics, shared by image and text; or not Gaussian, with variance Σ_s
    s̃_i = s_i + b_i ε_i   for i ∈ I_ρ ∩ I_θ           perturbation bias ρ: stated wrongly
    z_x = (s, m_x),   z_t = (s̃ restricted to I_θ, m_t)   selection bias θ: left out; or each of I_θ at random, as a mask tells
    x = g_x(z_x),     t = g_t(z_t)

The theory: contrastive learning on (x, t) identifies the unbiased block s_{I_θ \\ I_ρ} and nothing else.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from running.command_line import InputError, integer, number

# Streams of random numbers that one seed gives. Latents' covariances and the mixing depend on the training seed alone.
STREAMS = dict(covariance=0, mixing=1, init=2, train=3, monitor=4, evaluate=5, probe=6, downstream=7, order=8, narrow=9)


def seed_sequence(seed, stream, substream=0):
    """NumPy SeedSequence of one named stream of `seed`; streams of one seed are independent of each other."""
    return np.random.SeedSequence([int(seed), STREAMS[stream], int(substream)])


def seeded_generator(seed, stream, device="cpu", substream=0):
    """torch.Generator on `device`, seeded for one named stream (a key of STREAMS) of `seed`."""
    state = int(seed_sequence(seed, stream, substream).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device=device).manual_seed(state)


# subsets of the semantics: I_θ and I_ρ by number


def subset_count(n):
    """Number of non-empty subsets of {0 … n−1}."""
    return 2**n - 1


def subset_from_index(index, n):
    """Subset number `index` of {0 … n−1} as a sorted tuple; −1 is the empty set.

    The non-empty subsets are numbered from 0 in graded lexicographic order: by size, then lexicographically. The number
    is unranked with binomial coefficients, so that n = 30 costs as little as n = 3. Raises ValueError out of range.
    """
    if index == -1:
        return ()
    if not 0 <= index < subset_count(n):
        raise ValueError(f"subset number {index} is outside -1 … {subset_count(n) - 1} for {n} semantics")
    size = 1
    while index >= math.comb(n, size):
        index -= math.comb(n, size)
        size += 1
    subset = []
    for element in range(n):
        if len(subset) == size:
            break
        starting_here = math.comb(n - element - 1, size - len(subset) - 1)
        if index < starting_here:
            subset.append(element)
        else:
            index -= starting_here
    return tuple(subset)


def index_from_subset(subset, n):
    """Number of a subset of {0 … n−1}: the inverse of `subset_from_index`; the empty set is −1.

    Raises ValueError for elements that are not in {0 … n−1}.
    """
    subset = sorted(set(subset))
    if not subset:
        return -1
    if subset[0] < 0 or subset[-1] >= n:
        raise ValueError(f"{set(subset)} is not a subset of 0 … {n - 1}")
    size = len(subset)
    index = sum(math.comb(n, smaller) for smaller in range(1, size))
    previous = -1
    for position, element in enumerate(subset):
        for skipped in range(previous + 1, element):
            index += math.comb(n - skipped - 1, size - position - 1)
        previous = element
    return index


def biased_blocks(theta, beta, n):
    """(selected, perturbed, unbiased): I_θ, I_ρ ∩ I_θ and I_θ \\ I_ρ of subset numbers theta and beta, as sorted tuples.

    Raises ValueError for numbers that are out of range or leave no unbiased semantics.
    """
    selected, perturbable = subset_from_index(theta, n), subset_from_index(beta, n)
    perturbed = tuple(i for i in selected if i in perturbable)
    unbiased = tuple(i for i in selected if i not in perturbable)
    if not unbiased:
        raise ValueError(
            f"theta {theta} selects {set(selected) or '∅'} and beta {beta} perturbs {set(perturbable) or '∅'}: "
            "no unbiased semantics are left to learn; choose beta so that it does not cover theta"
        )
    return selected, perturbed, unbiased


# latents

LATENTS = ("gaussian", "laplace", "uniform")  # distributions of independent semantics
# Flags of the setting: name, kind, help, default.
SETTING = (
    ("--semantics-n", integer(1, 10_000), "semantic latents s", 10),
    ("--modality-n", integer(0, 10_000), "modality-specific latents m_x, and as many m_t", 5),
    ("--theta-value", integer(0), "selection bias θ: number of I_θ, what the text tells; from 0, by size, then in order", 1022),
    ("--beta-value", integer(-1), "perturbation bias ρ: number of I_ρ, what the text may state wrongly, -1 = none", -1),
    ("--change-prob", number(0, 1), "probability that a perturbable semantic is perturbed", 0.75),
    ("--causal-dependence", bool, "dependent latents: covariances drawn from a Wishart distribution", None),
    ("--latents", LATENTS, "of independent semantics, all of one variance", "gaussian"),
    ("--omission-prob", number(0, 1, below=True), "probability that a text omits what it tells; a mask says so", 0.0),
    ("--margin-param", number(1e-6, 1e6), "standard deviation of independent latents", 1.0),
    ("--cond-param", number(1e-6, 1e6), "standard deviation of independent perturbations", 1.0),
    ("--n-mixing-layer", integer(1, 1000), "linear layers of the generative functions g_x, g_t", 3),
    ("--encoding-size", integer(0), "dimensions D of the encodings, 0 = size of the unbiased block", 0),
)


def checked_block(args):
    """I_θ \\ I_ρ of the flags SETTING, a Namespace; raises InputError where these contradict each other."""
    n = args.semantics_n
    for flag, value, lowest in (("--theta-value", args.theta_value, 0), ("--beta-value", args.beta_value, -1)):
        if not lowest <= value < subset_count(n):
            subsets = f"{n} semantics have the subsets {lowest} … {subset_count(n) - 1}"
            raise InputError(f"{flag} {value} is out of range: {subsets}")
    if args.latents != "gaussian" and args.causal_dependence:
        raise InputError(f"--latents {args.latents} are independent semantics; leave out --causal-dependence")
    try:
        return biased_blocks(args.theta_value, args.beta_value, n)[2]
    except ValueError as error:
        raise InputError(str(error)) from None


def with_marginal(normal, kind):
    """Standard normal numbers as ones of another distribution of LATENTS with mean 0 and variance 1, by its quantiles."""
    if kind not in LATENTS:
        raise ValueError(f"latents {kind!r}, expected one of {', '.join(LATENTS)}")
    if kind == "gaussian":
        return normal
    beyond = torch.special.erfc(normal.double().abs() / 2**0.5)  # share of numbers that are larger, of either sign
    size = 3**0.5 * (1 - beyond) if kind == "uniform" else -beyond.log() / 2**0.5
    return size.to(normal.dtype).copysign(normal)


@dataclass
class Latents:
    """One batch of latents, each tensor float32 on the sampler's device.

    s, s_tilde: (B, semantics_n); m_x, m_t: (B, modality_n); selected: the indices I_θ that the text speaks of, (|I_θ|,) int64;
    mask: (B, |I_θ|), 1 where the text tells a selected semantic and 0 where it omits it, or (B, 0) if it never does.
    """

    s: torch.Tensor
    s_tilde: torch.Tensor
    m_x: torch.Tensor
    m_t: torch.Tensor
    selected: torch.Tensor
    mask: torch.Tensor

    @cached_property
    def z_x(self):
        """(B, semantics_n + modality_n): latents of the image."""
        return torch.cat((self.s, self.m_x), dim=1)

    @cached_property
    def z_t(self):
        """(B, |I_θ| + modality_n): latents of the text, 0 for what it omits."""
        stated = self.s_tilde.index_select(1, self.selected)
        return torch.cat((stated * self.mask if self.mask.numel() else stated, self.m_t), dim=1)


class MisalignedLatents:
    """Distribution of (s, s̃, m_x, m_t) under selection bias θ and perturbation bias ρ (Section 3 of the paper).

    theta, beta: numbers of I_θ and I_ρ (see `subset_from_index`; beta −1 is no perturbation). `seed` fixes the covariances
    alone, the samples come from the generator given to `sample`. protocol "code": modality covariances are the identity
    with independent semantics, and with dependence Σ_ε = Σ_s and Σ_mx = Σ_mt; "paper": all are drawn separately, the
    modality covariances from a Wishart in both cases. marginal: of independent semantics, one of LATENTS. omission_prob: that a
    text omits a selected semantic, each by itself. Raises ValueError for another marginal, for numbers that give no unbiased
    block, and for dependent semantics that are not Gaussian.
    """

    def __init__(self, semantics_n, modality_n, theta, beta, seed, *, change_prob=0.75, causal_dependence=False,
                 margin_param=1.0, cond_param=1.0, marginal="gaussian", omission_prob=0.0, protocol="code",
                 device="cpu"):  # fmt: skip
        self.semantics_n, self.modality_n, self.marginal, self.omission_prob = semantics_n, modality_n, marginal, omission_prob
        if marginal not in LATENTS:
            raise ValueError(f"the distribution {marginal!r} is none of: {', '.join(LATENTS)}")
        if causal_dependence and marginal != "gaussian":
            raise ValueError(f"{marginal} latents are independent: their dependence is known of Gaussian ones alone")
        self.selected, self.perturbed, self.unbiased = biased_blocks(theta, beta, semantics_n)
        self.change_prob, self.device = change_prob, torch.device(device)
        self.covariances = self._covariances(seed, causal_dependence, margin_param, cond_param, protocol)
        self._factors = {
            name: torch.linalg.cholesky(torch.from_numpy(matrix)).float().to(self.device)
            for name, matrix in self.covariances.items()
        }
        self._perturbs = torch.zeros(semantics_n, device=self.device)
        self._perturbs[list(self.perturbed)] = 1.0
        self._selected = torch.tensor(self.selected, device=self.device)  # once: a list as an index is copied each time

    @classmethod
    def from_flags(cls, args, seed, device="cpu"):
        """Those of the flags of a setting, a Namespace, and of a training seed."""
        return cls(args.semantics_n, args.modality_n, args.theta_value, args.beta_value, seed, change_prob=args.change_prob,
                   causal_dependence=args.causal_dependence, margin_param=args.margin_param, cond_param=args.cond_param,
                   marginal=args.latents, omission_prob=args.omission_prob, protocol=args.protocol, device=device)  # fmt: skip

    @property
    def mask_size(self):
        """Numbers that tell a text's encoder what the text omits: |I_θ|, or 0."""
        return len(self.selected) if self.omission_prob else 0

    def _covariances(self, seed, causal_dependence, margin_param, cond_param, protocol):
        """The four covariance matrices as float64 arrays: s, epsilon, m_x, m_t."""
        sizes = {"s": self.semantics_n, "epsilon": self.semantics_n, "m_x": self.modality_n, "m_t": self.modality_n}
        apart = 0 if protocol == "code" else 2  # with the runs Σ_ε = Σ_s and Σ_mx = Σ_mt
        substreams = {"s": 0, "epsilon": apart, "m_x": 1, "m_t": 1 + apart}

        def drawn(name):
            from scipy.stats import wishart  # a heavy module, for Wishart's covariances alone

            rng = np.random.default_rng(seed_sequence(seed, "covariance", substreams[name]))
            return np.reshape(wishart.rvs(df=sizes[name], scale=np.eye(sizes[name]), random_state=rng), (sizes[name],) * 2)

        covariances = {}
        for name, size in sizes.items():
            is_modality = name in ("m_x", "m_t")
            if causal_dependence or (is_modality and protocol == "paper"):
                covariances[name] = drawn(name)
            else:
                scale = cond_param if name == "epsilon" else margin_param
                covariances[name] = np.eye(size) * scale**2
        return covariances

    def identified_r2(self, factor):
        """R² of a factor by an encoding that holds the unbiased block s_B and nothing else: Σ_jB Σ_BB⁻¹ Σ_Bj / Var.

        factor: s_j, tilde_s_j, of larger variance, m_x, m_t, or s_inv for the block itself. The block is Gaussian, and so is s_j:
        no probe, linear or not, has more. Raises ValueError for another name.
        """
        name, _, number = factor.rpartition("_")
        if factor in ("m_x", "m_t", "s_inv"):
            return float(factor == "s_inv")
        if name not in ("s", "tilde_s") or not number.isdecimal() or int(number) >= self.semantics_n:
            raise ValueError(f"{factor!r} is no factor of {self.semantics_n} semantics")
        j, block, covariance = int(number), list(self.unbiased), self.covariances["s"]
        variance = covariance[j, j]
        if name == "tilde_s" and j in self.perturbed:
            variance = variance + self.change_prob * self.covariances["epsilon"][j, j]
        told = covariance[j, block]
        return float(told @ np.linalg.solve(covariance[np.ix_(block, block)], told) / variance)

    def sample(self, size, generator):
        """`size` independent draws as Latents, from a generator on this distribution's device."""
        n, m = self.semantics_n, self.modality_n
        widths = (n, m, m, n) if self.perturbed else (n, m, m)
        normal = torch.randn(size, sum(widths), generator=generator, device=self.device).split(widths, dim=1)
        units = (with_marginal(normal[0], self.marginal), *normal[1:3])
        s, m_x, m_t = (unit @ self._factors[name].T for unit, name in zip(units, ("s", "m_x", "m_t"), strict=True))
        s_tilde = s
        if self.perturbed:
            changed = torch.rand(size, n, generator=generator, device=self.device) < self.change_prob
            s_tilde = s + self._perturbs * changed * (normal[3] @ self._factors["epsilon"].T)
        told = torch.rand(size, self.mask_size, generator=generator, device=self.device) >= self.omission_prob
        return Latents(s, s_tilde, m_x, m_t, self._selected, told.float())


# mixing

CONDITION_DRAWS = 25_000  # random matrices whose condition numbers set the bound …
CONDITION_RANK = 25  # … which is element 25 of the sorted list: their 0.001-quantile


def random_unit_column_matrices(count, size, rng):
    """(count, size, size) float64: entries U(−1, 1), each column scaled to unit 2-norm."""
    matrices = rng.uniform(-1, 1, (count, size, size))
    return matrices / np.linalg.norm(matrices, axis=1, keepdims=True)


def condition_numbers(matrices):
    """(count,) float64: 2-norm condition numbers of a batch of square matrices."""
    singular = torch.linalg.svdvals(torch.from_numpy(matrices)).numpy()
    return singular[:, 0] / singular[:, -1]


def well_conditioned_matrices(count, size, rng):
    """(count, size, size) float64: unit-column matrices redrawn until their condition number is at most the 0.001-quantile."""
    bound = np.sort(condition_numbers(random_unit_column_matrices(CONDITION_DRAWS, size, rng)))[CONDITION_RANK]
    kept = np.empty((0, size, size))
    while len(kept) < count:
        drawn = random_unit_column_matrices(2_500, size, rng)
        kept = np.concatenate((kept, drawn[condition_numbers(drawn) <= bound]))
    return kept[:count]


class MixingNetwork(nn.Module):
    """Frozen invertible generative function g: R^d → R^d; square linear layers without bias, LeakyReLU(0.2) between them."""

    def __init__(self, size, n_layers=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(n_layers)).requires_grad_(False)

    @torch.no_grad()
    def draw(self, rng):
        """Set the weights to well-conditioned ones from a NumPy generator, in place; returns the network."""
        weights = well_conditioned_matrices(len(self.layers), self.layers[0].in_features, rng)
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight.copy_(torch.from_numpy(weight))
        return self

    @torch.no_grad()
    def forward(self, z):
        """(B, d) latents → (B, d) observations."""
        for i, layer in enumerate(self.layers):
            if i > 0:
                z = nn.functional.leaky_relu(z, 0.2)
            z = layer(z)
        return z
