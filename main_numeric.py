"""Train and evaluate one pair of encoders on misaligned numeric data (Section 5.1 of the paper).

    python main_numeric.py                                     # the paper's run: all ten semantics selected
    python main_numeric.py --theta-value 55 --seed 1           # selection bias: the text speaks of s_0, s_1, s_2 alone
    python main_numeric.py --theta-value 1022 --beta-value 55  # perturbation bias: s_0, s_1, s_2 are stated wrongly
    python main_numeric.py --causal-dependence --theta-value 55 # dependent semantics
    python main_numeric.py --recipe fast --theta-value 55      # the same block, in minutes on a CPU
    python main_numeric.py --model-id NAME --resume            # continue a run that was stopped
    python main_numeric.py --model-id NAME --evaluate --seed 7 # evaluate a trained model again

Subsets are numbers: of ten semantics, the prefixes {0}, {0, 1}, …, {0 … 9} are 0, 10, 55, 175, 385, 637, 847, 967, 1012, 1022.
The model directory receives args.json, g_x.pt, g_t.pt, f_x.pt, f_t.pt, checkpoint.pt, train_log.csv, results.csv, results.png.
"""

import time

import numpy as np
import pandas as pd
import torch

import probes
from encoders import MLPEncoder, initialise
from latent_spaces import MisalignedLatents, MixingNetwork, seed_sequence, seeded_generator, subset_count
from losses import multimodal_contrastive_loss
from running.command_line import InputError, Parser, integer, number, run_script
from running.files import write_csv, write_json
from running.pictures import plot_factor_scores
from running.training import (
    add_training_flags,
    after_training,
    apply_recipe,
    batch_size_at,
    describe_device,
    drawn_seed,
    is_finished,
    keep_results,
    load_weights,
    open_model_directory,
    provenance,
    save_weights,
    select_device,
    start_directory,
    take_evaluation_seed,
    train,
    write_args,
)

# "paper": exactly the paper's training. "fast": the same block identified from far fewer samples, as
# benchmarks/time_to_identification.py shows.
RECIPES = {
    "paper": {
        "init": "default",
        "lr": 1e-4,
        "lr_schedule": "constant",
        "layer_lr": "uniform",
        "preconditioner": "none",
        "optimiser": "adam",
        "batch_size": 6144,
        "final_batch_size": 0,
        "negatives": "independent",
        "train_steps": 100_001,
        "precision": "fp32",
    },
    "fast": {
        "init": "he",
        "lr": 1e-3,
        "lr_schedule": "onecycle",
        "layer_lr": "fan-in",
        "preconditioner": "inputs",
        "optimiser": "adam",
        "batch_size": 256,
        "final_batch_size": "auto",
        "negatives": "batch",
        "train_steps": "auto",
        "precision": "auto",
    },
}
# train_steps "auto", between these (dimensions of the encoding, steps): a single dimension teaches the layers below it
# little at a time, and many take long to tell apart
AUTO_STEPS = ((1, 6_500), (5, 3_500), (10, 7_000))
# final_batch_size "auto": in more dimensions it takes more negatives to find one that is hard to tell from the positive
AUTO_BATCH, AUTO_BATCH_PER_DIMENSION = 384, 128
EVAL_BATCH = 4096  # samples in one of the --num-eval-batches
MONITOR_BATCHES = 1  # batches behind the R² of the progress lines
RUN_FLAGS = {"num_eval_batches", "mlp_eval"}  # may differ between training and a later evaluation


def parse_flags(argv):
    """(args, given) of the command line; the recipe's values are not filled in yet."""
    parser = Parser(description=__doc__.split("\n\n")[0], epilog="\n\n".join(__doc__.split("\n\n")[1:]))
    add_training_flags(parser, RECIPES)
    group = parser.add_argument_group("training of this experiment")
    group.add_argument("--negatives", choices=("independent", "batch"),
                       help="an anchor's negatives: a second, independent batch, or the other pairs of its own "
                       "(paper independent, fast batch)")  # fmt: skip
    group = parser.add_argument_group("setting: what the text says of the image")
    group.add_argument("--semantics-n", type=integer(1), default=10, help="semantic latents s (%(default)s)")
    group.add_argument(
        "--modality-n", type=integer(1), default=5, help="modality-specific latents m_x, and as many m_t (%(default)s)"
    )
    group.add_argument(
        "--theta-value",
        type=integer(0),
        default=1022,
        help="selection bias θ: number of the subset I_θ that the text speaks of (%(default)s)",
    )
    group.add_argument(
        "--beta-value",
        type=integer(-1),
        default=-1,
        help="perturbation bias ρ: number of the subset I_ρ that the text may state wrongly, -1 = none (%(default)s)",
    )
    group.add_argument(
        "--change-prob",
        type=number(0, 1),
        default=0.75,
        help="probability that a perturbable semantic is perturbed (%(default)s)",
    )
    group.add_argument(
        "--causal-dependence",
        action="store_true",
        help="dependent latents: covariances drawn from a Wishart distribution",
    )
    group.add_argument(
        "--margin-param",
        type=number(1e-6, 1e6),
        default=1.0,
        help="standard deviation of independent latents (%(default)s)",
    )
    group.add_argument(
        "--cond-param",
        type=number(1e-6, 1e6),
        default=1.0,
        help="standard deviation of independent perturbations (%(default)s)",
    )
    group.add_argument(
        "--n-mixing-layer",
        type=integer(1),
        default=3,
        help="linear layers of the generative functions g_x, g_t (%(default)s)",
    )
    group.add_argument(
        "--encoding-size",
        type=integer(0),
        default=0,
        help="dimensions D of the encodings, 0 = size of the unbiased block (%(default)s)",
    )
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--num-eval-batches",
        type=integer(1),
        default=5,
        help=f"batches of {EVAL_BATCH} samples to fit the probes, and as many to test (%(default)s)",
    )
    group.add_argument(
        "--mlp-eval",
        action="store_true",
        help="nonlinear probe: an MLP (the paper's) instead of kernel ridge regression",
    )
    return parser.parse(argv)


def check_subsets(args):
    """Raise InputError if θ or β is the number of no subset."""
    for flag, value, lowest in (("--theta-value", args.theta_value, 0), ("--beta-value", args.beta_value, -1)):
        if not lowest <= value < subset_count(args.semantics_n):
            raise InputError(
                f"{flag} {value} is out of range: {args.semantics_n} semantics have the subsets "
                f"{lowest} … {subset_count(args.semantics_n) - 1}"
            )


def build_latents(args, training_seed, device):
    """MisalignedLatents of a setting, whose covariances the training seed fixes; InputError if nothing is unbiased."""
    try:
        return MisalignedLatents(args.semantics_n, args.modality_n, args.theta_value, args.beta_value, training_seed,
                                 change_prob=args.change_prob, causal_dependence=args.causal_dependence,
                                 margin_param=args.margin_param, cond_param=args.cond_param, protocol=args.protocol,
                                 device=device)  # fmt: skip
    except ValueError as error:
        raise InputError(str(error)) from None


def encoding_size(args, latents):
    """Dimensions D of the encodings."""
    return args.encoding_size or len(latents.unbiased)


def build_networks(args, latents):
    """Dict of the four networks of a setting, their weights not set: g_x, g_t mix, f_x, f_t encode."""
    d_x = args.semantics_n + args.modality_n
    d_t = len(latents.selected) + args.modality_n
    size = encoding_size(args, latents)
    networks = {
        "g_x": MixingNetwork(d_x, args.n_mixing_layer),
        "g_t": MixingNetwork(d_t, args.n_mixing_layer),
        "f_x": MLPEncoder(d_x, size),
        "f_t": MLPEncoder(d_t, size),
    }
    return {name: network.to(latents.device) for name, network in networks.items()}


def set_weights(networks, args, directory):
    """Draw mixing and encoders from the training seed, in place; the mixing is kept in the directory, or read from there."""
    for substream, name in enumerate(("g_x", "g_t")):
        file = directory / f"{name}.pt"
        if args.resume and file.exists():
            load_weights(networks[name], file)
        else:
            rng = np.random.default_rng(seed_sequence(args.seed, "mixing", substream))
            save_weights(networks[name].draw(rng), file)
    generator = seeded_generator(args.seed, "init")
    for name in ("f_x", "f_t"):
        device = next(networks[name].parameters()).device
        initialise(networks[name].cpu(), args.init, generator).to(device)


def load_networks(args, latents, directory):
    """Dict of the four networks of a trained model."""
    return {
        name: load_weights(network, directory / f"{name}.pt") for name, network in build_networks(args, latents).items()
    }


def batch_loss(networks, latents, batch_size, negatives, generator):
    """The loss of one fresh batch of `batch_size` pairs; negatives "independent" draws a second batch, "batch" none."""
    g_x, g_t, f_x, f_t = (networks[name] for name in ("g_x", "g_t", "f_x", "f_t"))
    if negatives == "batch":
        z = latents.sample(batch_size, generator)
        return multimodal_contrastive_loss(f_x(g_x(z.z_x)), f_t(g_t(z.z_t)))
    z = latents.sample(2 * batch_size, generator)  # the pairs, then the independent ones, in one pass
    h_x, negatives_x = f_x(g_x(z.z_x)).chunk(2)
    h_t, negatives_t = f_t(g_t(z.z_t)).chunk(2)
    return multimodal_contrastive_loss(h_x, h_t, negatives_x, negatives_t)


# --------------------------------------------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def encode(networks, latents, batches, generator):
    """(encodings, targets) of `batches` × 4096 fresh samples.

    encodings: hz_x, hz_t → (N, D); targets: s_i, s_inv (the unbiased block), tilde_s_i of each perturbed i, m_x, m_t → (N, k).
    """
    parts = []
    for _ in range(batches):
        z = latents.sample(EVAL_BATCH, generator)
        part = {"hz_x": networks["f_x"](networks["g_x"](z.z_x)), "hz_t": networks["f_t"](networks["g_t"](z.z_t))}
        part |= {f"s_{i}": z.s[:, i : i + 1] for i in range(latents.semantics_n)}
        part["s_inv"] = z.s[:, list(latents.unbiased)]
        part |= {f"tilde_s_{i}": z.s_tilde[:, i : i + 1] for i in latents.perturbed}
        parts.append(part | {"m_x": z.m_x, "m_t": z.m_t})
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {name: joined.pop(name) for name in ("hz_x", "hz_t")}, joined


def evaluate(networks, latents, batches, seed, mlp_eval):
    """R² of linear and nonlinear probes of both encodings for every factor: the table of results.csv."""
    generator = seeded_generator(seed, "evaluate", latents.device)
    fit_encodings, fit_targets = encode(networks, latents, batches, generator)
    test_encodings, test_targets = encode(networks, latents, batches, generator)
    encodings = {name: probes.standardise(fit_encodings[name], test_encodings[name]) for name in fit_encodings}
    rows, nonlinear = [], {}
    if mlp_eval:
        nonlinear = probes.mlp_r2(encodings, fit_targets, test_targets, seeded_generator(seed, "probe", latents.device))
    for name, (fit_h, test_h) in encodings.items():
        linear = probes.linear_r2(fit_h, fit_targets, test_h, test_targets)
        if not mlp_eval:
            scores = probes.kernel_ridge_r2(fit_h, fit_targets, test_h, test_targets)
            nonlinear |= {(name, factor): score for factor, score in scores.items()}
        rows += [(name, factor, linear[factor], nonlinear[name, factor]) for factor in fit_targets]
    return pd.DataFrame(rows, columns=["encoding", "predicted_factors", "r2_linear", "r2_nonlinear"])


def make_monitor(networks, latents, training_seed):
    """monitor() of `training.train`: linear R² of every factor from both encodings, on samples of its own."""
    generator_state = seeded_generator(training_seed, "monitor", latents.device).get_state()

    def monitor():
        generator = torch.Generator(latents.device)
        generator.set_state(generator_state)
        (fit_h, fit_targets), (test_h, test_targets) = (
            encode(networks, latents, MONITOR_BATCHES, generator) for _ in range(2)
        )
        columns, texts = {}, []
        for name in fit_h:
            fit, test = probes.standardise(fit_h[name], test_h[name])
            scores = probes.linear_r2(fit, fit_targets, test, test_targets)
            columns |= {f"{name}_{factor}": score for factor, score in scores.items()}
            texts.append(
                f"R² {name} " + " ".join(f"{max(scores[f's_{i}'], 0):.2f}" for i in range(latents.semantics_n))
            )
        return columns, "  ".join(texts)

    return monitor


# --------------------------------------------------------------------------------------------------------------
# what a reader sees


def names_of(indices, sign="s"):
    """Set of factors in words, e.g. {s_0, s_2}."""
    return "{" + ", ".join(f"{sign}_{i}" for i in indices) + "}" if indices else "∅"


def describe_setting(args, latents, networks, device):
    """The setting in words: what the text leaves out, what it may state wrongly, what should be learned."""
    parameters = sum(parameter.numel() for name in ("f_x", "f_t") for parameter in networks[name].parameters())
    n, m, size = args.semantics_n, args.modality_n, encoding_size(args, latents)
    kind = "dependent" if args.causal_dependence else "independent"
    omitted = [i for i in range(n) if i not in latents.selected]
    wrong = f", each with probability {args.change_prob:g}" if latents.perturbed else ""
    pairs = f"{args.batch_size}" + (f" to {args.final_batch_size}" if args.final_batch_size else "")
    lines = {
        "latents": f"{n} {kind} semantics, {m} + {m} modality-specific ({args.protocol} protocol)",
        "selected": f"I_θ = {names_of(latents.selected)}; the text leaves out {names_of(omitted)}",
        "perturbed": f"I_ρ ∩ I_θ = {names_of(latents.perturbed)}{wrong}",
        "unbiased": f"I_θ \\ I_ρ = {names_of(latents.unbiased)}: what the theory says is learned",
        "encoders": f"R^{n + m} and R^{len(latents.selected) + m} → R^{size}, {parameters:,} parameters",
        "training": f"{args.recipe} recipe: {args.train_steps} steps of {pairs} pairs, lr {args.lr:g} "
        f"{args.lr_schedule}, {args.init} initialisation, {args.negatives} negatives",
        "device": f"{device}, {args.precision}",
    }
    return "\n".join(f"{name:12} {line}" for name, line in lines.items())


def verdict(results, latents, causal_dependence):
    """One sentence: whether exactly the unbiased block was learned."""
    unbiased = {f"s_{i}" for i in latents.unbiased} | {"s_inv"}
    inside = results.predicted_factors.isin(unbiased)
    # a perturbed s̃_i is s_i plus noise that no encoder can know of: biased like s_i itself
    lowest, highest = results[inside].r2_nonlinear.min(), results[~inside].r2_nonlinear.max()
    found = (
        f"the unbiased block {names_of(latents.unbiased)} has nonlinear R² of at least {lowest:.2f}, "
        f"everything else at most {max(highest, 0):.2f}"
    )
    if lowest >= 0.9 and highest <= 0.1:
        return f"Exactly the unbiased block is learned: {found}."
    if lowest >= 0.9 and causal_dependence:
        return f"The unbiased block is learned: {found}, as far as it depends on the block."
    return f"Not (yet) the pattern of the theory: {found}."


def show_results(results, latents, args, path):
    """Print the table and the verdict, draw results.png to `path`, and say where it lies."""
    table = results.set_index(["predicted_factors", "encoding"]).unstack().reindex(results.predicted_factors.unique())
    tables = {}
    for score, title in (("r2_linear", "linear"), ("r2_nonlinear", "nonlinear")):
        tables[f"{title} R²"] = table[score].T.loc[["hz_x", "hz_t"]]
    printed = pd.concat({title: scores.T for title, scores in tables.items()}, axis=1)
    printed.index = [
        f"{name} *" if name in {f"s_{i}" for i in latents.unbiased} | {"s_inv"} else name for name in printed.index
    ]
    print(printed.clip(lower=0).round(3).to_string(index_names=False), "(* unbiased)", sep="\n")
    title = f"selected {names_of(latents.selected)}, perturbed {names_of(latents.perturbed)}"
    plot_factor_scores(tables, path, title, {f"s_{i}" for i in latents.unbiased} | {"s_inv"})
    print(verdict(results, latents, args.causal_dependence), f"picture      {path}", sep="\n")


# --------------------------------------------------------------------------------------------------------------


def main(argv=None):
    """Train and evaluate, or with --evaluate evaluate again; returns the exit code."""
    args, given = parse_flags(argv)
    apply_recipe(args, given, RECIPES)
    default_id = f"numeric_theta{args.theta_value}_beta{args.beta_value}"
    directory = open_model_directory(args, given, default_id, RUN_FLAGS, parse_flags)
    check_subsets(args)
    device = select_device(args)
    if args.evaluate:
        return evaluate_again(args, directory, device)
    if args.resume and is_finished(directory):
        print(f"{directory} is finished already: nothing to resume")
        return 0
    if args.seed is None:
        args.seed = drawn_seed()
    latents = build_latents(args, args.seed, device)
    size = encoding_size(args, latents)  # a recipe's "auto" depends on it
    if args.train_steps == "auto":
        args.train_steps = round(np.interp(size, *zip(*AUTO_STEPS, strict=True)))
    if args.final_batch_size == "auto":
        args.final_batch_size = max(args.batch_size, AUTO_BATCH + AUTO_BATCH_PER_DIMENSION * size)
    networks = build_networks(args, latents)
    details = provenance(device)
    start_directory(directory, args, details)
    print(f"model        {directory}, seed {args.seed}")
    print(describe_setting(args, latents, networks, describe_device(device)), flush=True)

    set_weights(networks, args, directory)
    encoders = {name: networks[name] for name in ("f_x", "f_t")}
    generator = seeded_generator(args.seed, "train", device)

    def compute_loss(share_done):
        return batch_loss(networks, latents, batch_size_at(args, share_done), args.negatives, generator)

    monitor = make_monitor(networks, latents, args.seed)
    progress = train(encoders, compute_loss, args, directory, {"train": generator}, device, monitor)
    for name, encoder in encoders.items():
        save_weights(encoder, directory / f"{name}.pt")
    details |= {"eval_seed": args.seed + 1, "train_seconds": round(progress.seconds, 1)}
    with after_training(args):
        details |= write_evaluation(networks, latents, args, directory, details["eval_seed"])
    write_args(directory, args, {**details, "finished": True})
    return 0


def evaluate_again(args, directory, device):
    """--evaluate: results.csv of a trained model from fresh samples; the results of another seed are kept beside it."""
    stored = take_evaluation_seed(args, directory)
    latents = build_latents(args, stored["seed"], device)
    networks = load_networks(args, latents, directory)
    print(f"model        {directory}, training seed {stored['seed']}, evaluation seed {args.seed}")
    print(describe_setting(args, latents, networks, describe_device(device)), flush=True)
    timing = write_evaluation(networks, latents, args, directory, args.seed, stored.get("eval_seed"))
    flags = {name: getattr(args, name) for name in RUN_FLAGS}
    write_json(directory / "args.json", {**stored, **flags, "eval_seed": args.seed, **timing, "finished": True})
    return 0


def write_evaluation(networks, latents, args, directory, seed, earlier_seed=None):
    """Evaluate, write results.csv and results.png, print both; returns the duration as a dict.

    The results of an earlier evaluation with another seed are kept as results_seed{N}.csv and .png.
    """
    started = time.perf_counter()
    try:
        results = evaluate(networks, latents, args.num_eval_batches, seed, args.mlp_eval)
    except (ValueError, torch.linalg.LinAlgError) as error:  # weights that are not finite, or make encodings explode
        raise InputError(f"the encodings of {directory} cannot be evaluated: {error}; train it anew") from None
    keep_results(directory, earlier_seed, seed)
    write_csv(results, directory / "results.csv")
    show_results(results, latents, args, directory / "results.png")
    return {"eval_seconds": round(time.perf_counter() - started, 1)}


if __name__ == "__main__":
    run_script(main)
