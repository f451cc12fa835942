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

matplotlib.rcParams["text.parse_math"] = False  # names of factors, and captions, may hold a $

REFERENCES = {"floor": "untrained encoders", "ceiling": "encoders trained on the factors' labels"}
# Texts in cells stay out of the layout: they lie within the axes, and measuring them takes most of the time.
IN_CELL = {"ha": "center", "va": "center", "in_layout": False}


def check_picture(path):
    """Raise InputError unless a picture can be written to `path`: before anything is computed for it."""
    path, formats = Path(path), FigureCanvasBase.get_supported_filetypes()
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder to write {path.name} to")
    if path.suffix.removeprefix(".") not in formats:
        raise InputError(f"{path} does not end in .{', .'.join(sorted(formats))}")


def save_figure(figure, path, title="", dpi=150):
    """Write a figure, with a title above it if there is one, to `path`, whole or not at all, and close it."""
    if title:
        figure.suptitle(title, fontsize=11)
    with replaced(path) as temporary:
        figure.savefig(temporary, dpi=dpi, bbox_inches="tight")
    plt.close(figure)


def subplots(rows, columns, width, height, **options):
    """(figure, (rows, columns) array of Axes) of that many inches."""
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained", **options)


def panel_subplots(panels, width, height, margin=0.0, **options):
    """(figure, dict panel → Axes) for panels (row, column), placed in order of appearance; width, height: inches of each."""
    rows, columns = (list(dict.fromkeys(place)) for place in zip(*panels, strict=True))
    figure, grid = subplots(len(rows), len(columns), len(columns) * width, margin + len(rows) * height, **options)
    axes = {(row, column): grid[rows.index(row), columns.index(column)] for row, column in panels}
    for (row, column), ax in axes.items():
        ax.set_title(f"{column}, {row}", fontsize=10, loc="left")
    return figure, axes


def draw_cells(axes, table, fontsize, text, is_dark):
    """Write text(value) into the finite cells of a heatmap, white where is_dark(value), and label it; long names are slanted."""
    for (row, column), value in np.ndenumerate(table.to_numpy(float)):
        if np.isfinite(value):
            colour = "white" if is_dark(value) else "black"
            axes.text(column, row, text(value), fontsize=fontsize, color=colour, **IN_CELL)
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, table.columns)) > 5 else {}
    axes.set_xticks(range(len(table.columns)), table.columns, **slanted)
    axes.set_yticks(range(len(table.index)), table.index)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def score_heatmap(axes, scores, highlighted=(), decimals=2, references=()):
    """Draw a DataFrame of scores, clipped to [0, 1], into `axes` with its values in the cells; frame the highlighted columns.

    references: DataFrames of the same shape or larger, whose values stand small below.
    """
    scores = scores.astype(float).clip(0, 1)
    small = [table.reindex_like(scores).clip(0, 1) for table in references]
    for (row, column), value in np.ndenumerate(scores.to_numpy() if small else [[]]):
        below = " | ".join(f"{table.iat[row, column]:z.{decimals}f}" for table in small).replace("nan", "–")
        axes.text(column, row + 0.36, below, fontsize=5.5, color="white" if value > 0.6 else "black", **IN_CELL)
    axes.imshow(scores, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    axes.set_xticks(np.arange(len(scores.columns) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(scores.index) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    draw_cells(axes, scores, 8, lambda value: f"{value:z.{decimals}f}", lambda value: value > 0.6)
    frame = {"fill": False, "edgecolor": "tab:orange", "linewidth": 2, "clip_on": False}
    for column, label in enumerate(axes.get_xticklabels()):
        if scores.columns[column] in highlighted:
            label.set_fontweight("bold")
            axes.add_patch(plt.Rectangle((column - 0.5, -0.5), 1, len(scores.index), **frame))


def difference_heatmap(axes, differences):
    """Draw a DataFrame of differences into `axes`, red where ours is higher, with signed values in the cells."""
    axes.imshow(differences.to_numpy(float), cmap="RdBu_r", vmin=-0.5, vmax=0.5, aspect="auto")
    draw_cells(axes, differences, 7, lambda value: f"{value:+z.2f}", lambda value: abs(value) > 0.3)


def plot_factor_scores(tables, path, title, highlighted=(), references=None):
    """Write one picture with a heatmap for each of `tables`, a dict subtitle → DataFrame (encodings × factors).

    references: dict "floor", "ceiling" → the same of other encoders, whose scores stand small below the encoders' own.
    """
    references = references or {}
    if references:
        title += f"\n(small: {' | '.join(REFERENCES[name] for name in references)})"
    rows, columns = next(iter(tables.values())).shape
    figure, grid = subplots(len(tables), 1, 1.5 + 0.52 * columns, 0.9 + len(tables) * (0.9 + 0.38 * rows))
    for axes, (subtitle, scores) in zip(grid[:, 0], tables.items(), strict=True):
        score_heatmap(axes, scores, highlighted, references=[other[subtitle] for other in references.values()])
        axes.set_title(subtitle, fontsize=10, loc="left")
    save_figure(figure, path, title)


def plot_downstream_scores(regression, classification, path, title):
    """Write one picture of bars, clipped to [0, 1]; dicts task → R² and distribution → Matthews correlation."""
    figure, grid = subplots(1, 2, 6.5, 3, sharey=True, width_ratios=(2, 1))
    panel_scores = {"regression: R²": regression, "y5: Matthews correlation": classification}
    for axes, (subtitle, scores) in zip(grid[0], panel_scores.items(), strict=True):
        bars = axes.bar(list(scores), np.clip(list(scores.values()), 0, 1), color="tab:blue", width=0.6)
        axes.bar_label(bars, fmt="{:.2f}", fontsize=8)
        axes.set_title(subtitle, fontsize=10, loc="left")
        axes.set_ylim(0, 1.1)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, title)


def plot_score_grid(panels, path, title):
    """Write heatmaps of scores; panels: dict (row, column) → DataFrame, placed by row and column in order of appearance."""
    rows, columns = next(iter(panels.values())).shape
    figure, axes = panel_subplots(panels, 1.0 + 0.48 * columns, 0.8 + 0.3 * rows, margin=0.6)
    for panel, scores in panels.items():
        score_heatmap(axes[panel], scores)
    save_figure(figure, path, title)


def plot_side_by_side(ours, others, differences, notes, decimals, path, title, other="paper"):
    """Write our heatmaps, others' and their differences side by side, a row for each panel of `plot_score_grid`.

    notes: what is said in a cell instead of a difference, "" for most; decimals: those of the others' numbers; other: whose.
    """
    rows, columns = next(iter(ours.values())).shape
    figure, grid = subplots(len(ours), 3, 3 * (0.8 + 0.46 * columns), 0.6 + len(ours) * (0.8 + 0.28 * rows))
    for axes, panel in zip(grid, ours, strict=True):
        score_heatmap(axes[0], ours[panel])
        score_heatmap(axes[1], others[panel], decimals=decimals)
        difference_heatmap(axes[2], differences[panel])
        for row, column in np.argwhere(notes[panel].to_numpy(object) != ""):
            note = notes[panel].iat[row, column]
            for ax, text in ((axes[1], f"{others[panel].iat[row, column]:.{decimals}f}\n{note}"), (axes[2], note)):
                ax.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, color="lightgray", zorder=4))
                ax.text(column, row, text, fontsize=6, linespacing=1.3, zorder=5, **IN_CELL)
        for ax, what in zip(axes, ("ours", other, f"ours − {other}"), strict=True):
            ax.set_title(f"{what}: {panel[1]}, {panel[0]}", fontsize=9, loc="left")
    save_figure(figure, path, title, dpi=100)


def plot_score_curves(panels, deviations, paper, path, title):
    """`plot_curves` of scores, up to 1, and from 0 unless one lies below, with the paper's dashed; `paper` may be empty."""

    def add(panel, axes, colours):
        for curve, colour in colours.items():
            if paper:
                axes.plot(axes.get_lines()[0].get_xdata(), paper[panel].loc[curve], color=colour, linestyle="--", linewidth=1)
        if paper:
            axes.plot([], [], color="gray", linestyle="--", linewidth=1, label="paper")
        axes.set_ylim(min(-0.03, axes.get_ylim()[0]), 1.03)

    plot_curves(panels, deviations, path, title, add)


def plot_curves(panels, deviations, path, title, add=lambda panel, axes, colours: None):
    """Write curves of means with bands of one standard deviation; placed as heatmaps are.

    panels, deviations: dicts (row, column) → DataFrame with a curve in each row; add(panel, axes, colours): what else is drawn
    there, colours being a dict from a curve to its own.
    """
    figure, panel_axes = panel_subplots(panels, 5.2, 3.2, sharey="row")
    for panel, axes in panel_axes.items():
        places, colours = range(len(panels[panel].columns)), {}
        for curve, values in panels[panel].iterrows():
            colours[curve] = axes.plot(places, values, marker="o", markersize=3, label=curve)[0].get_color()
            spread = deviations[panel].loc[curve].fillna(0)
            axes.fill_between(places, values - spread, values + spread, color=colours[curve], alpha=0.2, linewidth=0)
        add(panel, axes, colours)
        axes.set_xticks(places, panels[panel].columns)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    save_figure(figure, path, title)


def plot_captioned_images(images, captions, path):
    """Write images (N, H, W, 3) side by side, and under each its captions; captions: dict setting → N texts."""
    heights = (2.4, 0.42 * len(captions))
    figure, grid = subplots(2, len(images), 3.4 * len(images), 2.6 + heights[1], height_ratios=heights)
    for image, (top, bottom), texts in zip(images, grid.T, zip(*captions.values(), strict=True), strict=True):
        top.imshow(image, interpolation="nearest")
        top.set_axis_off()
        bottom.set_axis_off()
        for line, (setting, text) in enumerate(zip(captions, texts, strict=True)):
            wrapped = textwrap.fill(f"{setting}: {text}", 58)
            bottom.text(0, 1 - line / len(captions), wrapped, fontsize=7, va="top", transform=bottom.transAxes)
    save_figure(figure, path)
