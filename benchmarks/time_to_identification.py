"""How well the unbiased block is identified after how much training: scores against wall time, for both recipes.

    python benchmarks/time_to_identification.py                        # five of ten semantics selected, 15 minutes a recipe
    python benchmarks/time_to_identification.py --theta-value 55 --minutes 5 --seeds 1 2 3
    python benchmarks/time_to_identification.py --experiment mpi3d --datapath data/mpi3d_standin --bias-id 2
    OMP_NUM_THREADS=1 python benchmarks/time_to_identification.py --jobs 2            # both recipes at once, each on one core

Runs the training script itself, each recipe alone on the machine or --jobs of them side by side, stops it after --minutes with
SIGTERM, and reads the curve from its train_log.csv: linear scores of the image encoding on held-out samples. Every other
flag goes to the script.
Writes benchmarks/time_to_identification.csv and .png, and prints when the worst unbiased factor passed some levels.
"""

import argparse
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

import main_causal3dident
import main_mpi3dreal
import main_numeric
from datasets import causal_bias, mpi3d_bias
from latent_spaces import subset_from_index
from running.command_line import InputError, run_script
from running.files import write_csv
from running.pictures import save_figure

HERE = Path(__file__).parent
LEVELS = (0.5, 0.8, 0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured: a script, its score, log_steps of each recipe, prefix of the image encoding's columns in the log.

    unbiased(args): names of the semantics to be identified; describe(args): the setting in words.
    """

    script: object
    flags: tuple
    score: str
    log_steps: dict
    prefix: str
    unbiased: Callable
    describe: Callable


def selected(args):
    """Names of the selected semantics of the numeric experiment; InputError for a number that is no subset."""
    main_numeric.check_subsets(args)
    return [f"s_{i}" for i in subset_from_index(args.theta_value, args.semantics_n)]


def describe_bias(args):
    """The setting of an experiment on images and captions in words."""
    return f"{args.bias_type} {args.bias_id}"


EXPERIMENTS = {
    "numeric": Experiment(
        main_numeric,
        ("--theta-value", "385"),
        "linear R²",
        {"paper": 20, "fast": 200},  # a few lines a minute on two cores
        "hz_x_",
        selected,
        lambda args: f"{len(selected(args))} of {args.semantics_n} semantics selected",
    ),
    "mpi3d": Experiment(
        main_mpi3dreal,
        (),
        "linear MCC",
        {"paper": 10, "fast": 100},
        "image_",
        lambda args: mpi3d_bias(args.bias_type, args.bias_id).unbiased,
        describe_bias,
    ),
    "causal3dident": Experiment(
        main_causal3dident,
        (),
        "linear MCC or R²",
        {"paper": 10, "fast": 100},
        "image_",
        lambda args: causal_bias(args.bias_type, args.bias_id).unbiased,
        describe_bias,
    ),
}


def measure(experiment, recipe, seed, flags, minutes, models):
    """DataFrame of one run: recipe, seed, seconds, step, and worst, mean (unbiased) and largest other score of the images."""
    name, script = f"{recipe}_{seed}", Path(experiment.script.__file__).name
    command = [sys.executable, script, *flags, "--recipe", recipe, "--seed", str(seed)]
    command += ["--log-steps", str(experiment.log_steps[recipe]), "--model-dir", models, "--model-id", name]
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
    unbiased = [experiment.prefix + factor for factor in experiment.unbiased(experiment.script.parse_flags(flags)[0])]
    # s_inv is the mean over the unbiased ones
    others = [c for c in log.columns if c.startswith(experiment.prefix) and c not in (*unbiased, "hz_x_s_inv")]
    device = json.loads((directory / "args.json").read_text())["device"]
    curve = log[["seconds", "step"]].assign(
        worst=log[unbiased].min(axis=1), mean=log[unbiased].mean(axis=1), other=log[others].max(axis=1)
    )
    return curve.assign(recipe=recipe, seed=seed, device=device)


def draw(curves, score, setting, path):
    """Worst unbiased and largest other score against minutes of training, a colour for each recipe."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (recipe, _), curve in curves.groupby(["recipe", "seed"]):
        colour = {"paper": "tab:gray", "fast": "tab:blue"}[recipe]
        axes.plot(curve.seconds / 60, curve.worst.clip(lower=0), color=colour, label=f"{recipe}: worst unbiased factor")
        axes.plot(curve.seconds / 60, curve.other.clip(lower=0), ":", color=colour, label=f"{recipe}: largest other")
    handles, labels = axes.get_legend_handles_labels()
    distinct = dict(zip(labels, handles, strict=True))
    axes.legend(distinct.values(), distinct.keys())
    axes.set(xlabel="minutes of training", ylabel=f"{score} of the image encoding", ylim=(0, 1.02))
    axes.set_title(f"{setting}; {curves.device.iloc[0]}", fontsize=10)
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--experiment", choices=tuple(EXPERIMENTS), default="numeric", help="(%(default)s)")
    parser.add_argument("--minutes", type=float, default=15, help="of each run (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument(
        "--models", type=Path, help="folder that keeps the runs' model directories; else they are removed"
    )
    parser.add_argument("--output", type=Path, default=HERE / "time_to_identification", help="without suffix")
    args, flags = parser.parse_known_args()
    experiment = EXPERIMENTS[args.experiment]
    flags = [*experiment.flags, *flags]
    setting = experiment.describe(experiment.script.parse_flags(flags)[0])
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.jobs) as pool:
        models = str(args.models.resolve() if args.models else temporary)
        runs = [(recipe, seed) for seed in args.seeds for recipe in ("fast", "paper")]
        curves = pd.concat(pool.map(lambda run: measure(experiment, *run, flags, args.minutes, models), runs))
    write_csv(curves, args.output.with_suffix(".csv"))
    draw(curves, experiment.score, setting, args.output.with_suffix(".png"))
    print(f"{setting}; {curves.device.iloc[0]}")
    for (recipe, seed), curve in curves.groupby(["recipe", "seed"]):
        passed = {level: curve[curve.worst >= level].seconds.min() / 60 for level in LEVELS}
        times = ", ".join(f"{level}: " + (f"{t:.1f} min" if t == t else "not reached") for level, t in passed.items())
        last = curve.iloc[-1]
        print(f"{recipe:>5} seed {seed}: worst unbiased {last.worst:.2f}, largest other {last.other:.2f} after "
              f"{last.seconds / 60:.1f} min, {last.step} steps; {times}")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
