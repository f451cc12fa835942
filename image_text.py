"""Training and evaluation of an image encoder and a text encoder: all that the experiments on image–text pairs share.

A script names its data set, its recipes and its results in an Experiment, and `run_experiment` does the rest. The model
directory receives args.json, encoder_img.pt, encoder_txt.pt, checkpoint.pt, train_log.csv, results.csv, results.png.
"""

import dataclasses
import time
from collections.abc import Callable

import pandas as pd
import torch

import probes
from datasets import EpochOrder
from encoders import ImageEncoder, TextEncoder, initialise, narrowed
from latent_spaces import seeded_generator
from losses import image_text_contrastive_loss
from running.command_line import InputError, Parser, integer, number
from running.files import write_csv, write_json
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
    recipe_values,
    save_weights,
    select_device,
    start_directory,
    stored_args,
    take_evaluation_seed,
    train,
    write_args,
)

NEGATIVES = {"code": "both", "paper": "cross"}  # of the loss, by protocol
PROBE_STEPS = {"code": None, "paper": 10_000}  # of the MLP probes; None: until their loss stalls
ENCODE_BATCH = 1024  # images encoded at once
TAU_LEAVES, TAU_ARRIVES = 0.4, 0.7  # shares of the steps between which τ goes from --first-tau to --tau
SPARE_UNTIL = 0.15  # share of the steps after which --spare-dimensions are cut off
WHITENING_FLOOR = 1e-4  # of variances, in units of the largest
MONITOR_PAIRS = 512  # pairs behind the scores of the progress lines to fit, and as many to test
MODALITIES = {"image": "encoder_img", "text": "encoder_txt"}
RUN_FLAGS = {"datapath", "workers", "checkpoint_steps", "save_all_checkpoints"}  # may differ between two calls
SCORES = ("r2_linreg", "r2_krreg", "mcc_logreg", "mcc_mlp")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What one experiment on image–text pairs has of its own.

    name: of fresh model directories; recipes: dict name → flags; bias_ids: of the settings;
    load(folder, bias_type, bias_id, device, workers): (ImageTextPairs, Bias); mean, std: of the pixels' channels;
    encoding_size(n): dimensions of the encodings for n unbiased semantics; perturbing: in words, how captions err;
    own_text_factors: whether text encodings are probed for what captions state, not for what images show; columns: dict
    column of results.csv → column of `evaluate`; show(results, setting, args, path): print the results and draw them.
    """

    name: str
    recipes: dict
    bias_ids: range
    load: Callable
    mean: tuple
    std: tuple
    encoding_size: Callable
    perturbing: str
    own_text_factors: bool
    columns: dict
    show: Callable


def image_text_recipes(paper_steps, **fast):
    """Dict of recipes, each a dict of flags: "paper" with that many steps, "fast" with what `fast` sets otherwise.

    "paper": exactly the paper's training. "fast": few steps with few pairs, at a learning rate that falls from a larger one, and
    with these changes more:
    - whitening_pairs: drawn weights send all encodings into a narrow cone; whitened ones use every dimension from the start.
    - first_tau: at τ = 1 encodings in eight places of a sphere have a loss within 0.003 of those that have spread evenly over it,
      so that most factors wait for a gradient that hardly exists; at a small τ it does. But there negatives of the same caption
      take away what pulls an image to its own: a few places become compact at a τ near 1 alone, so τ ends at 1.
    - text_lr_factor: a text encoder that moves more slowly does not give up what the image encoder has not found yet. With
      the captions of Causal3DIdent it is the other way: at a tenth of the rate both encoders find the shape later.
    - optimiser, spare_dimensions, first_batch_size: for Causal3DIdent, where the shape is what both encoders find last and give
      up first: places and colours alone tell most pairs of a small batch apart. See Muon and `spare_dimensions`.
    - norm_penalty: lengths, which the cosine does not see, forget what images alone show.
    """
    return {
        "paper": {
            "init": "default",
            "lr": 1e-5,
            "text_lr_factor": 1.0,
            "lr_schedule": "constant",
            "layer_lr": "uniform",
            "preconditioner": "none",
            "optimiser": "adam",
            "batch_size": 256,
            "final_batch_size": 0,
            "train_steps": paper_steps,
            "precision": "fp32",
            "first_tau": 0,
            "first_batch_size": 0,
            "spare_dimensions": 0,
            "whitening_pairs": 0,
            "norm_penalty": 0,
        },
        "fast": {
            "init": "he",
            "lr": 1e-3,
            "text_lr_factor": 1.0,
            "lr_schedule": "onecycle",
            "layer_lr": "uniform",
            "preconditioner": "none",
            "optimiser": "adam",
            "batch_size": 64,
            "final_batch_size": 0,
            "train_steps": 3_000,
            "precision": "auto",
            "first_tau": 0.06,
            "first_batch_size": 0,
            "spare_dimensions": 0,
            "whitening_pairs": 256,
            "norm_penalty": 1.0,
            **fast,
        },
    }


def make_parser(documentation, recipes, datapath, smallest):
    """Parser of a script with that docstring, with every flag but those of the setting.

    smallest: in words, the smallest encoding that is taken for --encoding-size 0.
    """
    parser = Parser(description=documentation.split("\n\n")[0], epilog="\n\n".join(documentation.split("\n\n")[1:]))
    add_training_flags(parser, recipes)
    group = parser.add_argument_group("checkpoints and data")
    group.add_argument(
        "--checkpoint-steps", type=integer(1), default=10_000,
        help="steps between two savings of the encoders alone (%(default)s)")  # fmt: skip
    group.add_argument(
        "--save-all-checkpoints", action="store_true",
        help="keep each of them, as encoder_img_STEP.pt and encoder_txt_STEP.pt")  # fmt: skip
    group.add_argument("--datapath", default=datapath, help="folder of the data set (%(default)s)")
    group.add_argument(
        "--workers", type=integer(0), default=0,
        help="threads that read each batch from disk, for a slow disk; 0 = the training's own (%(default)s)")  # fmt: skip
    group = parser.add_argument_group("encoders and loss")
    group.add_argument(
        "--encoding-size", type=integer(0), default=0,
        help=f"dimensions D of the encodings, 0 = {smallest} (%(default)s)")  # fmt: skip
    group.add_argument("--hidden-size", type=integer(1), default=100, help="outputs of the ResNet-18 (%(default)s)")
    group.add_argument("--tau", type=number(0, above=True), default=1.0, help="temperature (%(default)s)")
    group.add_argument(
        "--first-tau", type=number(0),
        help="temperature of the first steps, from which it goes in a straight line to --tau, that of the last; 0 = --tau always "
        f"({recipe_values(recipes, 'first_tau')})")  # fmt: skip
    group.add_argument(
        "--first-batch-size", type=integer(2, or_zero=True),
        help=f"pairs in a batch in the first {100 * TAU_LEAVES:g} %% of the steps, while the temperature is the first; 0 = "
        f"--batch-size always ({recipe_values(recipes, 'first_batch_size')})")  # fmt: skip
    group.add_argument(
        "--text-lr-factor", type=number(0, above=True),
        help="learning rate of the text encoder, in units of the image encoder's "
        f"({recipe_values(recipes, 'text_lr_factor')})")  # fmt: skip
    group.add_argument(
        "--spare-dimensions", type=integer(0),
        help=f"dimensions that the encodings have more in the first {100 * SPARE_UNTIL:g} %% of the steps "
        f"({recipe_values(recipes, 'spare_dimensions')})")  # fmt: skip
    group.add_argument(
        "--whitening-pairs", type=integer(2, or_zero=True),
        help="set the last layers, before training, so that the encodings of that many pairs have mean 0 and covariance I in "
        f"either modality; 0 = leave them as drawn ({recipe_values(recipes, 'whitening_pairs')})")  # fmt: skip
    group.add_argument(
        "--norm-penalty", type=number(0),
        help="what the relative variance of the encodings' lengths, which the loss does not see, adds to it at the end, and a "
        f"share of it before, as of the steps ({recipe_values(recipes, 'norm_penalty')})")  # fmt: skip
    return parser


def batch_sizes(args):
    """Pairs of a batch in words, from the first steps to the last."""
    sizes = (args.first_batch_size, args.batch_size, args.final_batch_size)
    return " to ".join(str(size) for size in sizes if size)


def check_setting(experiment, args):
    """Raise InputError for a --bias-id that is none."""
    ids = experiment.bias_ids
    if args.bias_id not in ids:
        raise InputError(f"--bias-id {args.bias_id} is out of range: settings are {ids[0]} … {ids[-1]}")


def encoding_size(experiment, args, setting):
    """Dimensions of the encodings."""
    return args.encoding_size or experiment.encoding_size(len(setting.unbiased))


def spare_dimensions(args):
    """Dimensions that encodings have more at the first step than at the last.

    In D dimensions the semantics that are found first leave no room for one that takes both encoders long, such as the shape
    among places and colours, and an encoder that gives it up teaches the other one nothing of it. In more dimensions it is
    found beside the others, and once both have it, it stays when the spare dimensions are cut off.
    """
    return 0 if args.evaluate else args.spare_dimensions


def open_pairs(experiment, args, device):
    """(pairs, setting) of the flags; InputError if the data do not serve."""
    pairs, setting = experiment.load(args.datapath, args.bias_type, args.bias_id, device, args.workers)
    available = len(pairs.splits["train"])
    sizes = {flag: getattr(args, flag) for flag in ("batch_size", "first_batch_size", "final_batch_size")}
    largest = max(sizes, key=sizes.get)
    if not args.evaluate and sizes[largest] > available:
        raise InputError(
            f"a batch of {sizes[largest]} pairs, and {args.datapath} has {available} to train with; lower "
            f"--{largest.replace('_', '-')}"
        )
    fit, test = (len(rows) for _, rows in probe_parts(pairs))
    if min(fit, test) < 2:
        raise InputError(
            f"{args.datapath} has {fit} pairs to fit the probes and {test} to test them, expected at least 2 of each"
        )
    return pairs, setting


def build_encoders(experiment, args, pairs, setting, device):
    """Dict of both encoders, their weights not set; InputError for captions that the text encoder cannot read."""
    size, spare = encoding_size(experiment, args, setting), spare_dimensions(args)
    try:
        text = TextEncoder(len(pairs.vocabulary), pairs.length, size, spare)
    except ValueError as error:
        setting = f"{args.bias_type} {args.bias_id}"
        raise InputError(f"{args.datapath}, {setting}: {error}; shorten or lengthen them in their files") from None
    image = ImageEncoder(size, experiment.mean, experiment.std, args.hidden_size, spare)
    return {"encoder_img": image.to(device), "encoder_txt": text.to(device)}


def set_weights(encoders, pairs, args):
    """Draw the weights of the encoders from the training seed, in place."""
    generator = seeded_generator(args.seed, "init")
    for encoder in encoders.values():
        device = next(encoder.parameters()).device
        initialise(encoder.cpu(), args.init, generator).to(device)
    if args.whitening_pairs:
        rows = torch.randperm(len(pairs.splits["train"]), generator=generator)[: args.whitening_pairs]
        rows = rows.to(pairs.images.index_device)
        whiten(encoders["encoder_img"], pairs.images_of("train", rows))
        whiten(encoders["encoder_txt"], pairs.tokens_of("train", rows))


@torch.no_grad()
def whiten(encoder, inputs):
    """Set the last layer so that the encodings of a batch have mean 0 and covariance I, in place.

    Directions that hardly vary are stretched by at most 100 times more than the widest.
    """
    encodings = encoder(inputs).double()
    covariance = torch.cov(encodings.T, correction=0).reshape(encodings.shape[1], -1)
    variances, directions = torch.linalg.eigh(covariance)
    if variances.max() <= 1e-10 * encodings.square().mean():  # a single pair, or captions that are all the same
        return
    scales = variances.clamp_min(WHITENING_FLOOR * variances.max()).rsqrt()
    transform = directions * scales @ directions.T
    layer = encoder.linear
    layer.bias.copy_(transform @ (layer.bias.double() - encodings.mean(dim=0)))
    layer.weight.copy_(transform @ layer.weight.double())


def save_encoders(encoders, directory, suffix=""):
    """Write encoder_img.pt and encoder_txt.pt, without spare dimensions."""
    for name, encoder in encoders.items():
        save_weights(narrowed(encoder), directory / f"{name}{suffix}.pt")


def temperature_at(args, share_done):
    """τ of a step: args.first_tau at first, args.tau at last, a straight line between (TAU_LEAVES, TAU_ARRIVES)."""
    if not args.first_tau:
        return args.tau
    way = min(max((share_done - TAU_LEAVES) / (TAU_ARRIVES - TAU_LEAVES), 0.0), 1.0)
    return args.first_tau + way * (args.tau - args.first_tau)


def batch_loss(encoders, pairs, order, args, share_done=0.0):
    """The loss of the next batch of training pairs, when that share of the steps is done."""
    large = args.first_batch_size if share_done < TAU_LEAVES else 0
    rows = order.next(large or batch_size_at(args, share_done))
    image, text = encoders["encoder_img"], encoders["encoder_txt"]
    h_x, h_t = image(pairs.images_of("train", rows)), text(pairs.tokens_of("train", rows))
    if share_done >= SPARE_UNTIL:
        h_x, h_t = h_x[:, : image.encoding_size], h_t[:, : text.encoding_size]
    loss = image_text_contrastive_loss(h_x, h_t, temperature_at(args, share_done), NEGATIVES[args.protocol])
    if args.norm_penalty:
        loss = loss + share_done * args.norm_penalty * (length_variance(h_x) + length_variance(h_t))
    return loss


def length_variance(h):
    """Variance of the lengths of (B, D) encodings in units of their squared mean, a constant; a scalar tensor."""
    lengths = h.float().norm(dim=1)
    return (lengths / lengths.mean().detach() - 1).square().mean()


# --------------------------------------------------------------------------------------------------------------
# evaluation


def probe_parts(pairs):
    """((split, rows), (split, rows)): the pairs that fit the probes, and those that test them.

    The split "fit" fits where there is one; else the first half of "test", in file order, fits and the second half tests.
    """
    test = torch.arange(len(pairs.splits["test"]))
    if "fit" in pairs.splits:
        return ("fit", torch.arange(len(pairs.splits["fit"]))), ("test", test)
    return ("test", test[: len(test) // 2]), ("test", test[len(test) // 2 :])


@torch.no_grad()
def encode(encoders, pairs, split, rows):
    """Dict image, text → (len(rows), D) float32 encodings of pairs of a split."""
    training = {name: encoder.training for name, encoder in encoders.items()}
    for encoder in encoders.values():
        encoder.eval()
    encoded = {
        "image": pairs.encode_images(split, rows, encoders["encoder_img"], ENCODE_BATCH),
        "text": pairs.encode_captions(split, rows, encoders["encoder_txt"], ENCODE_BATCH),
    }
    for name, encoder in encoders.items():
        encoder.train(training[name])
    return encoded


def probe_data(experiment, encoders, pairs, count=None):
    """Dict of modalities that share their factors → (encodings, fit_targets, test_targets).

    Keys are tuples of modalities; encodings: dict modality → (fit_h, test_h), standardised; targets: dict factor → (N,),
    classes in int64 or numbers in float64. `count` pairs to fit and to test, or all.
    """
    parts = [(split, rows[:count]) for split, rows in probe_parts(pairs)]
    fit, test = (encode(encoders, pairs, split, rows) for split, rows in parts)
    encodings = {name: probes.standardise(fit[name], test[name]) for name in fit}
    device = encodings["image"][0].device

    def targets(kind):
        factors = [(getattr(pairs.splits[split], kind), rows) for split, rows in parts]
        return [{name: values[rows].to(device) for name, values in part.items()} for part, rows in factors]

    if not experiment.own_text_factors:
        return {("image", "text"): (encodings, *targets("image_factors"))}
    kinds = {"image": "image_factors", "text": "text_factors"}
    return {(name,): ({name: encodings[name]}, *targets(kind)) for name, kind in kinds.items()}


def by_type(targets):
    """(continuous, discrete): the targets that are numbers, and those that are classes."""
    continuous = {name: values for name, values in targets.items() if values.is_floating_point()}
    return continuous, {name: values for name, values in targets.items() if name not in continuous}


def linear_scores(fit_h, fit_targets, test_h, test_targets):
    """Dict factor → R² of linear regression where it is continuous, MCC of logistic regression where it is discrete."""
    (numbers, classes), scores = by_type(fit_targets), {}
    if numbers:
        scores |= probes.linear_r2(fit_h, numbers, test_h, test_targets)
    if classes:
        scores |= probes.logistic_mcc(fit_h, classes, test_h, test_targets)
    return {name: scores[name] for name in fit_targets}


def nonlinear_scores(encodings, fit_targets, test_targets, generator, steps):
    """Dict (modality, factor) → R² or MCC of MLPs with one hidden layer, as `linear_scores`."""
    (numbers, classes), scores = by_type(fit_targets), {}
    if numbers:
        scores |= probes.mlp_r2(encodings, numbers, test_targets, generator, steps)
    if classes:
        scores |= probes.mlp_mcc(encodings, classes, test_targets, generator, steps)
    return scores


def evaluate(experiment, encoders, pairs, seed, protocol):
    """DataFrame of the scores of every factor: ix, modality, factor_name, factor_type, and SCORES, NaN where none applies."""
    generator, rows = seeded_generator(seed, "probe"), []
    for encodings, fit_targets, test_targets in probe_data(experiment, encoders, pairs).values():
        nonlinear = nonlinear_scores(encodings, fit_targets, test_targets, generator, PROBE_STEPS[protocol])
        for modality, (fit_h, test_h) in encodings.items():
            linear = linear_scores(fit_h, fit_targets, test_h, test_targets)
            for ix, (name, values) in enumerate(fit_targets.items()):
                kind = "continuous" if values.is_floating_point() else "discrete"
                found = dict(zip(SCORES[:2] if kind == "continuous" else SCORES[2:],
                                 (linear[name], nonlinear[modality, name]), strict=True))  # fmt: skip
                rows.append({"ix": ix, "modality": modality, "factor_name": name, "factor_type": kind, **found})
    return pd.DataFrame(rows, columns=["ix", "modality", "factor_name", "factor_type", *SCORES])


def make_monitor(experiment, encoders, pairs):
    """monitor() of `training.train`: linear scores of every factor, on a few pairs."""

    def monitor():
        columns, texts = {}, []
        for encodings, fit_targets, test_targets in probe_data(experiment, encoders, pairs, MONITOR_PAIRS).values():
            for modality, (fit_h, test_h) in encodings.items():
                scores = linear_scores(fit_h, fit_targets, test_h, test_targets)
                columns |= {f"{modality}_{name}": score for name, score in scores.items()}
                texts.append(f"linear {modality} " + " ".join(f"{max(score, 0):.2f}" for score in scores.values()))
        return columns, "  ".join(texts)

    return monitor


# --------------------------------------------------------------------------------------------------------------
# what a reader sees


def names_of(factors):
    """Set of factors in words."""
    return "{" + ", ".join(factors) + "}" if factors else "∅"


def describe_setting(experiment, args, pairs, setting, encoders, device):
    """The setting in words: what captions leave out, what they state wrongly, what should be learned."""
    parameters = sum(parameter.numel() for encoder in encoders.values() for parameter in encoder.parameters())
    train_count = len(pairs.splits["train"])
    test_count = sum(map(len, pairs.splits.values())) - train_count
    left_out = [name for name in pairs.splits["train"].image_factors if name not in setting.selected]
    height, width = pairs.images.array.shape[1:3]
    size, spare = encoding_size(experiment, args, setting), spare_dimensions(args)
    lines = {
        "data": f"{args.datapath}: {train_count} pairs to train, {test_count} to evaluate; images of {height} × {width}, "
        f"captions of {pairs.length} tokens, {len(pairs.vocabulary)} words",
        "selected": f"I_θ = {names_of(setting.selected)}; captions leave out {names_of(left_out)}",
        "perturbed": f"I_ρ = {names_of(setting.perturbed)}"
        + (f", {experiment.perturbing}" if setting.perturbed else ""),
        "unbiased": f"I_θ \\ I_ρ = {names_of(setting.unbiased)}: what the theory says is learned",
        "encoders": f"ResNet-18 and text CNN → R^{size}{f' and {spare} dimensions at first' if spare else ''}, "
        f"{parameters:,} parameters",
        "training": f"{args.recipe} recipe: {args.train_steps} steps of {batch_sizes(args)} pairs, lr {args.lr:g} "
        f"{args.lr_schedule}, {args.init} initialisation, negatives of {NEGATIVES[args.protocol]} modalities"
        f" ({args.protocol} protocol)",
        "device": f"{device}, {args.precision}",
    }
    return "\n".join(f"{name:12} {line}" for name, line in lines.items())


# --------------------------------------------------------------------------------------------------------------
# the run


def run_experiment(experiment, parse_flags, argv):
    """Train and evaluate, or with --evaluate evaluate again; parse_flags: the script's, of argv. Returns the exit code."""
    args, given = parse_flags(argv)
    apply_recipe(args, given, experiment.recipes)
    default_id = f"{experiment.name}_{args.bias_type}_{args.bias_id}"
    directory = open_model_directory(args, given, default_id, RUN_FLAGS, parse_flags)
    check_setting(experiment, args)
    device = select_device(args)
    if args.evaluate:
        return evaluate_again(experiment, args, directory, device)
    if args.resume and is_finished(directory):
        print(f"{directory} is finished already: nothing to resume")
        return 0
    if args.seed is None:
        args.seed = drawn_seed()
    pairs, setting = open_pairs(experiment, args, device)
    check_same_data(args, pairs, directory)
    encoders = build_encoders(experiment, args, pairs, setting, device)
    details = provenance(device) | {"data": pairs.fingerprint}
    start_directory(directory, args, details)
    print(f"model        {directory}, seed {args.seed}")
    print(describe_setting(experiment, args, pairs, setting, encoders, describe_device(device)), flush=True)

    set_weights(encoders, pairs, args)
    order = EpochOrder(len(pairs.splits["train"]), seeded_generator(args.seed, "order"), pairs.images.index_device)

    def compute_loss(share_done):
        return batch_loss(encoders, pairs, order, args, share_done)

    def keep_encoders(step):
        save_encoders(encoders, directory)
        if args.save_all_checkpoints:
            save_encoders(encoders, directory, f"_{step}")

    monitor = make_monitor(experiment, encoders, pairs)
    rates = {"encoder_txt": args.text_lr_factor}
    every = (args.checkpoint_steps, keep_encoders)
    progress = train(encoders, compute_loss, args, directory, {"order": order}, device, monitor, every, rates)
    save_encoders(encoders, directory)
    details |= {"eval_seed": args.seed + 1, "train_seconds": round(progress.seconds, 1)}
    with after_training(args):
        details |= write_evaluation(experiment, encoders, pairs, setting, args, directory, details["eval_seed"])
    write_args(directory, args, {**details, "finished": True})
    return 0


def check_same_data(args, pairs, directory):
    """Raise InputError if a run that is resumed or evaluated was trained on other pairs than those of --datapath."""
    if (args.resume or args.evaluate) and (directory / "args.json").exists():
        stored = stored_args(directory).get("data")
        if stored is not None and stored != pairs.fingerprint:
            raise InputError(
                f"{args.datapath} does not hold the images, captions and order that {directory} was trained with; name its "
                "data set with --datapath, or make it again with its seed"
            )


def evaluate_again(experiment, args, directory, device):
    """--evaluate: results.csv of a trained model by probes of another seed; the earlier results are kept beside it."""
    stored = take_evaluation_seed(args, directory)
    pairs, setting = open_pairs(experiment, args, device)
    check_same_data(args, pairs, directory)
    encoders = build_encoders(experiment, args, pairs, setting, device)
    for name, encoder in encoders.items():
        load_weights(encoder, directory / f"{name}.pt")
    print(f"model        {directory}, training seed {stored['seed']}, evaluation seed {args.seed}")
    print(describe_setting(experiment, args, pairs, setting, encoders, describe_device(device)), flush=True)
    timing = write_evaluation(experiment, encoders, pairs, setting, args, directory, args.seed, stored.get("eval_seed"))
    write_json(directory / "args.json", {**stored, "eval_seed": args.seed, **timing, "finished": True})
    return 0


def write_evaluation(experiment, encoders, pairs, setting, args, directory, seed, earlier_seed=None):
    """Evaluate, write results.csv and results.png, print both; returns the duration as a dict.

    The results of an earlier evaluation with another seed are kept as results_seed{N}.csv and .png.
    """
    started = time.perf_counter()
    try:
        results = evaluate(experiment, encoders, pairs, seed, args.protocol)
    except ValueError as error:  # weights that are not finite, or make encodings explode
        raise InputError(f"the encodings of {directory} cannot be evaluated: {error}; train it anew") from None
    keep_results(directory, earlier_seed, seed)
    columns = experiment.columns
    write_csv(results[list(columns.values())].set_axis(list(columns), axis=1), directory / "results.csv")
    experiment.show(results, setting, args, directory / "results.png")
    print(f"picture      {directory / 'results.png'}", flush=True)
    return {"eval_seconds": round(time.perf_counter() - started, 1)}
