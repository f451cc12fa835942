"""The folder of Causal3DIdent: its factors, the tables of latents that state them, and which files are its images.

datasets.py reads the folder and the scripts in rendering_data/Causal3DIdent make it. One of them runs in Blender's Python,
which has neither torch nor pandas.
"""

import collections
import csv
import hashlib
import io
import itertools
import math
import os
from pathlib import Path

import numpy as np

from running.command_line import InputError
from running.files import read_csv, read_json, read_text

CAUSAL_TOOLS = "rendering_data/Causal3DIdent"
CAUSAL_BIAS_TYPES, CAUSAL_BIAS_IDS = ("selections", "perturbations"), range(7)
CAUSAL_SETTINGS = tuple(f"{bias_type}_{bias_id}" for bias_type in CAUSAL_BIAS_TYPES for bias_id in CAUSAL_BIAS_IDS)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

SHAPES = ("teapot", "hare", "dragon", "cow", "armadillo", "horse", "head")
# Captions call colours by names: those of Matplotlib's TABLEAU_COLORS, CSS4_COLORS and XKCD_COLORS, as many as here.
CAUSAL_PALETTES = {"object_color": 10, "spotlight_color": 148, "background_color": 949}
# What captions may speak of, in the order in which settings add it.
CAUSAL_SEMANTICS = ("object_shape", "object_xpos", "object_ypos", "spotlight_pos", *CAUSAL_PALETTES)
ROTATIONS = ("object_alpharot", "object_betarot", "object_gammarot")
# All factors of the image, and of the caption. A number is that of a factor's values 0, 1, …; None stands for a number in [0, 1].
CAUSAL_IMAGE = {"object_shape": len(SHAPES), "object_xpos": 3, "object_ypos": 3}
CAUSAL_IMAGE |= dict.fromkeys((*ROTATIONS, "spotlight_pos", *CAUSAL_PALETTES))


def causal_text_factor(name):
    """Column of a caption's latents that states the semantics `name`: colours are stated by the index of their name."""
    return f"{name}_index" if name in CAUSAL_PALETTES else name


CAUSAL_TEXT = {causal_text_factor(name): (CAUSAL_IMAGE | CAUSAL_PALETTES)[name] for name in CAUSAL_SEMANTICS}
CAUSAL_TEXT["text_phrasing"] = 5
# What files of the paper's runs, and those written here, call some columns and factors of captions.
RUNS_SPELLING = {f"spotlight_color_{kind}": f"splotlight_color_{kind}" for kind in ("name", "index")}


def read_latents(path, factors, names=()):
    """Dict column → (N,) array of a table of latents: int64 or float64 for `factors`, and of strings for `names`.

    factors: dict name → number of values, or None for a number in [0, 1]. Other columns and empty lines are passed over.
    The spotlight's columns may have either spelling of RUNS_SPELLING. Raises InputError that names the file and what is
    missing, or the line of the first value that is out of range.
    """
    made_by = f"{CAUSAL_TOOLS}/generate_latents.py writes"
    try:
        reader = csv.reader(io.StringIO(read_text(path), newline=""))
        header = [name.replace("splotlight", "spotlight") for name in next(reader, [])]
        rows = {line: row for line, row in enumerate(reader, 2) if row}
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {made_by} it") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is damaged ({error}); remove it and make it again") from None
    if twice := [name for name, count in collections.Counter(header).items() if name and count > 1]:
        raise InputError(f"{path} has the column {twice[0]} in two spellings; remove one of them")
    if missing := [name for name in (*factors, *names) if name not in header]:
        raise InputError(f"{path} has no column {', '.join(missing)}; {made_by} it")
    if not rows:
        raise InputError(f"{path} has no rows; {made_by} them")
    if longer := next((line for line, row in rows.items() if len(row) > len(header)), None):
        raise InputError(f"{path}, line {longer} has more values than there are columns; make the file again")
    cells = {name: column for name, *column in itertools.zip_longest(header, *rows.values(), fillvalue="")}
    lines = list(rows)
    table = {name: checked_factor(path, name, cells[name], size, lines) for name, size in factors.items()}
    for name in names:
        if "" in cells[name]:
            raise InputError(f"{path}, line {lines[cells[name].index('')]}: {name} is missing; make the file again")
        table[name] = np.array(cells[name])
    return table


def read_factors(path, sizes):
    """Dict factor → (N,) int64 of a CSV with exactly the factors of `sizes`; InputError for values that are none of them."""
    table = read_csv(path, sizes)
    lines = range(2, len(table) + 2)
    return {name: checked_factor(path, name, table[name].to_numpy(), size, lines) for name, size in sizes.items()}


def read_omitted(path, factors, count):
    """Dict factor → (count,) bool, whether a caption leaves it out, of a CSV of 0 and 1; none does where there is no file.

    Raises InputError unless the file has exactly these factors and as many rows as there are captions.
    """
    if not path.exists():
        return {name: np.zeros(count, bool) for name in factors}
    omitted = read_factors(path, dict.fromkeys(factors, 2))
    if (rows := len(omitted[factors[0]])) != count:
        raise InputError(f"{path} has {rows} rows and there are {count} captions; make both again")
    return {name: values == 1 for name, values in omitted.items()}


def checked_factor(path, name, cells, size, lines):
    """(N,) values of the factor `name`: int64 from 0 to size − 1, or float64 in [0, 1] where size is None.

    cells: N numbers, or texts that should be some; lines: those that they stand in. Raises InputError about the first other one.
    """
    try:
        values = np.array(cells, float)
    except ValueError:
        values = np.array([_number(cell) for cell in cells])
    valid = (values >= 0) & (values <= (1 if size is None else size - 1))
    if size is not None:
        valid &= values == np.floor(values)
    if not valid.all():
        row = int(valid.argmin())
        expected = "a number in [0, 1]" if size is None else f"an integer in 0 … {size - 1}"
        found = "missing" if cells[row] == "" else cells[row]
        raise InputError(f"{path}, line {lines[row]}: {name} is {found}, expected {expected}; make the file again")
    return values if size is None else values.astype(np.int64)


def _number(cell):
    try:
        return float(cell)
    except ValueError:
        return math.nan


def spotlight_fifths(positions):
    """(N,) int64 fifths of [0, 1], 0 … 4, by which captions state spotlight_pos, (N,)."""
    return np.minimum((5 * positions).astype(np.int64), 4)


def latents_digest(folder):
    """SHA-256 of latents_image.csv, in hexadecimal: images.json says by it what the images were rendered from."""
    return hashlib.sha256((Path(folder) / "latents_image.csv").read_bytes()).hexdigest()


def check_rendered_latents(folder):
    """Raise InputError if images.json, where there is one, says that the images were rendered from other latents."""
    path = Path(folder) / "images.json"
    if path.exists() and read_json(path).get("latents") != latents_digest(folder):
        raise InputError(
            f"{folder}: images/ was rendered from other latents than latents_image.csv, as {path.name} says; remove both and "
            f"render them again with {CAUSAL_TOOLS}/generate_images.py, or restore the latents"
        )


def protocols_of(folder, setting):
    """Dict "captions", "images" → "code" or "paper", by which the files of a setting were made, as far as they say so.

    Captions differ in perturbations_0 alone. Raises InputError if latents.json or images.json is damaged.
    """
    files = {"captions": "latents.json"} if setting == "perturbations_0" else {}
    paths = {what: Path(folder) / name for what, name in (files | {"images": "images.json"}).items()}
    told = {what: read_json(path).get("protocol") for what, path in paths.items() if path.exists()}
    return {what: protocol for what, protocol in told.items() if protocol in ("code", "paper")}


def image_files(folder):
    """List of (number, os.DirEntry) of a folder's images 0.png, 00.jpg, …, by number; InputError if there is no folder."""
    try:
        entries = [(*os.path.splitext(entry.name), entry) for entry in os.scandir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} is missing: {CAUSAL_TOOLS}/generate_images.py renders the images") from None
    found = [(int(stem), entry) for stem, suffix, entry in entries if suffix.lower() in IMAGE_SUFFIXES and stem.isdecimal()]
    return sorted(found, key=lambda numbered: numbered[0])
