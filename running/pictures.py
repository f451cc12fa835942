"""Pictures of results, drawn without a display."""

import textwrap
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.backend_bases import FigureCanvasBase

from running.command_line import InputError
from running.files import replaced


def check_picture(path):
    """Raise InputError unless a picture can be written to `path`: before anything is computed for it."""
    path, formats = Path(path), FigureCanvasBase.get_supported_filetypes()
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder to write {path.name} to")
    if path.suffix.removeprefix(".") not in formats:
        raise InputError(f"{path} does not end in .{', .'.join(sorted(formats))}")


def save_figure(figure, path, dpi=150):
    """Write a figure to `path`, whole or not at all, and close it."""
    with replaced(path) as temporary:
        figure.savefig(temporary, dpi=dpi, bbox_inches="tight")
    plt.close(figure)


def label_cells(axes, table):
    """Label the cells of a heatmap with the index and the columns of its DataFrame; long names are slanted."""
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, table.columns)) > 5 else {}
    axes.set_xticks(range(len(table.columns)), table.columns, **slanted)
    axes.set_yticks(range(len(table.index)), table.index)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def score_heatmap(axes, scores, highlighted=(), decimals=2):
    """Draw a DataFrame of scores, clipped to [0, 1], into `axes` with its values in the cells; frame the highlighted columns."""
    values = scores.to_numpy(float)
    axes.imshow(np.clip(values, 0, 1), cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(
                column,
                row,
                f"{np.clip(value, 0, 1):.{decimals}f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value > 0.6 else "black",
            )
    axes.set_xticks(np.arange(len(scores.columns) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(scores.index) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    label_cells(axes, scores)
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


def plot_downstream_scores(regression, classification, path, title):
    """Write one picture of bars, clipped to [0, 1]; dicts task → R² and distribution → Matthews correlation."""
    figure, panels = plt.subplots(1, 2, figsize=(6.5, 3), sharey=True, width_ratios=(2, 1), layout="constrained")
    panel_scores = {"regression: R²": regression, "y5: Matthews correlation": classification}
    for axes, (subtitle, scores) in zip(panels, panel_scores.items(), strict=True):
        values = np.clip(list(scores.values()), 0, 1)
        bars = axes.bar(list(scores), values, color="tab:blue", width=0.6)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=8)
        axes.set_title(subtitle, fontsize=10, loc="left")
        axes.set_ylim(0, 1.1)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def outside_layout(axes):
    """Take the values in the cells out of the layout: they lie within `axes`, and measuring them takes most of the time."""
    for text in axes.texts:
        text.set_in_layout(False)


def difference_heatmap(axes, differences):
    """Draw a DataFrame of differences into `axes`, red where ours is higher, with signed values in the cells."""
    values = differences.to_numpy(float)
    axes.imshow(values, cmap="RdBu_r", vmin=-0.5, vmax=0.5, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if abs(value) > 0.3 else "black"
            axes.text(column, row, f"{value:+z.2f}", ha="center", va="center", fontsize=7, color=colour)
    label_cells(axes, differences)


def note_cell(axes, row, column, text):
    """Cover a cell of a heatmap with a small text on grey."""
    axes.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, color="lightgray", zorder=4))
    axes.text(column, row, text, ha="center", va="center", fontsize=6, linespacing=1.3, zorder=5)


def plot_score_grid(panels, path, title):
    """Write heatmaps of scores; panels: dict (row, column) → DataFrame, placed by row and column in order of appearance."""
    rows, columns = (list(dict.fromkeys(place)) for place in zip(*panels, strict=True))
    shape = next(iter(panels.values())).shape
    size = (len(columns) * (1.0 + 0.48 * shape[1]), 0.6 + len(rows) * (0.8 + 0.3 * shape[0]))
    figure, grid = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False, layout="constrained")
    for (row, column), scores in panels.items():
        axes = grid[rows.index(row), columns.index(column)]
        score_heatmap(axes, scores)
        outside_layout(axes)
        axes.set_title(f"{column}, {row}", fontsize=10, loc="left")
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def plot_beside_paper(ours, paper, differences, notes, decimals, path, title):
    """Write our heatmaps, the paper's and their differences side by side, a row for each panel of `plot_score_grid`.

    notes: what is said in a cell instead of a difference, "" for most; decimals: those that the paper prints.
    """
    shape = next(iter(ours.values())).shape
    size = (3 * (0.8 + 0.46 * shape[1]), 0.6 + len(ours) * (0.8 + 0.28 * shape[0]))
    figure, grid = plt.subplots(len(ours), 3, figsize=size, squeeze=False, layout="constrained")
    for axes, panel in zip(grid, ours, strict=True):
        score_heatmap(axes[0], ours[panel])
        score_heatmap(axes[1], paper[panel], decimals=decimals)
        difference_heatmap(axes[2], differences[panel])
        for (row, column), note in np.ndenumerate(notes[panel].to_numpy(object)):
            if note:
                note_cell(axes[1], row, column, f"{paper[panel].iat[row, column]:.{decimals}f}\n{note}")
                note_cell(axes[2], row, column, note)
        for ax, what in zip(axes, ("ours", "paper", "ours − paper"), strict=True):
            outside_layout(ax)
            ax.set_title(f"{what}: {panel[1]}, {panel[0]}", fontsize=9, loc="left")
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path, dpi=100)


def plot_score_curves(panels, deviations, paper, path, title):
    """Write curves of mean scores with bands of one standard deviation, and the paper's dashed; placed as heatmaps are.

    panels, deviations, paper: dicts (row, column) → DataFrame with a curve in each row; `paper` may be empty.
    """
    rows, columns = (list(dict.fromkeys(place)) for place in zip(*panels, strict=True))
    size = (5.2 * len(columns), 3.2 * len(rows))
    figure, grid = plt.subplots(
        len(rows), len(columns), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for (row, column), scores in panels.items():
        axes = grid[rows.index(row), columns.index(column)]
        places = range(len(scores.columns))
        for curve, values in scores.iterrows():
            line = axes.plot(places, values, marker="o", markersize=3, label=curve)[0]
            spread = deviations[row, column].loc[curve].fillna(0)
            axes.fill_between(places, values - spread, values + spread, color=line.get_color(), alpha=0.2, linewidth=0)
            if paper:
                axes.plot(places, paper[row, column].loc[curve], color=line.get_color(), linestyle="--", linewidth=1)
        if paper:
            axes.plot([], [], color="gray", linestyle="--", linewidth=1, label="paper")
        axes.set_xticks(places, scores.columns)
        axes.set_ylim(min(-0.03, axes.get_ylim()[0]), 1.03)
        axes.set_title(f"{column}, {row}", fontsize=10, loc="left")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def plot_captioned_images(images, captions, path):
    """Write images (N, H, W, 3) side by side, and under each its captions; captions: dict setting → N texts."""
    figure, grid = plt.subplots(2, len(images), figsize=(3.4 * len(images), 2.6 + 0.42 * len(captions)), squeeze=False,
                                height_ratios=(2.4, 0.42 * len(captions)), layout="constrained")  # fmt: skip
    for column, (top, bottom) in enumerate(grid.T):
        top.imshow(images[column], interpolation="nearest")
        top.set_axis_off()
        bottom.set_axis_off()
        for line, (setting, texts) in enumerate(captions.items()):
            text = "\n".join(textwrap.wrap(f"{setting}: {texts[column]}", 58))
            bottom.text(0, 1 - line / len(captions), text, fontsize=7, va="top", transform=bottom.transAxes)
    save_figure(figure, path)
