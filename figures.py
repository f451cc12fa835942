"""Pictures of results, drawn without a display."""

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from files import replaced


def save_figure(figure, path, dpi=150):
    """Write a figure to `path`, whole or not at all, and close it."""
    with replaced(path) as temporary:
        figure.savefig(temporary, dpi=dpi, bbox_inches="tight")
    plt.close(figure)


def score_heatmap(axes, scores, highlighted=()):
    """Draw a DataFrame of scores, clipped to [0, 1], into `axes` with its values in the cells; frame the highlighted columns."""
    values = scores.to_numpy(float)
    axes.imshow(np.clip(values, 0, 1), cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(
                column,
                row,
                f"{np.clip(value, 0, 1):.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value > 0.6 else "black",
            )
    axes.set_xticks(range(len(scores.columns)), scores.columns, rotation=45, ha="right")
    axes.set_yticks(range(len(scores.index)), scores.index)
    axes.set_xticks(np.arange(len(scores.columns) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(scores.index) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    for column, label in enumerate(axes.get_xticklabels()):
        if scores.columns[column] in highlighted:
            label.set_fontweight("bold")
            axes.add_patch(
                plt.Rectangle(
                    (column - 0.5, -0.5),
                    1,
                    len(scores.index),
                    fill=False,
                    edgecolor="tab:orange",
                    linewidth=2,
                    clip_on=False,
                )
            )


def plot_factor_scores(tables, path, title, highlighted=()):
    """Write one picture with a heatmap for each of `tables`, a dict subtitle → DataFrame (encodings × factors)."""
    first = next(iter(tables.values()))
    width = 1.5 + 0.52 * len(first.columns)
    figure, axes = plt.subplots(
        len(tables),
        1,
        figsize=(width, 0.9 + len(tables) * (0.9 + 0.38 * len(first.index))),
        squeeze=False,
        layout="constrained",
    )
    for ax, (subtitle, scores) in zip(axes[:, 0], tables.items(), strict=True):
        score_heatmap(ax, scores, highlighted)
        ax.set_title(subtitle, fontsize=10, loc="left")
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)
