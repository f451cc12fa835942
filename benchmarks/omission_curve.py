"""R² of every semantic against the rate at which texts omit what they tell, from models that were trained with --omission-prob.

    python benchmarks/omission_curve.py models/omit_* --output omission

Means over the seeds of a rate, with a band of one standard deviation; writes OUTPUT.csv and OUTPUT.png. The dashed line,
1 − rate, is the most that a text can tell of a semantic that it omits at that rate.
"""

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from running.command_line import InputError, Parser, run_script
from running.directory import stored_args
from running.files import read_csv, write_csv
from running.pictures import plot_curves

ENCODINGS = {"hz_x": "image encoding", "hz_t": "text encoding"}


def scores(directories):
    """DataFrame of all models: encoding, predicted_factors, rate, and of the nonlinear R² mean, std (n − 1), number of seeds."""
    tables = []
    for directory in directories:
        rate = stored_args(directory).get("omission_prob")
        if rate is None:
            raise InputError(f"{directory} holds no numeric model; name some of --omission-prob")
        table = read_csv(directory / "results.csv", ["encoding", "predicted_factors", "r2_linear", "r2_nonlinear"])
        tables.append(table.assign(rate=rate))
    grouped = pd.concat(tables).groupby(["encoding", "predicted_factors", "rate"]).r2_nonlinear
    return grouped.agg(["mean", "std", "count"]).round(4).reset_index()


def draw(table, path):
    """Draw the curves of the single semantics, with 1 − rate."""
    semantics = table[table.predicted_factors.str.fullmatch(r"s_\d+")]
    panels, deviations = {}, {}
    for name, title in ENCODINGS.items():
        for kept, value in ((panels, "mean"), (deviations, "std")):
            part = semantics[semantics.encoding == name].pivot(index="predicted_factors", columns="rate", values=value)
            kept["nonlinear R²", title] = part

    def add(panel, axes, colours):
        rates = panels[panel].columns
        if panel[1] == ENCODINGS["hz_t"]:
            axes.plot(range(len(rates)), 1 - rates, color="gray", linestyle="--", linewidth=1, label="1 − rate")
        axes.set_ylim(-0.03, 1.03)

    plot_curves(panels, deviations, path, "R² against the rate at which texts omit each semantic that they tell", add)


def main():
    """Print the table, and write it and its picture."""
    parser = Parser(__doc__)
    parser.add_argument("models", nargs="+", type=Path, help="model directories")
    parser.add_argument("--output", default="omission", help="OUTPUT.csv and OUTPUT.png (%(default)s)")
    flags = parser.parse_args()
    table = scores(flags.models)
    print(table.to_string(index=False))
    write_csv(table, Path(f"{flags.output}.csv"))
    draw(table, Path(f"{flags.output}.png"))


if __name__ == "__main__":
    run_script(main)
