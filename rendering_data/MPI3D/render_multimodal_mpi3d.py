"""Write captions for the images of MPI3D-Complex: ten settings of what they leave out and what they state wrongly.

    python rendering_data/MPI3D/render_multimodal_mpi3d.py                     # the whole data set, in seconds
    python rendering_data/MPI3D/render_multimodal_mpi3d.py --output-dir data/standin --seed 1
    python rendering_data/MPI3D/render_multimodal_mpi3d.py --output-dir data/masked --omission-prob 0.3

Selection k = 0 … 4 speaks of the first k + 1 of colour, shape, size, camera and background. Perturbation k speaks of all
five, and replaces the last k of them, each with probability --change-prob, by values drawn uniformly. With --omission-prob
captions leave out some of the factors that they would tell, each for itself, and say so: "some view".

The folder receives train/ and test/ with image_semantics.csv, text_semantics_{setting}.csv and text_{setting}.txt, and
vocab_{setting}.json beside them. With omissions, omitted_{setting}.csv says by 0 and 1 which of the values in
text_semantics_{setting}.csv a caption leaves out. One seed gives one split and the same bytes, whatever images lie in the
folder, and with another --omission-prob the same captions but for what they leave out; the grid is that of the images.
"""

import itertools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from running.command_line import InputError, Parser, integer, number, run_script

# isort: split

import numpy as np

from datasets import BIAS_IDS, BIAS_TYPES, MPI3D_FILE, MPI3D_GRID, mpi3d_bias, mpi3d_grid, mpi3d_images
from reading.captions import number_words, tokenise
from running.files import write_bytes, write_json
from running.memory import limit_memory

REPLACED = 0.9  # probability that a perturbable value is drawn anew, unless a flag says another; it may come out the same

WORDS = {
    "OBJ_COLOR": ("yellow", "green", "olive", "red"),
    "OBJ_SHAPE": ("coffee-cup", "tennis-ball", "croissant", "beer-cup"),
    "OBJ_SIZE": ("small size", "large size"),
    "CAMERA": ("top view", "center view", "bottom view"),
    "BACKGROUND": ("in a purple background", "in a sea-green background", "in a salmon background"),
}
OMITTED = {
    "OBJ_COLOR": "some-color",
    "OBJ_SHAPE": "thing",
    "OBJ_SIZE": "some size",
    "CAMERA": "some view",
    "BACKGROUND": "in some background",
}  # what a caption has in the place of a factor that it leaves out
TEMPLATES = (
    ("An object colored {OBJ_COLOR}.", "It has a {OBJ_COLOR} appearance.", "Something with {OBJ_COLOR}."),
    (
        "A {OBJ_SHAPE} that is {OBJ_COLOR}.",
        "The {OBJ_COLOR} {OBJ_SHAPE}.",
        "An object shaped like a {OBJ_SHAPE}, colored {OBJ_COLOR}.",
    ),
    (
        "A {OBJ_SIZE} {OBJ_SHAPE} in {OBJ_COLOR}.",
        "{OBJ_COLOR}, {OBJ_SIZE}, {OBJ_SHAPE}.",
        "The object is {OBJ_SIZE}, shaped as a {OBJ_SHAPE}, and colored {OBJ_COLOR}.",
    ),
    (
        "A {OBJ_SIZE} {OBJ_SHAPE} in {OBJ_COLOR}, seen from {CAMERA}.",
        "Viewed from {CAMERA}, a {OBJ_COLOR}, {OBJ_SIZE} {OBJ_SHAPE}.",
        "A {OBJ_SIZE} {OBJ_SHAPE} with {OBJ_COLOR}, perspective: {CAMERA}.",
    ),
    (
        "A {OBJ_SIZE} {OBJ_SHAPE} in {OBJ_COLOR}, viewed from {CAMERA}, {BACKGROUND}.",
        "From {CAMERA}, you see a {OBJ_COLOR}, {OBJ_SIZE} {OBJ_SHAPE}, {BACKGROUND}.",
        "A {OBJ_SIZE} {OBJ_SHAPE}, {OBJ_COLOR}, placed {BACKGROUND}, observed from {CAMERA}.",
    ),
)  # the templates of captions that speak of 1, 2, … 5 factors


def perturb(values, size, change_prob, rng):
    """(N,) values of which each is replaced with probability `change_prob` by one drawn uniformly from 0 … size − 1."""
    return np.where(rng.random(len(values)) < change_prob, rng.integers(0, size, len(values)), values)


def caption_table(factors, sizes):
    """Every caption that speaks of `factors`: a list in row-major order of (values of the factors, template).

    The value after a factor's last, sizes[factor], is that of captions that leave it out.
    """
    words = [(*WORDS[factor][: sizes[factor]], OMITTED[factor]) for factor in factors]
    return [
        template.format(**dict(zip(factors, combination, strict=True)))
        for combination in itertools.product(*words)
        for template in TEMPLATES[len(factors) - 1]
    ]


def write_lines(path, table, rows, header=""):
    """Write the text `header`, then table[row] for each of `rows`, a line each: text of which few lines are distinct."""
    lines = np.array([f"{line}\n" for line in table], dtype=object)
    write_bytes(path, (header + "".join(lines[rows])).encode())


def write_values(path, sizes, values):
    """Write the CSV of N points of a grid; sizes: dict factor → number of values; values: (number of factors, N) integers."""
    points = itertools.product(*map(range, sizes.values()))
    rows = np.ravel_multi_index(values, tuple(sizes.values()))
    write_lines(path, [",".join(map(str, point)) for point in points], rows, ",".join(sizes) + "\n")


def render(folder, sizes, train_ratio, seed, change_prob=REPLACED, omission_prob=0.0):
    """Write all files of all settings; sizes: dict factor → number of values. Returns the numbers of train and test rows.

    Omissions have random numbers of their own, so that all else does not depend on them.
    """
    count = math.prod(sizes.values())
    order = np.random.default_rng([seed, 0]).permutation(count)
    train_count = round(train_ratio * count)
    splits = {"train": slice(0, train_count), "test": slice(train_count, count)}
    points = np.stack(np.unravel_index(order, tuple(sizes.values())))
    image = dict(zip(sizes, points, strict=True))
    for split, part in splits.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        write_values(folder / split / "image_semantics.csv", sizes, points[:, part])
    for stream, (bias_type, bias_id) in enumerate(itertools.product(BIAS_TYPES, BIAS_IDS), start=1):
        rng = np.random.default_rng([seed, stream])
        bias, name = mpi3d_bias(bias_type, bias_id), f"{bias_type}_{bias_id}"
        stated = {factor: sizes[factor] for factor in bias.selected}
        text = image | {factor: perturb(image[factor], sizes[factor], change_prob, rng) for factor in bias.perturbed}
        values = np.stack([text[factor] for factor in stated])
        omitted = np.random.default_rng([seed, stream, 1]).random(values.shape) < omission_prob
        told = np.where(omitted, [[size] for size in stated.values()], values)
        captions = caption_table(stated, sizes)
        caption = np.ravel_multi_index(told, [size + 1 for size in stated.values()])
        caption = caption * len(TEMPLATES[0]) + rng.integers(0, len(TEMPLATES[0]), count)
        for split, part in splits.items():
            write_values(folder / split / f"text_semantics_{name}.csv", stated, values[:, part])
            omitted_file = folder / split / f"omitted_{name}.csv"
            if omission_prob:
                write_values(omitted_file, dict.fromkeys(stated, 2), omitted[:, part].astype(int))
            else:
                omitted_file.unlink(missing_ok=True)
            write_lines(folder / split / f"text_{name}.txt", captions, caption[part])
        distinct, first = np.unique(caption[splits["train"]], return_index=True)
        words = number_words(tokenise(captions[row]) for row in distinct[np.argsort(first)])
        numbers = {number: word for word, number in words.items()}
        write_json(folder / f"vocab_{name}.json", {"w2i": words, "i2w": numbers})
    return train_count, count - train_count


def main(argv=None):
    """Write the captions; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("--output-dir", default="data/MPI3d_real_complex", help="folder of the data set (%(default)s)")
    parser.add_argument("--seed", type=integer(0), default=0, help="of the split and the captions (%(default)s)")
    parser.add_argument("--train-ratio", type=number(0, 1, above=True), default=0.9, help="share of train (%(default)s)")
    change = "probability that a perturbed value is drawn anew; in place of 0, train on perturbation 0 (%(default)s)"
    parser.add_argument("--change-prob", type=number(0, 1), default=REPLACED, help=change)
    omission = "probability that a caption leaves out a factor which its setting tells, each by itself (%(default)s)"
    parser.add_argument("--omission-prob", type=number(0, 1), default=0.0, help=omission)
    default = "those of the images in the folder, else " + " ".join(map(str, MPI3D_GRID.values()))
    grid = f"values of {', '.join(MPI3D_GRID)}; none given: {default}"
    parser.add_argument("--grid", type=integer(1), nargs=7, metavar="SIZE", help=grid)
    parser.add_argument("--overwrite", action="store_true", help="replace captions that lie in the folder")
    args, _ = parser.parse(argv)
    limit_memory()
    folder = Path(args.output_dir)
    if (folder / MPI3D_FILE).exists():
        _, sizes = mpi3d_images(folder)
        if args.grid and tuple(args.grid) != tuple(sizes.values()):
            grid = " ".join(map(str, sizes.values()))
            raise InputError(f"--grid {' '.join(map(str, args.grid))}: the images in {folder} have the grid {grid}")
    else:
        sizes = mpi3d_grid(args.grid or MPI3D_GRID.values(), "--grid")
    count = math.prod(sizes.values())
    if not 0 < round(args.train_ratio * count) < count:
        raise InputError(f"--train-ratio {args.train_ratio:g} of {count} images leaves a split without images")
    if not args.overwrite and (folder / "train").exists():
        raise InputError(f"{folder / 'train'} exists already; --overwrite replaces the captions in it")
    train, test = render(folder, sizes, args.train_ratio, args.seed, args.change_prob, args.omission_prob)
    settings = len(BIAS_TYPES) * len(BIAS_IDS)
    print(f"{settings} settings of {train} training and {test} test captions in {folder}, seed {args.seed}")
    return 0


if __name__ == "__main__":
    run_script(main)
