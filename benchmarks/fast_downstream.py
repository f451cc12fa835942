"""The fast downstream probes against the paper's 10,000 steps, on trained models: what `--probes fast` costs in scores.

    python benchmarks/fast_downstream.py models/numeric-fast/ind_select_5_seed1
    python benchmarks/fast_downstream.py models/numeric-fast/dep_perturb_3_seed3 --repeats 3    # over initial weights, too
    python benchmarks/fast_downstream.py models/numeric-fast/dep_perturb_3_seed3 --chunk 512    # rounded otherwise

For each model the exact scores by the evaluation's first initial weights, and the differences from them: of the fast probes by
the same weights, and with --repeats of both by others. With --chunk, first of the exact probes whose sums over all samples are
taken in other parts, and so round otherwise. Set OMP_NUM_THREADS=1 for seconds of one core.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_numeric
import mlp_probes
from eval_numeric_predict import FIT, PROBE, SHIFTED, TEST, encode, score_tasks
from latent_spaces import seeded_generator
from running.command_line import Parser, integer, run_script
from running.devices import describe_device
from running.directory import trained_args

OTHER_WEIGHTS = 1000  # between the seeds of initial weights


def samples_of(directory, device):
    """(samples to fit, to test and shifted, protocol, seed) of the evaluation that `eval_numeric_predict.py` makes of a model."""
    setting, _ = trained_args(directory, main_numeric.NumericExperiment)
    experiment, seed, protocol = main_numeric.NumericExperiment(setting, device), setting.seed + 1, setting.protocol
    experiment.load(directory)
    samples = [
        encode(experiment, 5, seeded_generator(seed, "downstream", device, part), "fp32", shifted)
        for part, shifted in ((FIT, None), (TEST, None), (SHIFTED, protocol))
    ]
    return samples, protocol, seed


def main():
    parser = Parser(__doc__)
    parser.add_argument("models", nargs="+", type=Path, help="model directories")
    parser.add_argument("--repeats", type=integer(1), default=1, help="initial weights of either kind")
    parser.add_argument("--chunk", type=integer(1), help="samples whose activations are computed at a time")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    print(f"{describe_device(device)}, torch {torch.__version__}")
    print(f"{'':32}     y1      y2      y3      y4     iid shifted")
    for directory in args.models:
        samples, protocol, seed = samples_of(directory, device)
        first, usual = None, mlp_probes.CHUNK
        runs = [("paper", repeat, usual) for repeat in range(args.repeats)]
        runs += [("paper", 0, args.chunk)] if args.chunk else []
        runs += [("fast", repeat, usual) for repeat in range(args.repeats)]
        for kind, repeat, chunk in runs:
            mlp_probes.CHUNK = chunk
            own = seed + repeat * OTHER_WEIGHTS
            generator, began = seeded_generator(own, "downstream", substream=PROBE), time.process_time()
            regression, classification = score_tasks(*samples, protocol, generator, kind)
            scores, seconds = [*regression.values(), *classification.values()], time.process_time() - began
            shown = scores if first is None else [score - exact for score, exact in zip(scores, first, strict=True)]
            first = first or scores
            numbers = " ".join(f"{value:+7.3f}" for value in shown)
            name = f"{kind}{repeat + 1:3}" if chunk == usual else f"{kind}, {chunk}"
            print(f"{directory.name:20} {name:11} {numbers}   {seconds:6.1f} s", flush=True)


if __name__ == "__main__":
    run_script(main)
