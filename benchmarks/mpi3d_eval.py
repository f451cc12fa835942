"""The evaluation of one model on MPI3D-Complex at full size: the probes against scikit-learn, one factor at a time.

    python benchmarks/mpi3d_eval.py                       # 23,040 + 23,040 pairs, 7 factors, both modalities
    python benchmarks/mpi3d_eval.py --samples 2304        # a tenth of that

The encodings are synthetic: clusters for the colours, the shapes and the camera, so noisy that they overlap, and a trace of
one joint's forty positions, so that classes are found nearly always, sometimes, or never. Pin the cores with taskset and
set OMP_NUM_THREADS and OPENBLAS_NUM_THREADS to their number.
"""

import itertools
import sys
import time
import warnings
from pathlib import Path

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import matthews_corrcoef
from sklearn.neural_network import MLPClassifier

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlp_probes
import probes
from datasets import MPI3D_GRID
from running.command_line import Parser, integer, run_script
from running.devices import describe_device

SIZE = 5  # dimensions of the encodings


def synthetic_encodings(samples, seed):
    """({modality: (fit_h, test_h)}, fit_targets, test_targets) with `samples` rows each, float32 and int64."""
    generator = torch.Generator().manual_seed(seed)
    factors = {name: torch.randint(size, (2 * samples,), generator=generator) for name, size in MPI3D_GRID.items()}
    encodings = {}
    for modality, noise in (("image", 0.6), ("text", 0.3)):
        h = noise * torch.randn(2 * samples, SIZE, generator=generator)
        for name in ("OBJ_COLOR", "OBJ_SHAPE", "CAMERA"):
            h += torch.randn(MPI3D_GRID[name], SIZE, generator=generator)[factors[name]]
        h[:, 0] += torch.sin(factors["H_AXIS"] / 6)
        encodings[modality] = probes.standardise(h[:samples], h[samples:])
    fit, test = ({name: part[rows] for name, part in factors.items()} for rows in (slice(samples), slice(samples, None)))
    return encodings, fit, test


def our_evaluation(encodings, fit_targets, test_targets, seed):
    """(MCC by (probe, modality, factor), seconds by probe)."""
    scores, times = {}, [time.perf_counter()]
    for modality, (fit_h, test_h) in encodings.items():
        found = probes.logistic_mcc(fit_h, fit_targets, test_h, test_targets)
        scores |= {("logistic", modality, factor): score for factor, score in found.items()}
    times.append(time.perf_counter())
    found = probes.mlp_mcc(encodings, fit_targets, test_targets, torch.Generator().manual_seed(seed))
    scores |= {("mlp", *key): score for key, score in found.items()}
    return scores, {"logistic": times[1] - times[0], "mlp": time.perf_counter() - times[1]}


def sklearn_evaluation(encodings, fit_targets, test_targets, seed):
    """The same by scikit-learn, one factor at a time."""
    scores, seconds = {}, {"logistic": 0.0, "mlp": 0.0}
    for modality, (fit_h, test_h) in encodings.items():
        for factor in fit_targets:
            mlp = MLPClassifier(max_iter=mlp_probes.MAX_EPOCHS, random_state=seed)
            models = {"logistic": LogisticRegression(max_iter=1000), "mlp": mlp}
            for probe, model in models.items():
                started = time.perf_counter()
                model.fit(fit_h.numpy(), fit_targets[factor].numpy())
                prediction = model.predict(test_h.numpy())
                seconds[probe] += time.perf_counter() - started
                scores[probe, modality, factor] = matthews_corrcoef(test_targets[factor].numpy(), prediction)
    return scores, seconds


def main():
    """Run both once and print times and differences."""
    parser = Parser(__doc__)
    parser.add_argument("--samples", type=integer(1), default=23_040, help="to fit, and as many to test (%(default)s)")
    parser.add_argument("--seed", type=integer(0), default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    print(f"{describe_device(torch.device('cpu'))}; {args.samples} + {args.samples} pairs", flush=True)
    data = synthetic_encodings(args.samples, args.seed)
    ours, our_seconds = our_evaluation(*data, args.seed)
    plain, plain_seconds = sklearn_evaluation(*data, args.seed)
    for probe in our_seconds:
        differences = {key: abs(ours[key] - plain[key]) for key in ours if key[0] == probe}
        worst = max(differences, key=differences.get)
        own, other = our_seconds[probe], plain_seconds[probe]
        print(f"{probe:8} {own:7.1f} s against {other:7.1f} s, {other / own:.1f}×; max |ΔMCC| {differences[worst]:.4f}")
        print(f"         at {' '.join(worst[1:])} ({ours[worst]:.4f}, {plain[worst]:.4f})")
    for modality, factor in itertools.product(data[0], data[1]):
        key = "mlp", modality, factor
        print(f"mlp      {modality:5} {factor:12} {ours[key]:.3f} {plain[key]:.3f}")


if __name__ == "__main__":
    run_script(main)
