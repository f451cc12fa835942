"""The evaluation of one numeric model at full size: the probes against scikit-learn, one target at a time.

    python benchmarks/numeric_eval.py              # linear and MLP probes: 20,480 + 20,480 samples, 26 targets
    python benchmarks/numeric_eval.py --krr        # and kernel ridge regression against GridSearchCV, 2,000 samples
    python benchmarks/numeric_eval.py --krr-full   # and kernel ridge regression at full size: time and peak memory

The encodings are synthetic: five smooth nonlinear mixtures of the unbiased semantics s_0 … s_4 with a little noise, so
some targets are predictable and the others are noise. Pin the cores with taskset and set OMP_NUM_THREADS and
OPENBLAS_NUM_THREADS to their number. --repeats 0 leaves the linear and MLP probes out.
"""

import resource
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neural_network import MLPRegressor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kernel_ridge
import mlp_probes
import probes
from running.command_line import Parser, integer, run_script
from running.cores import usable_cores
from running.devices import describe_device


def synthetic_encodings(samples, seed):
    """({encoding: (fit_h, test_h)}, fit_targets, test_targets) with `samples` rows each, float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    semantics, private = normal(2 * samples, 10), {name: normal(2 * samples, 5) for name in ("m_x", "m_t")}
    encodings = {}
    for name in ("hz_x", "hz_t"):
        bent = torch.tanh(semantics[:, :5] @ normal(5, 5) / 2) @ normal(5, 5)
        h = bent + semantics[:, :5] / 3 + 0.02 * normal(2 * samples, 5)
        encodings[name] = probes.standardise(h[:samples], h[samples:])
    targets = {f"s_{i}": semantics[:, i : i + 1] for i in range(10)} | {"s_inv": semantics[:, :5]} | private
    fit_targets = {name: target[:samples] for name, target in targets.items()}
    return encodings, fit_targets, {name: target[samples:] for name, target in targets.items()}


def our_evaluation(encodings, fit_targets, test_targets, seed, device):
    """R² by (probe, encoding, target) and seconds."""
    start = time.perf_counter()
    encodings = {name: tuple(h.to(device) for h in pair) for name, pair in encodings.items()}
    fit_targets, test_targets = (
        {name: target.to(device) for name, target in part.items()} for part in (fit_targets, test_targets)
    )
    scores = {}
    for name, (fit_h, test_h) in encodings.items():
        linear = probes.linear_r2(fit_h, fit_targets, test_h, test_targets)
        scores |= {("linear", name, target): score for target, score in linear.items()}
    mlp = probes.mlp_r2(encodings, fit_targets, test_targets, torch.Generator().manual_seed(seed))
    scores |= {("mlp", *key): score for key, score in mlp.items()}
    return scores, time.perf_counter() - start


def sklearn_evaluation(encodings, fit_targets, test_targets, seed):
    """The same by scikit-learn, one target at a time."""
    start, scores, limit = time.perf_counter(), {}, mlp_probes.MAX_EPOCHS
    for name, (fit_h, test_h) in encodings.items():
        for target in fit_targets:
            mlp = MLPRegressor(max_iter=limit, random_state=seed)
            for probe, model in (("linear", LinearRegression()), ("mlp", mlp)):
                model.fit(fit_h.numpy(), fit_targets[target].squeeze(1).numpy())
                prediction = model.predict(test_h.numpy()).reshape(len(test_h), -1)
                scores[probe, name, target] = r2_score(test_targets[target].numpy(), prediction)
    return scores, time.perf_counter() - start


def krr_evaluation(encodings, fit_targets, test_targets):
    """R² and chosen (α, γ) by (encoding, target), and seconds."""
    start, scores, best = time.perf_counter(), {}, {}
    for name, (fit_h, test_h) in encodings.items():
        results = kernel_ridge.kernel_ridge_r2(fit_h, fit_targets, test_h, test_targets, return_best=True)
        for collected, result in zip((scores, best), results, strict=True):
            collected.update({(name, target): value for target, value in result.items()})
    return scores, best, time.perf_counter() - start


def grid_search(fit_h, target):
    """A fitted GridSearchCV of kernel ridge regression, over the probe's own α, γ and folds."""
    grid = {"alpha": kernel_ridge.ALPHAS, "gamma": kernel_ridge.GAMMAS}
    search = GridSearchCV(KernelRidge(kernel="rbf"), grid, cv=KFold(kernel_ridge.FOLDS))
    return search.fit(fit_h.double().numpy(), target.double().numpy())


def grid_search_evaluation(encodings, fit_targets, test_targets):
    """The same by GridSearchCV, one target at a time."""
    start, scores, best = time.perf_counter(), {}, {}
    for name, (fit_h, test_h) in encodings.items():
        for target in fit_targets:
            search = grid_search(fit_h, fit_targets[target])
            scores[name, target] = r2_score(test_targets[target].numpy(), search.predict(test_h.double().numpy()))
            best[name, target] = (search.best_params_["alpha"], search.best_params_["gamma"])
    return scores, best, time.perf_counter() - start


def times(seconds):
    return f"median {statistics.median(seconds):7.1f} s, {min(seconds):.1f} to {max(seconds):.1f} s over {len(seconds)}"


def largest_difference(scores, reference):
    key = max(scores, key=lambda key: abs(scores[key] - reference[key]))
    own, other = scores[key], reference[key]
    return f"max |ΔR²| {abs(own - other):.1e} at {' '.join(key)} ({own:.4f}, {other:.4f})"


def main():
    parser = Parser(__doc__)
    parser.add_argument("--repeats", type=integer(1), default=5, help="timed runs of the linear and MLP probes")
    parser.add_argument("--baseline-repeats", type=integer(0), default=1, help="timed runs of scikit-learn; 0 leaves it out")
    parser.add_argument("--samples", type=integer(1), default=20_480, help="fitting samples, and as many test samples")
    parser.add_argument("--seed", type=integer(0), default=0)
    parser.add_argument("--threads", type=integer(1), default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--device", default="cpu", help="where the probes run; scikit-learn runs on the CPU")
    parser.add_argument("--krr", action="store_true", help="kernel ridge regression against GridSearchCV")
    parser.add_argument("--krr-full", action="store_true", help="kernel ridge regression at full size")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", ConvergenceWarning)
    cores = usable_cores()
    where = describe_device(torch.device(args.device))
    print(f"{where}, {cores} usable cores, torch {torch.__version__}", flush=True)

    if args.repeats > 0:
        data = synthetic_encodings(args.samples, args.seed)
        print(f"linear and MLP probes, {args.samples} + {args.samples} samples, {len(data[0]) * len(data[1])} targets")
        runs = [our_evaluation(*data, args.seed + run, args.device) for run in range(args.repeats)]
        print(f"  ours          {times([seconds for _, seconds in runs])}", flush=True)
        if args.baseline_repeats > 0:
            baseline = [sklearn_evaluation(*data, args.seed + run) for run in range(args.baseline_repeats)]
            print(f"  scikit-learn  {times([seconds for _, seconds in baseline])}")
            own, other = (statistics.median(seconds for _, seconds in part) for part in (runs, baseline))
            print(f"  {other / own:.1f} times as fast; {largest_difference(runs[0][0], baseline[0][0])}", flush=True)
            if len(baseline) > 1:
                print(f"  scikit-learn's own seeds: {largest_difference(baseline[1][0], baseline[0][0])}")

    if args.krr:
        data = synthetic_encodings(2_000, args.seed)
        scores, best, seconds = krr_evaluation(*data)
        reference, reference_best, reference_seconds = grid_search_evaluation(*data)
        print("kernel ridge regression, 2000 + 2000 samples")
        print(f"  ours {seconds:.1f} s, GridSearchCV {reference_seconds:.1f} s")
        same = sum(best[key] == reference_best[key] for key in best)
        print(f"  same (α, γ) for {same} of {len(best)} targets; {largest_difference(scores, reference)}", flush=True)

    if args.krr_full:
        data = synthetic_encodings(args.samples, args.seed)
        scores, best, seconds = krr_evaluation(*data)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"kernel ridge regression, {args.samples} + {args.samples} samples")
        print(f"  {seconds / 60:.1f} min, peak memory {peak:.1f} GiB")
        for key, score in scores.items():
            print(f"  {' '.join(key):12s} R² {score:7.4f}   α {best[key][0]:g}, γ {best[key][1]:.4g}")


if __name__ == "__main__":
    run_script(main)
