"""Train and evaluate one pair of encoders on misaligned numeric data (Section 5.1 of the paper).

    python main_numeric.py                                     # the paper's run: all ten semantics selected
    python main_numeric.py --theta-value 55 --seed 1           # selection bias: the text speaks of s_0, s_1, s_2 alone
    python main_numeric.py --theta-value 1022 --beta-value 55  # perturbation bias: s_0, s_1, s_2 are stated wrongly
    python main_numeric.py --causal-dependence --theta-value 55 # dependent semantics
    python main_numeric.py --recipe fast --theta-value 55      # the same block, in minutes on a CPU
    python main_numeric.py --model-id NAME --resume            # continue a run that was stopped
    python main_numeric.py --model-id NAME --evaluate --seed 7 # evaluate a trained model again

Subsets are numbered by size, then in order: of ten semantics, {0}, {0, 1}, …, {0 … 9} are 0, 10, 55, 175, 385, 637, 847, 967,
1012, 1022. Any other: python -c "from latent_spaces import index_from_subset; print(index_from_subset({1, 4}, 10))"
A model directory holds args.json, g_x.pt, g_t.pt, f_x.pt, f_t.pt, checkpoint.pt, train_log.csv, results.csv, .png, geometry.csv.
"""

from running.command_line import InputError, integer, layer_sizes, run_script

# isort: split
import numpy as np
import pandas as pd
import torch

import probes
from encoders import MLPEncoder, hidden_widths, initialise_all, narrowed
from kernel_ridge import kernel_ridge_r2
from latent_spaces import SETTING, MisalignedLatents, MixingNetwork, biased_blocks, checked_block, seed_sequence, seeded_generator
from losses import LearnedLogits, multimodal_contrastive_loss
from mlp_probes import FAST_PROBES
from probes import ABSENT, LEARNED
from running.directory import has_checkpoint, load_weights, save_weights
from running.experiment import Experiment, names_of, run_experiment
from running.pictures import plot_factor_scores
from running.ranks import Share
from running.schedules import batch_size

# "paper": the paper's training. "fast": the same block from far fewer samples by smaller encoders, "wide": by the paper's, as
# benchmarks/time_to_identification.py shows
RECIPES = {
    "paper": dict(hidden_sizes="paper", init="default", lr=1e-4, lr_schedule="constant", layer_lr="uniform",
                  preconditioner="none", optimiser="adam", batch_size=6144, final_batch_size=0, negatives="independent",
                  train_steps=100_001, precision="fp32", probes="paper", spare_dimensions=0),
    "fast": dict(
        lr_schedule="onecycle", train_steps="auto", precision="auto", probes="fast",
        spare_dimensions="auto",  # else what the text states wrongly may take a dimension first, and keeps it
        hidden_sizes="100,100",  # the generative functions are three layers of fifteen units
        optimiser="muon", lr=4e-3,  # its steps follow weak directions as far as strong ones, in a fraction of the steps
        layer_lr="fan-in",  # of what Muon does not take: every layer moves alike, at any width
        init="he",  # PyTorch's default shrinks the signal from layer to layer: most steps leave the plateau that follows
        preconditioner="inputs",  # what is learned last lies in the tail of the layers' inputs
        batch_size=512, final_batch_size="auto",  # late steps need more precision than early ones
        negatives="batch",  # half the encoder passes
    ),
}  # fmt: skip
RECIPES["wide"] = RECIPES["fast"] | dict(
    hidden_sizes="paper", spare_dimensions=0,
    optimiser="adam", lr=1e-3, batch_size=256,  # Muon's products of wide layers would take most of the time
)  # fmt: skip
# train_steps "auto", by (dimensions, steps): a single dimension teaches the layers below little, and many are hard to tell apart
AUTO_STEPS = {"fast": ((1, 5_000), (2, 4_000), (5, 2_600), (10, 4_600)), "wide": ((1, 6_500), (5, 3_500), (10, 7_000))}
DEPENDENT = {"fast": 1.5, "wide": 1}  # times as many for dependent semantics: some of their directions hardly vary
# final_batch_size "auto", pairs and pairs more a dimension: the more there are, the rarer a negative that is hard to tell apart
AUTO_BATCH = {"fast": (0, 200), "wide": (384, 128)}
AUTO_SPARE = 5  # spare_dimensions "auto", without --encoding-size; texts that omit at random agree on no direction alone
EVAL_BATCH = 4096  # samples in one of the --num-eval-batches


class NumericExperiment(Experiment):
    """One model: latents (s, m_x), (s̃, m_t), frozen mixing networks g_x, g_t, and the encoders f_x, f_t that are trained."""

    name, recipes, similarity = "numeric", RECIPES, "distance"
    weight_files = ("g_x.pt", "g_t.pt", "f_x.pt", "f_t.pt")

    @classmethod
    def add_flags(cls, parser):
        """What --recipe sets beside the shared flags, the setting, and its evaluation."""
        flag = parser.flag
        flag("--hidden-sizes", layer_sizes, "widths of the hidden layers, as 60,60,60; paper: 10 and 50 times the input", "paper")
        flag("--negatives", ("independent", "batch"), "an anchor's: a second batch, or the others of its own")
        flag("--spare-dimensions", integer(0), "extra dimensions of the encodings until the training ends; then those are "
             "kept along which image and text agree best; a recipe's auto: some, in encodings of the block's size")  # fmt: skip
        parser.section("setting: what the text says of the image")
        for name, kind, text, default in SETTING:
            flag(name, kind, text, default)
        parser.section("evaluation")
        flag("--num-eval-batches", integer(1, 10_000), f"batches of {EVAL_BATCH} samples to fit, and as many to test", 5, "again")
        flag("--mlp-eval", bool, "nonlinear probe: an MLP (the paper's), not kernel ridge regression", None, "again")
        flag("--probes", ("paper", "fast"), "MLP probes: as the paper's, or in far fewer steps to like scores", "paper", "again")

    @classmethod
    def default_id(cls, args):
        """numeric_theta55_beta-1 and the like."""
        return f"numeric_theta{args.theta_value}_beta{args.beta_value}"

    @classmethod
    def settle(cls, args):
        """Check the setting; what a recipe leaves "auto" follows the size of the encodings and what the texts tell."""
        size = args.encoding_size or len(checked_block(args))
        if args.train_steps == "auto":
            steps = np.interp(size, *zip(*AUTO_STEPS[args.recipe], strict=True))
            args.train_steps = round(steps * (DEPENDENT[args.recipe] if args.causal_dependence else 1))
        if args.final_batch_size == "auto":
            pairs, pairs_a_dimension = AUTO_BATCH[args.recipe]
            args.final_batch_size = max(args.batch_size, pairs + pairs_a_dimension * size)
        if args.spare_dimensions == "auto":
            args.spare_dimensions = 0 if args.encoding_size or args.omission_prob else AUTO_SPARE
        if args.spare_dimensions and args.omission_prob:
            raise InputError("with --omission-prob image and text agree on no direction alone; leave out --spare-dimensions")

    @classmethod
    def result_rows(cls, args):
        """Both encodings of s_i, s_inv (the unbiased block), tilde_s_i of each perturbed i, m_x and m_t where there are any."""
        _, perturbed, _ = biased_blocks(args.theta_value, args.beta_value, args.semantics_n)
        factors = [f"s_{i}" for i in range(args.semantics_n)] + ["s_inv"] + [f"tilde_s_{i}" for i in perturbed]
        factors += ["m_x", "m_t"] if args.modality_n else []
        return [{"encoding": h, "predicted_factors": name} for h in ("hz_x", "hz_t") for name in factors]

    @classmethod
    def widest_layer(cls, args):
        """Units: fewer than 500 of them are not worth bf16."""
        return max(hidden_widths(args.hidden_sizes, args.semantics_n + args.modality_n))

    def __init__(self, args, device):
        """Distribution of the latents, which the training seed fixes, and the four networks, their weights not set."""
        self.args, self.device = args, device
        self.latents = MisalignedLatents.from_flags(args, args.seed, device)
        self.d_x, self.d_t = args.semantics_n + args.modality_n, len(self.latents.selected) + args.modality_n
        self.encoding_size = args.encoding_size or len(self.latents.unbiased)
        width = self.encoding_size + (0 if args.evaluate else args.spare_dimensions)
        networks = {
            "g_x": MixingNetwork(self.d_x, args.n_mixing_layer),
            "g_t": MixingNetwork(self.d_t, args.n_mixing_layer),
            "f_x": MLPEncoder(self.d_x, width, args.hidden_sizes),
            "f_t": MLPEncoder(self.d_t + self.latents.mask_size, width, args.hidden_sizes),
        }
        self.networks = {name: network.to(device) for name, network in networks.items()}
        self.modules = {name: self.networks[name] for name in ("f_x", "f_t")}
        self.objective = LearnedLogits(self.similarity, args.batch_size).to(device) if args.loss == "sigmoid" else None
        self.generators = {"train": seeded_generator(args.seed, "train", device)}

    def draw(self, directory):
        """Mixing networks, kept in the directory or with --resume read from there, and encoders, from the training seed."""
        for substream, name in enumerate(("g_x", "g_t")):
            file = directory / f"{name}.pt"
            if self.args.resume and has_checkpoint(directory) and file.exists():
                load_weights(self.networks[name], file)
            else:
                rng = np.random.default_rng(seed_sequence(self.args.seed, "mixing", substream))
                save_weights(self.networks[name].draw(rng).state_dict(), file)
        self.draw_encoders()

    def draw_encoders(self):
        """Both encoders' weights."""
        initialise_all(self.modules.values(), self.args.init, seeded_generator(self.args.seed, "init"), self.device)

    def sample(self, count, generator, own=lambda rows: rows):
        """`count` fresh Latents z, and the encodings (h_x, h_t) of the observations of those that own((count, d)) leaves."""
        z = self.latents.sample(count, generator)
        g_x, g_t, f_x, f_t = (self.networks[name] for name in ("g_x", "g_t", "f_x", "f_t"))
        x, t = g_x(own(z.z_x)), torch.cat((g_t(own(z.z_t)), own(z.mask)), dim=1)
        with self.encoder_precision():
            return z, f_x(x), f_t(t)

    def loss(self, share_done):
        """Eq. 2 of the paper, or the sigmoid loss, on a fresh batch; independent negatives come in the same pass."""
        share, generator = Share(batch_size(self.args, share_done)), self.generators["train"]
        if self.objective or self.args.negatives == "batch":
            _, h_x, h_t = self.sample(share.total, generator, share.rows)
            return (self.objective or multimodal_contrastive_loss)(h_x, h_t, share=share)
        _, h_x, h_t = self.sample(2 * share.total, generator, share.rows)
        (h_x, negatives_x), (h_t, negatives_t) = h_x.chunk(2), h_t.chunk(2)
        return multimodal_contrastive_loss(h_x, h_t, negatives_x, negatives_t, share=share)

    @torch.no_grad()
    def complete(self):
        """From here on without --spare-dimensions: those are kept along which image and text agree best."""
        if self.args.spare_dimensions:
            _, h_x, h_t = self.sample(EVAL_BATCH, seeded_generator(self.args.seed, "narrow", self.device))
            copies = narrowed(self.modules.values(), (h_x, h_t), self.encoding_size)
            self.modules = dict(zip(self.modules, copies, strict=True))
            self.networks = self.networks | self.modules

    def monitor(self):
        """Linear R² of every factor from both encodings, on samples of the monitor's own, the same for every line."""
        generator, trained = seeded_generator(self.args.seed, "monitor", self.device), (self.networks, self.modules)
        self.complete()
        (fit_h, fit_targets), (test_h, test_targets) = (self.encode(1, generator) for _ in range(2))
        self.networks, self.modules = trained
        columns, texts = {}, []
        for name in fit_h:
            fit, test = probes.standardise(fit_h[name], test_h[name])
            scores = probes.linear_r2(fit, fit_targets, test, test_targets)
            columns |= {f"{name}_{factor}": score for factor, score in scores.items()}
            shown = " ".join(f"{max(scores[f's_{i}'], 0):.2f}" for i in range(self.args.semantics_n))
            texts.append(f"R² {name} {shown}")
        return columns, "  ".join(texts)

    @torch.no_grad()
    def encode(self, batches, generator):
        """(encodings, targets) of `batches` × 4096 fresh samples: dicts hz_x, hz_t → (N, D), and factor → (N, k)."""
        parts = []
        for _ in range(batches):
            z, h_x, h_t = self.sample(EVAL_BATCH, generator)
            part = {"hz_x": h_x, "hz_t": h_t}
            part |= {f"s_{i}": z.s[:, i : i + 1] for i in range(self.args.semantics_n)}
            part["s_inv"] = z.s[:, list(self.latents.unbiased)]
            part |= {f"tilde_s_{i}": z.s_tilde[:, i : i + 1] for i in self.latents.perturbed}
            parts.append(part | ({"m_x": z.m_x, "m_t": z.m_t} if self.args.modality_n else {}))
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: joined.pop(name) for name in ("hz_x", "hz_t")}, joined

    def evaluate(self, seed):
        """R² of linear and nonlinear probes of both encodings for every factor: the table of results.csv."""
        generator = seeded_generator(seed, "evaluate", self.device)
        (fit_h, fit_targets), (test_h, test_targets) = (self.encode(self.args.num_eval_batches, generator) for _ in range(2))
        self.evaluated = {"fit": fit_h | fit_targets, "test": test_h | test_targets}
        encodings = {name: probes.standardise(fit_h[name], test_h[name]) for name in fit_h}
        if self.args.mlp_eval:
            schedule = FAST_PROBES if self.args.probes == "fast" else ()
            generator = seeded_generator(seed, "probe", self.device)
            nonlinear = probes.mlp_r2(encodings, fit_targets, test_targets, generator, *schedule)
        rows = []
        for name, (fit, test) in encodings.items():
            linear = probes.linear_r2(fit, fit_targets, test, test_targets)
            if not self.args.mlp_eval:
                scores = kernel_ridge_r2(fit, fit_targets, test, test_targets)
                nonlinear = {(name, factor): score for factor, score in scores.items()}
            rows += [(name, factor, linear[factor], nonlinear[name, factor]) for factor in fit_targets]
        return pd.DataFrame(rows, columns=["encoding", "predicted_factors", "r2_linear", "r2_nonlinear"])

    def describe(self):
        """What the text leaves out, what it may state wrongly, what should be learned, and how."""
        args, latents, n, m = self.args, self.latents, self.args.semantics_n, self.args.modality_n
        parameters = sum(weights.numel() for module in self.modules.values() for weights in module.parameters())
        kind = "dependent" if args.causal_dependence else f"independent {args.latents}".removesuffix(" gaussian")
        omitted = [i for i in range(n) if i not in latents.selected]
        wrong = f", each with probability {args.change_prob:g}" if latents.perturbed else ""
        at_random = f", and each of I_θ with probability {args.omission_prob:g}" if args.omission_prob else ""
        spare = f" and {args.spare_dimensions} more until trained" if args.spare_dimensions and not args.evaluate else ""
        negatives = f"{args.loss} loss" if self.objective else f"{args.negatives} negatives"
        pairs = " to ".join(str(size) for size in dict.fromkeys((args.batch_size, args.final_batch_size)) if size)
        return {
            "latents": f"{n} {kind} semantics, {m} + {m} modality-specific ({args.protocol} protocol)",
            "selected": f"I_θ = {semantics(latents.selected)}; the text leaves out {semantics(omitted)}{at_random}",
            "perturbed": f"I_ρ ∩ I_θ = {semantics(latents.perturbed)}{wrong}",
            "unbiased": f"I_θ \\ I_ρ = {semantics(latents.unbiased)}: what the theory says is learned",
            "encoders": f"R^{self.d_x} and R^{self.d_t} → R^{self.encoding_size}{spare}, {parameters:,} parameters",
            "training": f"{args.recipe} recipe: {args.train_steps} steps of {pairs} pairs, lr {args.lr:g} "
            f"{args.lr_schedule}, {args.init} initialisation, {negatives}",
        }

    def show(self, results, path, references):
        """Print the table and the verdict, and draw both heatmaps."""
        latents, tables = self.latents, score_tables(results)
        unbiased = {f"s_{i}" for i in latents.unbiased} | {"s_inv"}
        printed = pd.concat({title: scores.T for title, scores in tables.items()}, axis=1)
        printed.index = [f"{name} *" if name in unbiased else name for name in printed.index]
        print(printed.clip(lower=0).round(3).to_string(index_names=False), "(* unbiased)", sep="\n")
        title = f"selected {semantics(latents.selected)}, perturbed {semantics(latents.perturbed)}"
        plot_factor_scores(tables, path, title, unbiased, {name: score_tables(scores) for name, scores in references.items()})
        print(verdict(results, latents, self.args.causal_dependence))


def score_tables(results):
    """Dict title → DataFrame (hz_x, hz_t × factors) of linear and of nonlinear R²."""
    table = results.set_index(["predicted_factors", "encoding"]).unstack().reindex(results.predicted_factors.unique())
    return {f"{title} R²": table[f"r2_{title}"].T.loc[["hz_x", "hz_t"]] for title in ("linear", "nonlinear")}


def semantics(indices):
    """Set of semantics in words."""
    return names_of([f"s_{i}" for i in indices])


def verdict(results, latents, causal_dependence):
    """One sentence: whether exactly the unbiased block was learned."""
    if latents.omission_prob:  # what a text omits is in no encoding of it
        results = results[results.encoding == "hz_x"]
    inside = results.predicted_factors.isin({f"s_{i}" for i in latents.unbiased} | {"s_inv"})
    # a perturbed s̃_i is s_i plus noise that no encoder can know of: biased like s_i itself
    lowest, highest = results[inside].r2_nonlinear.min(), max([0.0, *results[~inside].r2_nonlinear])
    found = (f"the unbiased block {semantics(latents.unbiased)} has nonlinear R² of at least {lowest:.3f}, everything else at "
             f"most {highest:.3f}")  # fmt: skip
    if lowest >= LEARNED and highest <= ABSENT:
        return f"Exactly the unbiased block is learned: {found}."
    if lowest >= LEARNED and causal_dependence:
        return f"The unbiased block is learned: {found}, as far as it depends on the block."
    return f"Not (yet) the pattern of the theory: {found}."


def main(argv=None):
    """Train and evaluate, or with --evaluate evaluate again; returns the exit code."""
    return run_experiment(NumericExperiment, argv)


if __name__ == "__main__":
    run_script(main)
