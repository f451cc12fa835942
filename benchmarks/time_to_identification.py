"""How well the unbiased block is identified after how much training: R² against wall time, for both recipes.

    python benchmarks/time_to_identification.py                       # five of ten semantics selected, 15 minutes a recipe
    python benchmarks/time_to_identification.py --theta-value 55 --minutes 5 --seeds 1 2 3

Runs main_numeric.py itself, each recipe alone on the machine, stops it after --minutes as Ctrl-C would, and reads the
curve from its train_log.csv: the linear R² of the image encoding on held-out samples. Writes
benchmarks/time_to_identification.csv and .png, and prints when the worst unbiased factor passed some levels.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from figures import save_figure
from files import write_csv
from latent_spaces import subset_from_index

HERE = Path(__file__).parent
LEVELS = (0.5, 0.8, 0.9, 0.95)
LOG_STEPS = {"paper": 20, "fast": 200}  # a few lines a minute on two cores


def measure(recipe, theta, seed, minutes, models):
    """DataFrame of one run: recipe, seed, seconds, step, and worst, mean (unbiased) and largest other linear R² of hz_x."""
    name = f"{recipe}_{seed}"
    command = [sys.executable, "main_numeric.py", "--recipe", recipe, "--theta-value", str(theta), "--seed", str(seed)]
    command += ["--log-steps", str(LOG_STEPS[recipe]), "--model-dir", models, "--model-id", name, "--mlp-eval"]
    process = subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.DEVNULL)
    try:
        process.wait(timeout=minutes * 60)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
    directory = Path(models) / name
    log = pd.read_csv(directory / "train_log.csv")
    unbiased = [f"hz_x_s_{i}" for i in subset_from_index(theta, 10)]
    others = [c for c in log.columns if c.startswith("hz_x_") and c not in unbiased and c != "hz_x_s_inv"]
    device = json.loads((directory / "args.json").read_text())["device"]
    curve = log[["seconds", "step"]].assign(
        worst=log[unbiased].min(axis=1), mean=log[unbiased].mean(axis=1), other=log[others].max(axis=1)
    )
    return curve.assign(recipe=recipe, seed=seed, theta=theta, device=device)


def draw(curves, path):
    """Worst unbiased and largest other R² against minutes of training, a colour for each recipe."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (recipe, _), curve in curves.groupby(["recipe", "seed"]):
        colour = {"paper": "tab:gray", "fast": "tab:blue"}[recipe]
        axes.plot(curve.seconds / 60, curve.worst.clip(lower=0), color=colour, label=f"{recipe}: worst unbiased factor")
        axes.plot(curve.seconds / 60, curve.other.clip(lower=0), ":", color=colour, label=f"{recipe}: largest other")
    handles, labels = axes.get_legend_handles_labels()
    distinct = dict(zip(labels, handles, strict=True))
    axes.legend(distinct.values(), distinct.keys())
    axes.set(xlabel="minutes of training", ylabel="linear R² of the image encoding", ylim=(0, 1))
    selected = len(subset_from_index(int(curves.theta.iloc[0]), 10))
    axes.set_title(f"{selected} of 10 semantics selected; {curves.device.iloc[0]}", fontsize=10)
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--theta-value", type=int, default=385, help="number of the subset I_θ (%(default)s)")
    parser.add_argument("--minutes", type=float, default=15, help="of each run (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--output", type=Path, default=HERE / "time_to_identification", help="without suffix")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as models:
        runs = [(recipe, seed) for seed in args.seeds for recipe in ("fast", "paper")]
        curves = pd.concat([measure(recipe, args.theta_value, seed, args.minutes, models) for recipe, seed in runs])
    write_csv(curves, args.output.with_suffix(".csv"))
    draw(curves, args.output.with_suffix(".png"))
    print(curves.device.iloc[0])
    for (recipe, seed), curve in curves.groupby(["recipe", "seed"]):
        passed = {level: curve[curve.worst >= level].seconds.min() / 60 for level in LEVELS}
        times = ", ".join(f"{level}: " + (f"{t:.1f} min" if t == t else "not reached") for level, t in passed.items())
        last = curve.iloc[-1]
        print(f"{recipe:>5} seed {seed}: worst unbiased R² {last.worst:.2f} after {last.seconds / 60:.1f} min; {times}")


if __name__ == "__main__":
    main()
