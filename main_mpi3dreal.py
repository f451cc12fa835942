"""Train and evaluate one pair of encoders on MPI3D-Complex: photographs and generated captions (Section 5.2 of the paper).

    python main_mpi3dreal.py --bias-type selection --bias-id 0     # captions speak of the colour alone
    python main_mpi3dreal.py --bias-type perturbation --bias-id 2  # camera and background are stated wrongly
    python main_mpi3dreal.py --bias-id 0 --encoding-size 1         # encodings of one dimension
    python main_mpi3dreal.py --recipe fast --bias-id 2             # the same result in a fraction of the steps
    python main_mpi3dreal.py --model-id NAME --resume              # continue a run that was stopped
    python main_mpi3dreal.py --model-id NAME --evaluate --seed 7   # probe a trained model again

--datapath is the folder of the images, with the captions of rendering_data/MPI3D/render_multimodal_mpi3d.py in it.
The model directory receives args.json, encoder_img.pt, encoder_txt.pt, checkpoint.pt, train_log.csv, results.csv, results.png.
"""

import time

import pandas as pd
import torch

import probes
from command_line import InputError, Parser, integer, number, run_script
from datasets import BIAS_IDS, BIAS_TYPES, MPI3D_GRID, MPI3D_MEAN, MPI3D_STD, EpochOrder, load_mpi3d
from encoders import ImageEncoder, TextEncoder, initialise
from figures import plot_factor_scores
from files import write_csv, write_json
from latent_spaces import seeded_generator
from losses import image_text_contrastive_loss
from training import (
    add_training_flags,
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
    stored_args,
    take_evaluation_seed,
    train,
    write_args,
)

# "paper": exactly the paper's training. "fast": the same result from a twentieth of the steps.
RECIPES = {
    "paper": {
        "init": "default",
        "lr": 1e-5,
        "lr_schedule": "constant",
        "layer_lr": "uniform",
        "preconditioner": "none",
        "batch_size": 256,
        "final_batch_size": 0,
        "train_steps": 200_001,
        "precision": "fp32",
    },
    "fast": {
        "init": "he",
        "lr": 1e-3,
        "lr_schedule": "onecycle",
        "layer_lr": "uniform",
        "preconditioner": "none",
        "batch_size": 256,
        "final_batch_size": 0,
        "train_steps": 10_000,
        "precision": "auto",
    },
}
NEGATIVES = {"code": "both", "paper": "cross"}  # of the loss, by protocol
PROBE_STEPS = {"code": None, "paper": 10_000}  # of the MLP probes; None: until their loss stalls
SMALLEST_ENCODING = 3  # dimensions, where fewer semantics are unbiased
ENCODE_BATCH = 1024  # images encoded at once
MONITOR_PAIRS = 512  # test pairs behind the scores of the progress lines to fit, and as many to test
MODALITIES = {"image": "encoder_img", "text": "encoder_txt"}
RUN_FLAGS = {"datapath", "workers", "checkpoint_steps", "save_all_checkpoints"}  # may differ between two calls


def parse_flags(argv):
    """(args, given) of the command line; the recipe's values are not filled in yet."""
    parser = Parser(description=__doc__.split("\n\n")[0], epilog="\n\n".join(__doc__.split("\n\n")[1:]))
    add_training_flags(parser, RECIPES)
    group = parser.add_argument_group("checkpoints and data")
    group.add_argument(
        "--checkpoint-steps", type=integer(1), default=10_000,
        help="steps between two savings of the encoders alone (%(default)s)")  # fmt: skip
    group.add_argument(
        "--save-all-checkpoints", action="store_true",
        help="keep each of them, as encoder_img_STEP.pt and encoder_txt_STEP.pt")  # fmt: skip
    group.add_argument("--datapath", default="data/MPI3d_real_complex", help="folder of the data set (%(default)s)")
    group.add_argument(
        "--workers", type=integer(0), default=0,
        help="threads that read each batch from disk, for a slow disk; 0 = the training's own (%(default)s)")  # fmt: skip
    group = parser.add_argument_group("setting: what the caption says of the image")
    group.add_argument(
        "--bias-type", choices=BIAS_TYPES, default="selection",
        help="captions leave factors out, or state them wrongly (%(default)s)")  # fmt: skip
    group.add_argument(
        "--bias-id", type=int, default=0,
        help="selection: 0 colour alone, + 1 shape, + 2 size, + 3 camera, + 4 background; perturbation: the number of "
        "factors stated wrongly, of background, camera, size, shape (%(default)s)")  # fmt: skip
    group = parser.add_argument_group("encoders and loss")
    group.add_argument(
        "--encoding-size", type=integer(0), default=0,
        help=f"dimensions D of the encodings, 0 = number of unbiased semantics, at least {SMALLEST_ENCODING} "
        "(%(default)s)")  # fmt: skip
    group.add_argument("--hidden-size", type=integer(1), default=100, help="outputs of the ResNet-18 (%(default)s)")
    group.add_argument("--tau", type=number(0, above=True), default=1.0, help="temperature (%(default)s)")
    return parser.parse(argv)


def check_setting(args):
    """Raise InputError for a --bias-id that is none."""
    if args.bias_id not in BIAS_IDS:
        raise InputError(f"--bias-id {args.bias_id} is out of range: settings are {BIAS_IDS[0]} … {BIAS_IDS[-1]}")


def encoding_size(args, setting):
    """Dimensions of the encodings."""
    return args.encoding_size or max(SMALLEST_ENCODING, len(setting.unbiased))


def open_pairs(args, device):
    """(pairs, setting) of the flags; InputError if the data do not serve."""
    pairs, setting = load_mpi3d(args.datapath, args.bias_type, args.bias_id, device, args.workers)
    largest, available = max(args.batch_size, args.final_batch_size), len(pairs.splits["train"])
    if not args.evaluate and largest > available:
        raise InputError(f"a batch of {largest} pairs, and {args.datapath} has {available} to train with")
    if len(pairs.splits["test"]) < 4:
        raise InputError(
            f"{args.datapath} has {len(pairs.splits['test'])} test pairs, expected at least 4 for the probes"
        )
    return pairs, setting


def build_encoders(args, pairs, setting, device):
    """Dict of both encoders, their weights not set; InputError for captions that the text encoder cannot read."""
    size = encoding_size(args, setting)
    try:
        text = TextEncoder(len(pairs.vocabulary), pairs.length, size)
    except ValueError as error:
        raise InputError(f"{args.datapath}: {error}") from None
    image = ImageEncoder(size, MPI3D_MEAN, MPI3D_STD, args.hidden_size)
    return {"encoder_img": image.to(device), "encoder_txt": text.to(device)}


def set_weights(encoders, args):
    """Draw the weights of the encoders from the training seed, in place."""
    generator = seeded_generator(args.seed, "init")
    for encoder in encoders.values():
        device = next(encoder.parameters()).device
        initialise(encoder.cpu(), args.init, generator).to(device)


def save_encoders(encoders, directory, suffix=""):
    """Write encoder_img.pt and encoder_txt.pt."""
    for name, encoder in encoders.items():
        save_weights(encoder, directory / f"{name}{suffix}.pt")


def batch_loss(encoders, pairs, order, batch_size, args):
    """The loss of the next `batch_size` training pairs."""
    rows = order.next(batch_size)
    h_x = encoders["encoder_img"](pairs.images_of("train", rows))
    h_t = encoders["encoder_txt"](pairs.tokens_of("train", rows))
    return image_text_contrastive_loss(h_x, h_t, args.tau, NEGATIVES[args.protocol])


# --------------------------------------------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def encode(encoders, pairs, rows):
    """Dict image, text → (len(rows), D) float32 encodings of test pairs."""
    training = {name: encoder.training for name, encoder in encoders.items()}
    for encoder in encoders.values():
        encoder.eval()
    encoded = {
        "image": pairs.encode_images("test", rows, encoders["encoder_img"], ENCODE_BATCH),
        "text": pairs.encode_captions("test", rows, encoders["encoder_txt"], ENCODE_BATCH),
    }
    for name, encoder in encoders.items():
        encoder.train(training[name])
    return encoded


def probe_data(encoders, pairs, count=None):
    """(encodings, fit_targets, test_targets): the first half of the test pairs, in file order, fits, the second half tests.

    encodings: dict modality → (fit_h, test_h), standardised; targets: dict factor → (N,) classes of the image. `count`
    pairs of each half, or all.
    """
    split = pairs.splits["test"]
    half, total = len(split) // 2, len(split)
    parts = (torch.arange(half)[:count], torch.arange(half, total)[:count])
    fit, test = (encode(encoders, pairs, rows) for rows in parts)
    encodings = {name: probes.standardise(fit[name], test[name]) for name in fit}
    device = encodings["image"][0].device
    targets = [{name: values[rows].to(device) for name, values in split.image_factors.items()} for rows in parts]
    return encodings, *targets


def evaluate(encoders, pairs, seed, protocol):
    """MCC of linear and nonlinear probes of both encodings for every factor of the image: the table of results.csv."""
    encodings, fit_targets, test_targets = probe_data(encoders, pairs)
    generator = seeded_generator(seed, "probe")
    nonlinear = probes.mlp_mcc(encodings, fit_targets, test_targets, generator, PROBE_STEPS[protocol])
    rows = []
    for modality, (fit_h, test_h) in encodings.items():
        linear = probes.logistic_mcc(fit_h, fit_targets, test_h, test_targets)
        rows += [(ix, modality, name, linear[name], nonlinear[modality, name]) for ix, name in enumerate(MPI3D_GRID)]
    return pd.DataFrame(rows, columns=["ix", "modality", "semantic_name", "mcc_logreg", "mcc_mlp"])


def make_monitor(encoders, pairs):
    """monitor() of `training.train`: MCC of logistic regression for every factor, on a few test pairs."""

    def monitor():
        encodings, fit_targets, test_targets = probe_data(encoders, pairs, MONITOR_PAIRS)
        columns, texts = {}, []
        for modality, (fit_h, test_h) in encodings.items():
            scores = probes.logistic_mcc(fit_h, fit_targets, test_h, test_targets)
            columns |= {f"{modality}_{name}": score for name, score in scores.items()}
            texts.append(f"MCC {modality} " + " ".join(f"{max(score, 0):.2f}" for score in scores.values()))
        return columns, "  ".join(texts)

    return monitor


# --------------------------------------------------------------------------------------------------------------
# what a reader sees


def names_of(factors):
    """Set of factors in words."""
    return "{" + ", ".join(factors) + "}" if factors else "∅"


def describe_setting(args, pairs, setting, encoders, device):
    """The setting in words: what captions leave out, what they state wrongly, what should be learned."""
    parameters = sum(parameter.numel() for encoder in encoders.values() for parameter in encoder.parameters())
    train_count, test_count = len(pairs.splits["train"]), len(pairs.splits["test"])
    left_out = [name for name in MPI3D_GRID if name not in setting.selected]
    height, width = pairs.images.array.shape[1:3]
    size = encoding_size(args, setting)
    lines = {
        "data": f"{args.datapath}: {train_count} pairs to train, {test_count} to evaluate; images of {height} × {width}, "
        f"captions of {pairs.length} tokens, {len(pairs.vocabulary)} words",
        "selected": f"I_θ = {names_of(setting.selected)}; captions leave out {names_of(left_out)}",
        "perturbed": f"I_ρ = {names_of(setting.perturbed)}"
        + (", each with probability 0.9" if setting.perturbed else ""),
        "unbiased": f"I_θ \\ I_ρ = {names_of(setting.unbiased)}: what the theory says is learned",
        "encoders": f"ResNet-18 and text CNN → R^{size}, {parameters:,} parameters",
        "training": f"{args.recipe} recipe: {args.train_steps} steps of {args.batch_size} pairs, lr {args.lr:g} "
        f"{args.lr_schedule}, {args.init} initialisation, negatives of {NEGATIVES[args.protocol]} modalities"
        f" ({args.protocol} protocol)",
        "device": f"{device}, {args.precision}",
    }
    return "\n".join(f"{name:12} {line}" for name, line in lines.items())


def verdict(results, setting):
    """One sentence: whether exactly the unbiased factors were learned."""
    inside = results.semantic_name.isin(setting.unbiased)
    lowest, highest = results[inside].mcc_mlp.min(), max(results[~inside].mcc_mlp.max(), 0)
    found = f"{names_of(setting.unbiased)} has nonlinear MCC of at least {lowest:.2f}, everything else at most {highest:.2f}"
    if lowest >= 0.9 and highest <= 0.1:
        return f"Exactly the unbiased block is learned: {found}."
    return f"Not (yet) the pattern of the theory: {found}."


def show_results(results, setting, args, path):
    """Print the table and the verdict, and draw results.png."""
    tables = {}
    for score, title in (("mcc_logreg", "linear"), ("mcc_mlp", "nonlinear")):
        table = results.pivot(index="modality", columns="semantic_name", values=score)
        tables[f"{title} MCC"] = table[list(MPI3D_GRID)].loc[list(MODALITIES)]
    printed = pd.concat({title: scores.T for title, scores in tables.items()}, axis=1)
    printed.index = [f"{name} *" if name in setting.unbiased else name for name in printed.index]
    printed.columns.names = [None, None]
    print(printed.clip(lower=0).round(3).to_string(), "(* unbiased)", sep="\n")
    plot_factor_scores(tables, path, f"{args.bias_type} bias, setting {args.bias_id}", set(setting.unbiased))
    print(verdict(results, setting))


# --------------------------------------------------------------------------------------------------------------


def main(argv=None):
    """Train and evaluate, or with --evaluate evaluate again; returns the exit code."""
    args, given = parse_flags(argv)
    apply_recipe(args, given, RECIPES)
    directory = open_model_directory(args, given, f"mpi3d_{args.bias_type}_{args.bias_id}", RUN_FLAGS)
    check_setting(args)
    device = select_device(args)
    if args.evaluate:
        return evaluate_again(args, directory, device)
    if is_finished(directory) and args.resume:
        print(f"{directory} is finished already: nothing to resume")
        return 0
    if args.seed is None:
        args.seed = drawn_seed()
    pairs, setting = open_pairs(args, device)
    check_same_data(args, pairs, directory)
    encoders = build_encoders(args, pairs, setting, device)
    details = provenance(device) | {"data": pairs.fingerprint}
    start_directory(directory, args, details)
    print(f"model        {directory}, seed {args.seed}")
    print(describe_setting(args, pairs, setting, encoders, describe_device(device)), flush=True)

    set_weights(encoders, args)
    order = EpochOrder(len(pairs.splits["train"]), seeded_generator(args.seed, "order"), pairs.images.index_device)

    def compute_loss(share_done):
        return batch_loss(encoders, pairs, order, batch_size_at(args, share_done), args)

    def after_step(step):
        if step % args.checkpoint_steps == 0:
            save_encoders(encoders, directory)
            if args.save_all_checkpoints:
                save_encoders(encoders, directory, f"_{step}")

    monitor = make_monitor(encoders, pairs)
    progress = train(encoders, compute_loss, args, directory, {"order": order}, device, monitor, after_step)
    save_encoders(encoders, directory)
    details |= {"eval_seed": args.seed + 1, "train_seconds": round(progress.seconds, 1)}
    details |= write_evaluation(encoders, pairs, setting, args, directory, details["eval_seed"])
    write_args(directory, args, {**details, "finished": True})
    return 0


def check_same_data(args, pairs, directory):
    """Raise InputError if a run that is resumed or evaluated was trained on other captions than those of --datapath."""
    if (args.resume or args.evaluate) and (directory / "args.json").exists():
        stored = stored_args(directory).get("data")
        if stored is not None and stored != pairs.fingerprint:
            raise InputError(
                f"{args.datapath} does not hold the captions and the order that {directory} was trained with; name its data "
                "set with --datapath, or render the captions again with its seed"
            )


def evaluate_again(args, directory, device):
    """--evaluate: results.csv of a trained model by probes of another seed; the earlier results are kept beside it."""
    stored = take_evaluation_seed(args, directory)
    pairs, setting = open_pairs(args, device)
    check_same_data(args, pairs, directory)
    encoders = build_encoders(args, pairs, setting, device)
    for name, encoder in encoders.items():
        load_weights(encoder, directory / f"{name}.pt")
    print(f"model        {directory}, training seed {stored['seed']}, evaluation seed {args.seed}")
    print(describe_setting(args, pairs, setting, encoders, describe_device(device)), flush=True)
    timing = write_evaluation(encoders, pairs, setting, args, directory, args.seed, stored.get("eval_seed"))
    write_json(directory / "args.json", {**stored, "eval_seed": args.seed, **timing, "finished": True})
    return 0


def write_evaluation(encoders, pairs, setting, args, directory, seed, earlier_seed=None):
    """Evaluate, write results.csv and results.png, print both; returns the duration as a dict.

    The results of an earlier evaluation with another seed are kept as results_seed{N}.csv and .png.
    """
    started = time.perf_counter()
    try:
        results = evaluate(encoders, pairs, seed, args.protocol)
    except ValueError as error:  # weights that are not finite, or make encodings explode
        raise InputError(f"the encodings of {directory} cannot be evaluated: {error}; train it anew") from None
    keep_results(directory, earlier_seed, seed)
    write_csv(results, directory / "results.csv")
    show_results(results, setting, args, directory / "results.png")
    return {"eval_seconds": round(time.perf_counter() - started, 1)}


if __name__ == "__main__":
    run_script(main)
