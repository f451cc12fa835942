"""Downstream tasks from the frozen encoding hz_x of trained numeric models (Section 5.1 of the paper, Figures 4 and 10).

    python eval_numeric_predict.py --model-id models/NAME              # one model, as main_numeric.py trained it
    python eval_numeric_predict.py --model-id models/*/                # all of them; what is no finished model is skipped
    python eval_numeric_predict.py --model-id models/NAME --seed 7 --overwrite

    y1 … y4    regressions: F of the first 3, 5, 7, 9 semantics                      R²
    y5         classification: y2 in two classes, in and out of distribution        Matthews correlation

The model directory receives results_predict.csv, results_classify.csv and downstream.png, and args.json a record of the
evaluation. A model that was evaluated with the same flags before is left as it is, so that a loop can be run again, after a kill
too: the three files and the record appear together. The exit code is 2 if a directory was skipped; the others are evaluated all
the same.

Where the paper's text and its runs differ (--protocol), e^{−|v|} in F has the factor 0.6 ("code") or 0.4 ("paper"), and:

    classes    code: 2-means of y2 in each batch of 4096, class 1 the one of higher y2
               paper: y2 above the fitting set's median, for the fitting, the test and the shifted samples alike
    shift      the last two semantics v become 2 sign(v) v²; code: after that each of the two, by a coin of its own, is
               10 sign(v) with probability 0.1

Of n ≠ 10 semantics, y1 … y4 take the first 0.3n, 0.5n, 0.7n, 0.9n, rounded half up and at least one, and the shift leaves
alone what the classes depend on.
"""

from running.command_line import InputError, Parser, integer, is_out_of_memory, run_script

# isort: split
import sys
import time
from pathlib import Path

import pandas as pd
import torch

import main_numeric
import probes
from latent_spaces import biased_blocks, seeded_generator
from mlp_probes import FullBatchProbes
from running.devices import describe_device, encoder_precision, keep_freed_memory, select_device, settled_precision
from running.directory import LATER_DOWNSTREAM, check_writable, is_finished, tidy, trained_args
from running.files import write_csv, write_json
from running.lock import occupied
from running.memory import limit_memory
from running.pictures import plot_downstream_scores
from running.staging import digests, is_recorded, staged

STEPS = 10_000
FAST_STEPS = (40_000, 2_500)  # of --probes fast: regressions in parts, whose steps are 0.3 as long; the classifier, 4 times
PART_RATE = 0.3
EXPONENTIAL_FACTOR = {"code": 0.6, "paper": 0.4}  # factor of Σ e^{−|v|} in F
JUMP, JUMP_PROBABILITY = 10.0, 0.1
FIT, TEST, SHIFTED, PROBE = range(4)  # substreams of random numbers
RESULTS = ("results_predict.csv", "results_classify.csv", "downstream.png")


def parse_flags(argv):
    """The Namespace of the command line; `claimed`: dict of the flags of the setting that were given."""
    parser = Parser(__doc__)
    batches = f"batches of {main_numeric.EVAL_BATCH} samples to fit, as many to test and as many shifted"
    parser.flag("--model-id", str, "directories of trained models", nargs="+", required=True, metavar="DIR")
    parser.flag("--seed", integer(0), "evaluation's seed, not the training's (one more than the training's)")
    parser.flag("--num-eval-batches", integer(1, 10_000), batches, 5)
    parser.flag("--no-cuda", bool, "stay on the CPU")
    parser.flag("--precision", ("fp32", "tf32", "bf16"), "of products; tf32 on CUDA, bf16 in the model alone", "fp32")
    parser.flag("--protocol", ("code", "paper"), "tasks and shift of the paper's runs or of its text (the model's)")
    parser.flag("--probes", ("paper", "fast"), f"{STEPS:,} full-batch steps, or an eighth of their time for nearly the "
                "same scores (the model's)")  # fmt: skip
    parser.flag("--overwrite", bool, "replace the results of an earlier evaluation")
    parser.section("setting", "args.json of the model has it; a flag that is given must agree with it")
    for name, kind, text, _ in main_numeric.SETTING:
        parser.flag(name, kind, text)
    args, given = parser.parse(argv)
    own = (name.removeprefix("--").replace("-", "_") for name, *_ in main_numeric.SETTING)
    args.claimed = {name: getattr(args, name) for name in own if name in given}
    return args


def check_claims(claimed, setting):
    """Raise InputError unless the flags of the setting that were given, a dict, are those of the model, a Namespace."""
    unbiased = len(biased_blocks(setting.theta_value, setting.beta_value, setting.semantics_n)[2])
    for name, value in claimed.items():
        own = getattr(setting, name)
        if name == "encoding_size":  # 0 is another word for the number of unbiased semantics
            value, own = value or unbiased, own or unbiased
        if value != own:
            raise InputError(f"--{name.replace('_', '-')} {value} contradicts {own} in its args.json; leave the flag out")


def prefix_sizes(n):
    """Numbers of leading semantics behind y1 … y4, of n: 3, 5, 7, 9 of ten, in proportion otherwise."""
    return tuple(max(1, (tenths * n + 5) // 10) for tenths in (3, 5, 7, 9))


def shifted_semantics(n):
    """Indices of the semantics that the shift changes: the last two, 8 and 9 of ten, but none that y2 depends on."""
    return range(max(n - 2, prefix_sizes(n)[1]), n)


def downstream_function(v, protocol):
    """F(v), (B, k) → (B,) float64: the regression target of k semantics.

    Σ v_i² + 0.3 Σ v_i³ + 0.5 Σ_{i<j} v_i v_j + 0.2 Σ_{i<j<k} v_i v_j v_k + 0.7 Σ (sin v_i + cos v_i) + 0.4 Σ log(1 + |v_i|)
    + c Σ e^{−|v_i|}. The sums over pairs and triples come from the power sums, by Newton's identities.
    """
    v = v.double()
    p1, p2, p3 = (v.pow(power).sum(dim=1) for power in (1, 2, 3))
    pairs, triples = (p1**2 - p2) / 2, (p1**3 - 3 * p1 * p2 + 2 * p3) / 6
    smooth = 0.7 * (v.sin() + v.cos()) + 0.4 * v.abs().log1p() + EXPONENTIAL_FACTOR[protocol] * (-v.abs()).exp()
    return p2 + 0.3 * p3 + 0.5 * pairs + 0.2 * triples + smooth.sum(dim=1)


def regression_targets(s, protocol):
    """y1 … y4 of semantics (B, n) as (B, 4) float64."""
    return torch.stack([downstream_function(s[:, :size], protocol) for size in prefix_sizes(s.shape[1])], dim=1)


def two_means(y):
    """(B,) bool: whether a value of y (B,) belongs to the higher of two clusters, those of least inertia.

    In one dimension clusters are intervals, so the best of all splits of the sorted values is the exact solution that
    k-means looks for. Values that are all equal make one cluster, the lower.
    """
    y = y.double() - y.double().mean()
    ordered = y.sort().values
    lower = torch.arange(1, len(y), device=y.device)
    # the inertia that a split after `lower` values takes away; the upper sum is minus the lower one
    gain = ordered.cumsum(dim=0)[:-1].square() / (lower * (len(y) - lower))
    gain[ordered[1:] == ordered[:-1]] = -1.0
    return y > ordered[gain.argmax()]


def class_labels(y2, fit_y2, protocol):
    """y5 of y2 (N,) as (N,) bool; fit_y2: y2 of the fitting set, whose lower median is the paper's split."""
    if protocol == "paper":
        return y2 > fit_y2.median()
    return torch.cat([two_means(batch) for batch in y2.split(main_numeric.EVAL_BATCH)])


def shift(s, protocol, generator):
    """Semantics (B, n) out of distribution, a new tensor: see the head of this file. The generator is for "code" alone."""
    s, moved = s.clone(), list(shifted_semantics(s.shape[1]))
    v = s[:, moved]
    s[:, moved] = 2 * v.sign() * v.square()
    if protocol == "code":
        jumps = torch.rand(v.shape, generator=generator, device=v.device) < JUMP_PROBABILITY
        s[:, moved] = torch.where(jumps, JUMP * v.sign(), s[:, moved])
    return s


@torch.no_grad()
def encode(experiment, batches, generator, precision, shift_protocol):
    """(hz_x (N, D), s (N, n)), float32, of `batches` × 4096 fresh samples, shifted where shift_protocol is not None."""
    g_x, f_x = experiment.networks["g_x"], experiment.networks["f_x"]
    encodings, semantics = [], []
    for _ in range(batches):
        z = experiment.latents.sample(main_numeric.EVAL_BATCH, generator)
        s = shift(z.s, shift_protocol, generator) if shift_protocol else z.s
        x = g_x(torch.cat((s, z.m_x), dim=1))
        with encoder_precision(s.device, precision):
            encodings.append(f_x(x).float())
        semantics.append(s)
    return torch.cat(encodings), torch.cat(semantics)


def score_tasks(fit, test, shifted, protocol, generator, probes_name="paper"):
    """(regression, classification): R² of y1 … y4 by task, and Matthews correlations of y5, iid and ood.

    fit, test, shifted: pairs of encodings (N, D) and semantics (N, n); generator: on the CPU, for the initial weights and the
    order of samples; probes_name: "paper" or "fast". Raises ValueError for values that are not finite.
    """
    fit_h, test_h, shifted_h = (probes.standardise(fit[0], h)[1] for h, _ in (fit, test, shifted))
    targets = [regression_targets(s, protocol) for _, s in (fit, test, shifted)]
    classes = [class_labels(y[:, 1], targets[0][:, 1], protocol) for y in targets]
    tasks = targets[0], classes[0][:, None]
    if probes_name == "paper":
        trained = [FullBatchProbes(fit_h.shape[1], 4, 1, generator, fit_h.device)]
        trained[0].train(fit_h, torch.cat(tasks, dim=1), STEPS)
    else:  # the same initial weights; the classifier goes on to overfit where its steps hold all samples, as the paper's does
        trained = [FullBatchProbes(fit_h.shape[1], *count, generator, fit_h.device) for count in ((4, 0), (0, 1))]
        trained[0].train_in_parts(fit_h, tasks[0], FAST_STEPS[0], PART_RATE, generator)
        trained[1].train(fit_h, tasks[1], FAST_STEPS[1], STEPS / FAST_STEPS[1])
    predicted, shifted_predicted = (torch.cat([part.predict(h) for part in trained], dim=1) for h in (test_h, shifted_h))
    wanted, found = ({f"y{i + 1}": y[:, i] for i in range(4)} for y in (targets[1], predicted))
    regression = probes.r2_by_name(wanted, found)
    iid = probes.matthews_correlation(classes[1], predicted[:, 4] > 0)
    ood = probes.matthews_correlation(classes[2], shifted_predicted[:, 4] > 0)
    return regression, {"iid": iid, "ood": ood}


def evaluate_model(directory, args, device):
    """Evaluate the model in `directory` and write its results; InputError or OSError if that cannot be."""
    if not directory.is_dir():
        raise InputError("no such directory" if not directory.exists() else "a file, expected the directory of a model")
    if not is_finished(directory):
        raise InputError("it holds no finished model; main_numeric.py trains one, and --resume ends one that was stopped")
    with occupied(directory):
        tidy(directory, main_numeric.NumericExperiment.weight_files)
        _evaluate(directory, args, device)


def _evaluate(directory, args, device):
    started = time.perf_counter()
    setting, stored = trained_args(directory, main_numeric.NumericExperiment)
    check_claims(args.claimed, setting)
    seed = setting.seed + 1 if args.seed is None else args.seed
    if seed == setting.seed:
        raise InputError(f"--seed {seed} is its training seed; evaluate with another one")
    protocol = args.protocol or setting.protocol
    batches, precision, probes_name = args.num_eval_batches, args.precision, args.probes or setting.probes
    details = {"seed": seed, "protocol": protocol, "num_eval_batches": batches, "precision": precision, "probes": probes_name}
    existing = [name for name in RESULTS if (directory / name).exists()]
    if not args.overwrite and existing:
        if not details.items() <= (LATER_DOWNSTREAM | stored.get("downstream", {})).items():
            raise InputError(f"it has {existing[0]} already; --overwrite replaces it, made otherwise or incomplete")
        if existing == list(RESULTS) and all(is_recorded(directory / name) for name in RESULTS):
            print(f"model        {directory} is evaluated already with seed {seed}: nothing to do", flush=True)
            return
    check_writable(directory)

    # the latents are those of the training, whatever the protocol of the tasks
    experiment = main_numeric.NumericExperiment(setting, device)
    experiment.load(directory)
    unbiased, where = main_numeric.semantics(experiment.latents.unbiased), describe_device(device)
    sizes = ", ".join(map(str, prefix_sizes(setting.semantics_n)))
    print(f"model        {directory}, training seed {setting.seed}, evaluation seed {seed}, on {where}")
    print(f"unbiased     {unbiased}")
    print(f"tasks        F of the first {sizes} semantics, {protocol} protocol", flush=True)

    try:
        samples = [
            encode(experiment, batches, seeded_generator(seed, "downstream", device, substream), precision, shift_protocol)
            for substream, shift_protocol in ((FIT, None), (TEST, None), (SHIFTED, protocol))
        ]
        generator = seeded_generator(seed, "downstream", substream=PROBE)
        regression, classification = score_tasks(*samples, protocol, generator, probes_name)
    except ValueError as error:
        raise InputError(f"{error}; the model cannot be evaluated") from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"too little memory on {where}; lower --num-eval-batches, or use --no-cuda") from None

    # all or none: files of two evaluations shall not lie side by side
    with staged(directory) as folder:
        predict, classify, picture = (folder / name for name in RESULTS)
        write_csv(pd.DataFrame(regression.items(), columns=["task", "metric_scores"]), predict)
        write_csv(pd.DataFrame([classification]), classify)
        plot_downstream_scores(regression, classification, picture, f"unbiased {unbiased}")
        details |= {"device": where, "seconds": round(time.perf_counter() - started, 1)}
        files = {**stored.get("files", {}), **digests(folder)}
        write_json(directory / "args.json", {**stored, "files": files, "downstream": details})
    print("R²           " + "  ".join(f"{task} {score:.3f}" for task, score in regression.items()))
    print("Matthews     y5 in distribution {iid:.3f}, shifted {ood:.3f}".format(**classification), flush=True)


def main(argv=None):
    """Evaluate every model named; returns the exit code, 2 if one was skipped."""
    args = parse_flags(argv)
    keep_freed_memory()
    device = select_device(args.no_cuda)
    settled_precision(args.precision, device)  # refuses what the device does not have
    if device.type == "cpu":
        limit_memory()
    skipped = 0
    for name in args.model_id:
        try:
            evaluate_model(Path(name), args, device)
        except (InputError, OSError) as error:
            named = isinstance(error, OSError) and error.filename
            message = f"{error.strerror}: {error.filename}" if named else str(error)
            print(f"error: {Path(name)} is skipped: {' '.join(message.split())}", file=sys.stderr, flush=True)
            skipped += 1
    if len(args.model_id) > 1:
        print(f"evaluated {len(args.model_id) - skipped} of {len(args.model_id)} directories")
    return 2 if skipped else 0


if __name__ == "__main__":
    run_script(main)
