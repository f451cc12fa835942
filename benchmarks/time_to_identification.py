"""How well the unbiased block is identified after how much training: scores against wall time, for every recipe.

    python benchmarks/time_to_identification.py                        # five of ten semantics selected, 15 minutes a recipe
    python benchmarks/time_to_identification.py --theta-value 55 --minutes 5 --seeds 1 2 3
    python benchmarks/time_to_identification.py --experiment mpi3d --datapath data/mpi3d_standin --bias-id 2
    OMP_NUM_THREADS=1 python benchmarks/time_to_identification.py --jobs 2            # two runs at once, each on one core

Runs the training script itself, each recipe alone on the machine or --jobs of them side by side, stops it after --minutes with
SIGTERM, and reads the curve from its train_log.csv: linear scores of the image encoding on held-out samples. Every other
flag goes to the script.
Writes benchmarks/time_to_identification.csv and .png, and prints when the worst unbiased factor passed some levels.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from latent_spaces import biased_blocks
from main_causal3dident import Causal3dIdentExperiment
from main_mpi3dreal import Mpi3dExperiment
from main_numeric import NumericExperiment
from running.command_line import InputError, Parser, integer, run_script
from running.files import write_csv
from running.pictures import save_figure

HERE = Path(__file__).parent
LEVELS = (0.5, 0.8, 0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Curve:
    """What is measured: a script, its experiment, a score, log_steps of each recipe, prefix of the image encoding's columns.

    unbiased(args): names of the semantics to be identified; describe(args): the setting in words.
    """

    script: str
    experiment: type
    flags: tuple
    score: str
    log_steps: dict
    prefix: str
    unbiased: Callable
    describe: Callable

    def args(self, flags):
        """Namespace of the script's flags; InputError for those that do not fit."""
        args, _ = self.experiment.parse_flags(flags)
        self.experiment.settle(args)
        return args


def unbiased_semantics(args):
    """Names of the unbiased semantics of the numeric experiment."""
    return [f"s_{i}" for i in biased_blocks(args.theta_value, args.beta_value, args.semantics_n)[2]]


def describe_semantics(args):
    """The setting of the numeric experiment in words."""
    return f"{len(biased_blocks(args.theta_value, -1, args.semantics_n)[0])} of {args.semantics_n} semantics selected"


def image_curve(script, experiment, score):
    """Curve of an experiment on images and captions."""
    return Curve(script, experiment, (), score, {"fast": 100, "paper": 10}, "image_",
                 lambda args: experiment.bias(args.bias_type, args.bias_id).unbiased,
                 lambda args: f"{args.bias_type} {args.bias_id}")  # fmt: skip


NUMERIC_STEPS = {"fast": 200, "wide": 200, "paper": 20}  # a few lines a minute on two cores
CURVES = {
    "numeric": Curve("main_numeric.py", NumericExperiment, ("--theta-value", "385"), "linear R²", NUMERIC_STEPS, "hz_x_",
                     unbiased_semantics, describe_semantics),
    "mpi3d": image_curve("main_mpi3dreal.py", Mpi3dExperiment, "linear MCC"),
    "causal3dident": image_curve("main_causal3dident.py", Causal3dIdentExperiment, "linear MCC or R²"),
}  # fmt: skip


def measure(curve, recipe, seed, flags, minutes, models):
    """DataFrame of one run: recipe, seed, seconds, step, and worst, mean (unbiased) and largest other score of the images."""
    name, script = f"{recipe}_{seed}", curve.script
    command = [sys.executable, script, *flags, "--recipe", recipe, "--seed", str(seed)]
    command += ["--log-steps", str(curve.log_steps[recipe]), "--model-dir", models, "--model-id", name]
    process = subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.DEVNULL)
    try:
        process.wait(timeout=minutes * 60)
    except subprocess.TimeoutExpired:
        process.terminate()  # a script in the background of a shell ignores SIGINT, and so would its children
        process.wait()
    directory = Path(models) / name
    try:
        log = pd.read_csv(directory / "train_log.csv")
    except (FileNotFoundError, pd.errors.EmptyDataError):
        raise InputError(
            f"{script} --recipe {recipe} did not come to a line of its log in {minutes:g} minutes; give it more --minutes"
        ) from None
    unbiased = [curve.prefix + factor for factor in curve.unbiased(curve.args(flags))]
    # s_inv is the mean over the unbiased ones
    others = [c for c in log.columns if c.startswith(curve.prefix) and c not in (*unbiased, "hz_x_s_inv")]
    device = json.loads((directory / "args.json").read_text())["device"]
    scores = log[["seconds", "step"]].assign(
        worst=log[unbiased].min(axis=1), mean=log[unbiased].mean(axis=1), other=log[others].max(axis=1)
    )
    return scores.assign(recipe=recipe, seed=seed, device=device)


def draw(curves, score, setting, path):
    """Worst unbiased and largest other score against minutes of training, a colour for each recipe."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (recipe, _), curve in curves.groupby(["recipe", "seed"]):
        colour = {"paper": "tab:gray", "fast": "tab:blue", "wide": "tab:orange"}[recipe]
        axes.plot(curve.seconds / 60, curve.worst.clip(lower=0), color=colour, label=f"{recipe}: worst unbiased factor")
        axes.plot(curve.seconds / 60, curve.other.clip(lower=0), ":", color=colour, label=f"{recipe}: largest other")
    handles, labels = axes.get_legend_handles_labels()
    distinct = dict(zip(labels, handles, strict=True))
    axes.legend(distinct.values(), distinct.keys())
    axes.set(xlabel="minutes of training", ylabel=f"{score} of the image encoding", ylim=(0, 1.02))
    axes.set_title(f"{setting}; {curves.device.iloc[0]}", fontsize=10)
    save_figure(figure, path)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--experiment", choices=tuple(CURVES), default="numeric", help="(%(default)s)")
    parser.add_argument("--minutes", type=float, default=15, help="of each run (%(default)s)")
    parser.add_argument("--seeds", type=integer(0), nargs="+", default=[1])
    parser.add_argument("--jobs", type=integer(1), default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--models", type=Path, help="folder that keeps the runs' model directories; else they are removed")
    parser.add_argument("--output", type=Path, default=HERE / "time_to_identification", help="without suffix")
    args, flags = parser.parse_known_args()
    curve = CURVES[args.experiment]
    flags = [*curve.flags, *flags]
    setting = curve.describe(curve.args(flags))
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.jobs) as pool:
        models = str(args.models.resolve() if args.models else temporary)
        runs = [(recipe, seed) for seed in args.seeds for recipe in curve.log_steps]
        curves = pd.concat(pool.map(lambda run: measure(curve, *run, flags, args.minutes, models), runs))
    write_csv(curves, args.output.with_suffix(".csv"))
    draw(curves, curve.score, setting, args.output.with_suffix(".png"))
    print(f"{setting}; {curves.device.iloc[0]}")
    for (recipe, seed), run in curves.groupby(["recipe", "seed"]):
        passed = {level: run[run.worst >= level].seconds.min() / 60 for level in LEVELS}
        times = ", ".join(f"{level}: " + (f"{t:.1f} min" if t == t else "not reached") for level, t in passed.items())
        last = run.iloc[-1]
        print(f"{recipe:>5} seed {seed}: worst unbiased {last.worst:.2f}, largest other {last.other:.2f} after "
              f"{last.seconds / 60:.1f} min, {last.step} steps; {times}")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
