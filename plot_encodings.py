"""Draw what a model's encodings hold: each factor in them, a map of them, and how far images and texts lie apart.

    python plot_encodings.py --model-id small_1                                       # what --save-encodings has kept
    python plot_encodings.py --model-id models/small_1 --factor s_0 --output s_0.pdf

One picture, encodings.png in the model directory, of held-out samples alone; what is fitted is fitted on the others.

    maps       both modalities in the plane of their first two principal components, coloured by --factor, and together, with
               lines from some images to their texts. Encodings are as in geometry.csv: on images of length 1, by distances in
               units of their root mean square distance from the common centre. Those of one dimension are strips.
    factors    a continuous one against its least squares prediction, a discrete one, by classes, against the encodings' first
               linear discriminant, with medians. The scores, held out, are R² and the MCC of logistic regression.

All held-out samples are scored and some thousands drawn; logistic regression is fitted on 5,000 at most: a matter of seconds.
Factors of several columns, of one value, and of more than 50 classes are passed over. On Causal3DIdent modalities have their own.
"""

import contextlib
from pathlib import Path

from running.command_line import InputError, Parser, integer, is_out_of_memory, run_script

# isort: split

import numpy as np
import pandas as pd
import torch
from matplotlib.collections import LineCollection

import probes
from running.files import opened_npz
from running.geometry import geometry
from running.lock import occupied
from running.memory import limit_memory
from running.pictures import check_picture, plt, save_figure
from running.staging import is_recorded, settle

SIMILARITY = {("hz_x", "hz_t"): "distance", ("h_image", "h_text"): "cosine"}  # of both encodings, by their names
AGAIN = "evaluate the model with --evaluate --save-encodings"
LARGEST = 1e30  # of a value: its square is a number still
FITTED, CLASSES = 5_000, 50  # samples that logistic regression is fitted on, at most; classes of a factor, at most
NAMED = 8  # classes that have each a colour and a place in the legend, at most
DRAWN, MAPPED, JOINED = 2_000, 3_000, 40  # points of a factor's panel, points of a map, pairs with a line
COLUMNS, FEWEST = 8, 4  # panels of factors side by side, at most, and places for them, at least
COLOURS = {"images": "tab:blue", "texts": "tab:orange"}
STYLE = {"axes.titlelocation": "left", "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 7, "ytick.labelsize": 7,
         "legend.frameon": False, "legend.fontsize": 8, "legend.title_fontsize": 9, "text.parse_math": False}  # fmt: skip
POINTS = {"linewidths": 0, "rasterized": True}  # each a path of its own would make a PDF that no reader opens


def main(argv=None):
    """Score the factors and draw the picture; returns the exit code."""
    parser = Parser(__doc__)
    parser.flag("--model-dir", str, "folder of all models", "models")
    parser.flag("--model-id", str, "folder of the model inside it, or the path of any other", required=True)
    parser.flag("--factor", str, "of the maps' colours; none given: the one that the images' encodings hold best")
    parser.flag("--output", Path, "the picture; none given: encodings.png in the model directory")
    parser.flag("--seed", integer(0), "of the samples that are drawn", 0)
    args, _ = parser.parse(argv)
    limit_memory()
    inside = Path(args.model_dir) / args.model_id
    directory = inside if inside.exists() else Path(args.model_id)
    if not directory.is_dir():
        raise InputError(f"there is no model {inside}; --model-id names the folder of one")
    output = args.output or directory / "encodings.png"
    check_picture(output)
    with occupied(directory) if output.resolve().parent == directory.resolve() else contextlib.nullcontext():
        return plot(directory, output, args)


def plot(directory, output, args):
    """Print the scores of the encodings in a model directory and draw them into `output`; returns the exit code."""
    settle(directory)
    file = directory / "encodings.npz"
    if file.exists() and not is_recorded(file):
        raise InputError(f"{file} is damaged, or another model's: the evaluation in args.json wrote another; {AGAIN}")
    encodings, factors, is_test, passed_over = read_encodings(file)
    if args.factor not in (None, *factors):
        raise InputError(f"--factor {args.factor} is none of those to draw: {', '.join(factors)}")
    generator, similarity = np.random.default_rng(args.seed), SIMILARITY[tuple(encodings)]
    scores, directions = held_out(encodings, factors, is_test, generator)
    places, labels = flat_map(encodings, is_test, similarity, generator)
    gap = geometry(*(h[is_test] for h in encodings.values()), similarity)["modality_gap"]
    table = pd.DataFrame(scores, index=list(factors))
    print(table.clip(lower=0).to_string(na_rep="–", float_format="{:.3f}".format))
    print("held-out R² of continuous factors, MCC of discrete ones")
    if passed_over:
        print(f"passed over  {', '.join(passed_over)}")
    coloured = args.factor or table.iloc[:, 0].fillna(-1).idxmax()
    tested = {name: {key: values[is_test].numpy() for key, values in own.items()} for name, own in factors.items()}
    order, blocks = generator.permutation(int(is_test.sum())), -(-len(factors) // COLUMNS)
    heights = 4.6, 4.1 * blocks
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(12.5, sum(heights)), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=heights)
        draw_maps(top, places, labels, coloured, tested[coloured], gap, order[:MAPPED])
        draw_factors(bottom, blocks, tested, scores, directions, order[:DRAWN])
        save_figure(figure, output, f"{directory}: {len(order):,} held-out pairs")
    print(f"picture      {output}")
    return 0


def read_encodings(path):
    """(encodings, factors, is_test, passed_over) of an encodings.npz, images first; InputError if it is none.

    encodings: dict name → (N, D) float64; factors: dict factor → dict name of an encoding → (N,), classes in int64 or numbers in
    float64; is_test: (N,) bool; passed_over: names of the arrays that are not drawn.
    """
    try:
        with opened_npz(path) as content:
            arrays = {name: np.asarray(content[name]) for name in content.files}
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {AGAIN}") from None
    except Exception as error:  # NumPy and zipfile raise half a dozen types
        if isinstance(error, InputError) or is_out_of_memory(error) or getattr(error, "filename", None):
            raise
        raise InputError(f"{path} is damaged, or no file of encodings ({type(error).__name__}); {AGAIN}") from None
    arrays.pop("seed", None)
    names = next((pair for pair in SIMILARITY if arrays.keys() >= {*pair, "is_test"}), None)
    if not names:
        held = ", ".join(arrays)[:200] or "nothing"
        raise InputError(f"{path} holds {held}; expected is_test and hz_x, hz_t or h_image, h_text: {AGAIN}")
    kinds, total = dict.fromkeys(names, "f") | {"is_test": "b"}, arrays["is_test"].size
    for name, values in arrays.items():
        if values.dtype.kind not in kinds.get(name, "biuf") or values.shape[:1] != (total,):
            found = f"{name} is {values.dtype} of shape {values.shape}"
            raise InputError(f"{path}: {found}, not what --save-encodings writes of {total} samples; {AGAIN}")
        if not (np.abs(values) < LARGEST).all():
            raise InputError(f"{path}: {name} holds values that are not finite, or above {LARGEST:g}; {AGAIN}")
    is_test, (h_x, h_t) = arrays.pop("is_test").reshape(total), (arrays.pop(name).astype(float) for name in names)
    if h_x.ndim != 2 or h_x.shape != h_t.shape or not h_x.shape[1]:
        raise InputError(f"{path}: {names[0]} is {h_x.shape} and {names[1]} {h_t.shape}, expected one shape (N, D); {AGAIN}")
    if not 2 <= is_test.sum() <= total - 2:
        raise InputError(f"{path}: is_test holds out {is_test.sum()} of {total} samples, expected two at least, and two others")
    apart = names[0] == "h_image" and all(name.startswith(("image_", "text_")) for name in arrays)
    factors, passed_over = {}, []
    for name, values in arrays.items():
        distinct = 0 if values.size != total else len(np.unique(values))
        if distinct < 2 or (distinct > CLASSES and values.dtype.kind != "f"):
            passed_over.append(name)
            continue
        modality, _, own_name = name.partition("_") if apart else ("", "", name)
        column = torch.from_numpy(values.reshape(total).astype(float if values.dtype.kind == "f" else np.int64))
        factors.setdefault(own_name, {}).update(dict.fromkeys([f"h_{modality}"] if apart else names, column))
    if not factors:
        raise InputError(f"{path} has no factor to draw: {', '.join(passed_over) or 'none'} of one column and several values")
    return dict(zip(names, map(torch.from_numpy, (h_x, h_t)), strict=True)), factors, torch.from_numpy(is_test), passed_over


def held_out(encodings, factors, is_test, generator):
    """(scores, directions): dicts encoding → dict factor → held-out score, and → (M,) array of the best linear direction."""
    chosen, scores, directions = generator.permutation(int((~is_test).sum()))[:FITTED], {}, {}
    for key, h in encodings.items():
        fit_h, test_h = probes.standardise(h[~is_test], h[is_test])
        fit, test = ({name: own[key][part] for name, own in factors.items() if key in own} for part in (~is_test, is_test))
        numbers = {name: values for name, values in fit.items() if values.is_floating_point()}
        found, scores[key] = {}, {}
        if numbers:
            found = probes.linear_predictions(fit_h, numbers, test_h)
            scores[key] = probes.r2_by_name(test, found)
        if classes := {name: values[chosen] for name, values in fit.items() if name not in numbers}:
            scores[key] |= probes.logistic_mcc(fit_h[chosen], classes, test_h, test)
        found |= {name: first_discriminant(fit_h, fit[name], test_h) for name in classes}
        directions[key] = {name: values.flatten().numpy() for name, values in found.items()}
    return scores, directions


def first_discriminant(fit_h, classes, test_h):
    """(M,) float64: Fisher's first linear discriminant of (N,) classes, by canonical correlation, rising with their numbers."""
    _, place, counts = classes.unique(return_inverse=True, return_counts=True)
    indicators = torch.nn.functional.one_hot(place).double() / counts.sqrt()
    fitted, tested = probes.least_squares(fit_h, indicators, test_h)
    mean = fitted.mean(dim=0)
    direction = torch.linalg.eigh((fitted - mean).T @ (fitted - mean)).eigenvectors[:, -1]
    rises = (fitted - mean) @ direction @ (place - place.double().mean()) >= 0
    return (tested - mean) @ direction * (1 if rises else -1)


def flat_map(encodings, is_test, similarity, generator):
    """(dict encoding → (M, 2) array of the places of held-out samples, labels of both axes), as the head of this file says."""
    if similarity == "cosine":
        encodings = {name: torch.nn.functional.normalize(h, dim=1) for name, h in encodings.items()}
    fitted = torch.cat([h[~is_test] for h in encodings.values()])
    centre = fitted.mean(dim=0)
    powers, axes = torch.linalg.eigh((fitted - centre).T @ (fitted - centre) / len(fitted))
    powers, power = powers.clamp_min(0), powers.sum().clamp_min(1 / LARGEST)  # of collapsed ones there is rounding alone
    scale = power.sqrt() if similarity == "distance" else 1
    places = {name: ((h[is_test] - centre) / scale @ axes[:, -2:].flip(1)).numpy() for name, h in encodings.items()}
    if len(centre) > 1:
        return places, [f"principal component {i} ({powers[-i] / power:.0%})" for i in (1, 2)]
    reach = max(np.abs(h).max() for h in places.values())
    heights = generator.uniform(0.05, 1, int(is_test.sum()))
    levels = reach * heights, reach * (heights - 1.05)  # images above texts
    return {name: np.column_stack((h, y)) for (name, h), y in zip(places.items(), levels, strict=True)}, ["encoding", ""]


def draw_maps(figure, places, labels, coloured, own, gap, shown):
    """Draw three maps into a figure: each modality by the colours of a factor, and both with lines between pairs.

    places: dict encoding → (M, 2); own: dict encoding → (M,) values of the factor `coloured`; shown: numbers of the samples.
    """
    grid = figure.subplots(1, 3, sharex=True, sharey=True)
    values, together = np.concatenate(list(own.values())), grid[2]
    classes = np.unique(values)
    named = values.dtype.kind == "i" and len(classes) <= NAMED
    # of the ten colours those that are no modality's
    colours, limits = ("tab10", (-2, 7)) if named else ("viridis", np.quantile(values, (0.01, 0.99)))
    for axes, (name, place), (modality, colour) in zip(grid, places.items(), COLOURS.items(), strict=False):
        axes.set_title(f"{modality}: {name}" + ("" if name in own else f", without {coloured}"))
        if name in own:
            value = np.searchsorted(classes, own[name][shown]) if named else own[name][shown]
            drawn = axes.scatter(*place[shown].T, 5, value, cmap=colours, vmin=limits[0], vmax=limits[1], **POINTS)
        else:
            axes.scatter(*place[shown].T, 5, "lightgray", **POINTS)
        together.scatter(*place[shown].T, 5, colour, alpha=0.25, **POINTS)
        together.plot(*place.mean(axis=0), "o", color=colour, markersize=9, markeredgecolor="black", label=modality, zorder=4)
    ends = np.stack([place[shown[:JOINED]] for place in places.values()], axis=1)
    together.add_collection(LineCollection(ends, colors="black", linewidths=0.7, label="pairs"))
    together.set_title(f"both: centres {gap:.3f} apart (modality gap)")
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    together.legend(**beside)
    if named:
        dots = [plt.Line2D([], [], marker="o", linestyle="", color=drawn.to_rgba(i)) for i in range(len(classes))]
        grid[1].legend(dots, classes, title=coloured, **beside)
    else:
        figure.colorbar(drawn, ax=grid[1], shrink=0.6, aspect=25).ax.set_title(coloured)
    every = np.concatenate([place[shown] for place in places.values()])
    middle, half = (every.max(axis=0) + every.min(axis=0)) / 2, np.ptp(every, axis=0).max() / 2 * 1.05 or 1.0
    for axes in grid:
        axes.set(box_aspect=1, xlabel=labels[0], xlim=middle[0] + [-half, half], ylim=middle[1] + [-half, half])
        axes.tick_params(left=bool(labels[1]), labelleft=bool(labels[1]) and axes is grid[0])
        axes.locator_params(nbins=5)
    grid[0].set_ylabel(labels[1])


def draw_factors(figure, blocks, tested, scores, directions, shown):
    """Draw a panel for each factor and encoding into a figure, in `blocks` of two rows; scores, directions: of `held_out`.

    tested: dict factor → dict encoding → (M,) values; shown: numbers of the samples.
    """
    figure.suptitle("each factor (→) against its best linear direction (↑): of a number the prediction, equal on the line; "
                    "of classes the first discriminant, bars at medians", x=0.01, ha="left", fontsize=10)  # fmt: skip
    columns = max(-(-len(tested) // blocks), FEWEST)
    grid, headed, labelled = figure.subplots(2 * blocks, columns), set(), set()
    for axes in grid.flat:
        axes.set_axis_off()
    for number, factor, key in [(number, name, key) for number, name in enumerate(tested) for key in tested[name]]:
        modality, values = list(directions).index(key), tested[factor][key]
        row = 2 * (number // columns) + modality
        axes = grid[row, number % columns]
        axes.set_axis_on()
        draw_factor(axes, values, directions[key][factor], shown, list(COLOURS.values())[modality])
        heading = "" if factor in headed else f"{factor}\n"
        axes.set_title(f"{heading}{'R²' if values.dtype.kind == 'f' else 'MCC'} {max(scores[key][factor], 0):.3f}")
        axes.set_ylabel("" if row in labelled else key)
        headed.add(factor)
        labelled.add(row)


def draw_factor(axes, values, found, shown, colour):
    """Draw (M,) values of a factor across and `found`, a direction of encodings, up; a line is where both agree, or medians."""
    if values.dtype.kind == "f":
        axes.scatter(values[shown], found[shown], 4, colour, alpha=0.25, **POINTS)
        both = np.concatenate((values[shown], found[shown]))
        axes.plot([both.min(), both.max()], [both.min(), both.max()], color="gray", linewidth=0.8)
        axes.locator_params(nbins=4)
        return
    classes, place = np.unique(values, return_inverse=True)
    jitter = 0.7 * (np.arange(len(shown)) * (5**0.5 - 1) / 2 % 1 - 0.5)  # evenly spread
    axes.scatter(place[shown] + jitter, found[shown], 4, colour, alpha=0.25, **POINTS)
    numbers = np.arange(len(classes))
    axes.hlines([np.median(found[place == i]) for i in numbers], numbers - 0.4, numbers + 0.4, color="black", linewidth=1.2)
    ticks = numbers[:: 1 if len(classes) <= 10 else -(-len(classes) // 4)]
    axes.set(xticks=ticks, xticklabels=classes[ticks], yticks=[])


if __name__ == "__main__":
    run_script(main)
