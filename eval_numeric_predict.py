"""Downstream tasks from the frozen encoding hz_x of trained numeric models (Section 5.1 of the paper, Figures 4 and 10).

    python eval_numeric_predict.py --model-id models/NAME              # one model, as main_numeric.py trained it
    python eval_numeric_predict.py --model-id models/*/                # all of them; what is no finished model is skipped
    python eval_numeric_predict.py --model-id models/NAME --seed 7 --overwrite

    y1 … y4    regressions: F of the first 3, 5, 7, 9 semantics                      R²
    y5         classification: y2 in two classes, in and out of distribution        Matthews correlation

The model directory receives results_predict.csv, results_classify.csv and downstream.png, and args.json a record of the
evaluation. A model that was evaluated with the same flags before is left as it is, so that a loop can be run again. The exit
code is 2 if a directory was skipped; the others are evaluated all the same.

Where the paper's text and its runs differ (--protocol), e^{−|v|} in F has the factor 0.6 ("code") or 0.4 ("paper"), and:

    classes    code: 2-means of y2 in each batch of 4096, class 1 the one of higher y2
               paper: y2 above the fitting set's median, for the fitting, the test and the shifted samples alike
    shift      the last two semantics v become 2 sign(v) v²; code: after that each of the two, by a coin of its own, is
               10 sign(v) with probability 0.1

Of n ≠ 10 semantics, y1 … y4 take the first 0.3n, 0.5n, 0.7n, 0.9n, rounded half up and at least one, and the shift leaves
alone what the classes depend on.
"""

import contextlib
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from sklearn.metrics import matthews_corrcoef
from tqdm import trange

import main_numeric
import probes
from latent_spaces import seeded_generator
from running.command_line import InputError, Parser, integer, run_script
from running.files import replaced, write_csv, write_json
from running.pictures import plot_downstream_scores
from running.training import (
    autocast,
    check_writable,
    describe_device,
    is_finished,
    matrix_precision,
    select_device,
    stored_args,
)

HIDDEN_UNITS, LEARNING_RATE, STEPS = 100, 1e-3, 10_000
CHUNK = 1024  # samples whose activations are still in a CPU cache when the gradient needs them
EXPONENTIAL_FACTOR = {"code": 0.6, "paper": 0.4}  # factor of Σ e^{−|v|} in F
JUMP, JUMP_PROBABILITY = 10.0, 0.1
FIT, TEST, SHIFTED, PROBE = range(4)  # substreams of random numbers
RESULTS = ("results_predict.csv", "results_classify.csv", "downstream.png")
# What args.json says of the distribution of the latents and of the networks.
SETTING = (
    "semantics_n",
    "modality_n",
    "theta_value",
    "beta_value",
    "change_prob",
    "causal_dependence",
    "margin_param",
    "cond_param",
    "n_mixing_layer",
    "encoding_size",
    "protocol",
)


def parse_flags(argv):
    """The Namespace of the command line."""
    parser = Parser(description=__doc__.split("\n\n")[0], epilog="\n\n".join(__doc__.split("\n\n")[1:]))
    parser.add_argument("--model-id", nargs="+", required=True, metavar="DIR", help="directories of trained models")
    parser.add_argument(
        "--seed", type=integer(0), help="evaluation's seed, not the training's (one more than the training's)"
    )
    parser.add_argument(
        "--num-eval-batches",
        type=integer(1),
        default=5,
        help=f"batches of {main_numeric.EVAL_BATCH} samples to fit, as many to test and as many shifted (%(default)s)",
    )
    parser.add_argument("--no-cuda", action="store_true", help="stay on the CPU")
    parser.add_argument(
        "--precision",
        choices=("fp32", "tf32", "bf16"),
        default="fp32",
        help="of matrix products; tf32 on CUDA alone, bf16 in the model alone (%(default)s)",
    )
    parser.add_argument(
        "--protocol",
        choices=("code", "paper"),
        help="tasks and shift as in the paper's runs or in its text (the model's, from args.json)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier evaluation")
    return parser.parse(argv)[0]


# --------------------------------------------------------------------------------------------------------------
# tasks


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
def encode(networks, latents, batches, generator, precision="fp32", shift_protocol=None):
    """(hz_x (N, D), s (N, n)), float32, of `batches` × 4096 fresh samples, shifted where shift_protocol is given."""
    encodings, semantics = [], []
    for _ in range(batches):
        z = latents.sample(main_numeric.EVAL_BATCH, generator)
        s = shift(z.s, shift_protocol, generator) if shift_protocol else z.s
        with matrix_precision(precision), autocast(latents.device, precision):
            encodings.append(networks["f_x"](networks["g_x"](torch.cat((s, z.m_x), dim=1))).float())
        semantics.append(s)
    return torch.cat(encodings), torch.cat(semantics)


# --------------------------------------------------------------------------------------------------------------
# probes: networks D → 100 (ReLU) → 1, or → 2 to classify


def initial_network(size, outputs, generator):
    """(hidden (100, size), output (outputs, 100)): Xavier-uniform weights (Glorot & Bengio, 2010); the biases are zero."""
    hidden, output = torch.empty(HIDDEN_UNITS, size), torch.empty(outputs, HIDDEN_UNITS)
    return tuple(torch.nn.init.xavier_uniform_(weight, generator=generator) for weight in (hidden, output))


class Probes:
    """K probes of one encoding that train as one network; the last `classifiers` of them tell two classes apart.

    networks: K pairs of initial weights (see `initial_network`). Two identities make a step cheap, and it stays the step
    of K networks with losses MSE and cross-entropy up to float32 rounding:

    - With the units that are on, M (100, N), and the deltas δ (N,) of the outputs, the gradients of the hidden weights W
      (100, D + 1) and of the output weights u (100,) both follow from G = M diag(δ) X: u ⊙ G and the rows of W ⊙ G summed.
    - The gradients of a classifier's two outputs are opposite, and Adam answers opposite gradients with opposite steps.
      So half their difference, a, has all there is to learn: logit 2a, and the gradient of one output for Adam.
    """

    def __init__(self, size, networks, classifiers, device):
        self.count, self.classifiers = len(networks), classifiers
        hidden = torch.stack([hidden.T for hidden, _ in networks], dim=1)
        self.hidden = torch.cat((hidden, torch.zeros(1, self.count, HIDDEN_UNITS))).to(device)  # (D + 1, K, 100)
        self.output = torch.stack([o[0] if len(o) == 1 else (o[1] - o[0]) / 2 for _, o in networks]).to(device)
        self.bias = torch.zeros(self.count, 1, device=device)
        if self.hidden.shape != (size + 1, self.count, HIDDEN_UNITS) or not 0 <= classifiers <= self.count:
            raise ValueError(
                f"initial weights {tuple(self.hidden.shape)} are not those of {self.count} probes of R^{size}"
            )
        is_classifier = torch.arange(self.count, device=device)[:, None] >= self.count - classifiers
        self._factor = 1.0 + is_classifier  # (K, 1): logit 2a
        self._slope = 2.0 - is_classifier.float()  # (K, 1): δ of MSE over output − target, of cross-entropy likewise

    def _chunks(self, h):
        """Chunks of encodings as (D + 1, B) with a row of ones, and buffers: activations flat, by probe, outputs (K, 1, B)."""
        # a GPU needs large kernels instead
        width = len(h) if h.is_cuda else min(CHUNK, len(h))
        units = self.count * HIDDEN_UNITS
        flat = {size: torch.empty(units, size, device=h.device) for size in {width, len(h) % width} - {0}}
        chunks = []
        for part in torch.cat((h, torch.ones_like(h[:, :1])), dim=1).split(width):
            activations, outputs = flat[len(part)], torch.empty(self.count, 1, len(part), device=h.device)
            chunks.append((part.T.contiguous(), activations, activations.view(self.count, HIDDEN_UNITS, -1), outputs))
        return chunks

    def _logit_layer(self):
        """Weights (K, 1, 100) and biases (K, 1, 1) of the logits."""
        return (self.output * self._factor).unsqueeze(1), (self.bias * self._factor).unsqueeze(1)

    @torch.no_grad()
    def train(self, h, targets, steps, show_progress=False):
        """Full-batch steps of Adam; h: (N, D) standardised encodings, targets: (N, K), 0 and 1 for the classifiers.

        Raises ValueError if the training diverges.
        """
        chunks = self._chunks(h)
        target_chunks = targets.float().T.unsqueeze(1).split(chunks[0][0].shape[1], dim=2)
        target_chunks = [chunk.contiguous() for chunk in target_chunks]
        parameters = [self.hidden, self.output, self.bias]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimiser = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
        common = torch.empty_like(self.hidden)  # G, (D + 1, K, 100)
        flat_common, flat_hidden = common.flatten(1), self.hidden.flatten(1).T
        slope = self._slope / len(h)
        first_classifier = self.count - self.classifiers
        for _ in trange(steps, unit="step", leave=False, disable=not (show_progress and sys.stderr.isatty())):
            common.zero_()
            self.bias.grad.zero_()
            weights, biases = self._logit_layer()
            # forward and back within a chunk, so that its activations never leave the cache
            for (x, flat, active, delta), target in zip(chunks, target_chunks, strict=True):
                torch.mm(flat_hidden, x, out=flat).relu_()
                torch.baddbmm(biases, weights, active, out=delta)
                delta[first_classifier:].sigmoid_()
                delta.sub_(target)
                self.bias.grad.add_(delta.sum(dim=2))
                torch.ops.aten.threshold_backward.grad_input(delta.expand_as(active), active, 0, grad_input=active)
                flat_common.addmm_(x, flat.T)
            common.mul_(slope)
            torch.mul(common, weights[:, 0], out=self.hidden.grad)
            torch.sum(common.mul_(self.hidden), dim=0, out=self.output.grad)
            self.bias.grad.mul_(slope)
            optimiser.step()
        if not all(parameter.isfinite().all() for parameter in parameters):
            raise ValueError("the training of a probe diverged: the encodings or the targets are too large")

    @torch.no_grad()
    def predict(self, h):
        """(N, K) float32 for encodings (N, D): predictions of the regressions, log-odds of class 1 of the classifiers."""
        weights, biases = self._logit_layer()
        chunks = self._chunks(h)
        for x, flat, active, output in chunks:
            torch.mm(self.hidden.flatten(1).T, x, out=flat).relu_()
            torch.baddbmm(biases, weights, active, out=output)
        return torch.cat([output for *_, output in chunks], dim=2)[:, 0].T


# --------------------------------------------------------------------------------------------------------------
# evaluation of one model


def score_tasks(fit, test, shifted, protocol, generator, show_progress=False):
    """(regression, classification): R² of y1 … y4 by task, and Matthews correlations of y5, iid and ood.

    fit, test, shifted: pairs of encodings (N, D) and semantics (N, n); generator: on the CPU, for the initial weights.
    Raises ValueError for values that are not finite.
    """
    fit_h, test_h = probes.standardise(fit[0], test[0])
    _, shifted_h = probes.standardise(fit[0], shifted[0])
    fit_y, test_y, shifted_y = (regression_targets(s, protocol) for _, s in (fit, test, shifted))
    fit_class, test_class, shifted_class = (
        class_labels(y[:, 1], fit_y[:, 1], protocol) for y in (fit_y, test_y, shifted_y)
    )
    networks = [initial_network(fit_h.shape[1], outputs, generator) for outputs in (1, 1, 1, 1, 2)]
    trained = Probes(fit_h.shape[1], networks, 1, fit_h.device)
    trained.train(fit_h, torch.cat((fit_y, fit_class[:, None]), dim=1), STEPS, show_progress)
    predicted, shifted_predicted = trained.predict(test_h), trained.predict(shifted_h)
    regression = {f"y{i + 1}": probes.r2_scores(test_y[:, i], predicted[:, i]) for i in range(test_y.shape[1])}
    classification = {
        "iid": matthews_corrcoef(test_class.cpu(), (predicted[:, -1] > 0).cpu()),
        "ood": matthews_corrcoef(shifted_class.cpu(), (shifted_predicted[:, -1] > 0).cpu()),
    }
    return regression, classification


def stored_setting(stored, directory):
    """The flags of main_numeric.py that a model was trained with, from its args.json; InputError if they are damaged."""
    file = directory / "args.json"
    if missing := [name for name in SETTING if name not in stored]:
        raise InputError(f"{file} has no {missing[0]!r}: it is damaged, or another script's")
    dependent = stored["causal_dependence"]
    if not isinstance(dependent, bool):
        raise InputError(f"{file} is damaged: causal_dependence is {dependent!r}, expected true or false")
    argv = [f"--{name.replace('_', '-')}={stored[name]}" for name in SETTING if name != "causal_dependence"]
    try:
        setting = main_numeric.parse_flags(argv + ["--causal-dependence"] * dependent)[0]
        main_numeric.check_subsets(setting)
    except InputError as error:
        raise InputError(f"{file} is damaged: {str(error).removesuffix(' (see --help)')}") from None
    return setting


def evaluate_model(directory, args, device):
    """Evaluate the model in `directory` and write its results; InputError or OSError if that cannot be."""
    started = time.perf_counter()
    if not directory.is_dir():
        raise InputError("no such directory" if not directory.exists() else "a file, expected the directory of a model")
    if not is_finished(directory):
        raise InputError(
            "it holds no finished model; main_numeric.py trains one, and --resume ends one that was stopped"
        )
    stored = stored_args(directory)
    setting = stored_setting(stored, directory)
    seed = stored["seed"] + 1 if args.seed is None else args.seed
    if seed == stored["seed"]:
        raise InputError(f"--seed {seed} is its training seed; evaluate with another one")
    protocol = args.protocol or setting.protocol
    details = {
        "seed": seed,
        "protocol": protocol,
        "num_eval_batches": args.num_eval_batches,
        "precision": args.precision,
    }
    existing = [name for name in RESULTS if (directory / name).exists()]
    if not args.overwrite and existing:
        # the record is written last, so that one that agrees stands for complete files
        if existing == list(RESULTS) and details.items() <= stored.get("downstream", {}).items():
            print(f"model        {directory} is evaluated already with seed {seed}: nothing to do", flush=True)
            return
        raise InputError(f"it has {existing[0]} already; --overwrite replaces it, made otherwise or incomplete")
    check_writable(directory)

    # the latents are those of the training, whatever the protocol of the tasks
    latents = main_numeric.build_latents(setting, stored["seed"], device)
    networks = main_numeric.load_networks(setting, latents, directory)
    sizes = prefix_sizes(setting.semantics_n)
    print(
        f"model        {directory}, training seed {stored['seed']}, evaluation seed {seed}, on {describe_device(device)}"
    )
    print(f"unbiased     {main_numeric.names_of(latents.unbiased)}")
    print(f"tasks        F of the first {', '.join(map(str, sizes))} semantics, {protocol} protocol", flush=True)

    def encoded(substream, shift_protocol=None):
        generator = seeded_generator(seed, "downstream", device, substream)
        return encode(networks, latents, args.num_eval_batches, generator, args.precision, shift_protocol)

    samples = encoded(FIT), encoded(TEST), encoded(SHIFTED, protocol)
    try:
        generator = seeded_generator(seed, "downstream", substream=PROBE)
        regression, classification = score_tasks(*samples, protocol, generator, show_progress=True)
    except ValueError as error:
        raise InputError(f"{error}; the model cannot be evaluated") from None

    # all or none: files of two evaluations shall not lie side by side
    with contextlib.ExitStack() as stack:
        predict, classify, picture = (stack.enter_context(replaced(directory / name)) for name in RESULTS)
        write_csv(pd.DataFrame(regression.items(), columns=["task", "metric_scores"]), predict)
        write_csv(pd.DataFrame([classification]), classify)
        title = f"unbiased {main_numeric.names_of(latents.unbiased)}"
        plot_downstream_scores(regression, classification, picture, title)
    seconds = round(time.perf_counter() - started, 1)
    details |= {"device": describe_device(device), "seconds": seconds}
    write_json(directory / "args.json", {**stored, "downstream": details})
    scores = "  ".join(f"{task} {score:.3f}" for task, score in regression.items())
    print(f"R²           {scores}")
    print(
        f"Matthews     y5 in distribution {classification['iid']:.3f}, shifted {classification['ood']:.3f}", flush=True
    )


def main(argv=None):
    """Evaluate every model named; returns the exit code, 2 if one was skipped."""
    args = parse_flags(argv)
    device = select_device(args)
    skipped = 0
    for name in args.model_id:
        try:
            evaluate_model(Path(name), args, device)
        except (InputError, OSError) as error:
            message = (
                f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else str(error)
            )
            print(f"error: {Path(name)} is skipped: {' '.join(message.split())}", file=sys.stderr, flush=True)
            skipped += 1
    if len(args.model_id) > 1:
        print(f"evaluated {len(args.model_id) - skipped} of {len(args.model_id)} directories")
    return 2 if skipped else 0


if __name__ == "__main__":
    run_script(main)
