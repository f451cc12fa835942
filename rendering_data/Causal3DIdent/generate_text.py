"""Write the captions of Causal3DIdent, one a line, from the latents of the captions.

    python rendering_data/Causal3DIdent/generate_text.py --output-folder data/Causal3DIDent

Reads latents_text_{selections|perturbations}_{0..6}.csv, which generate_latents.py wrote, and writes
text/{selections|perturbations}_{0..6}/text_raw.txt, all of them or none. The captions of selection setting k speak of its
first k + 1 factors, those of the perturbation settings of all seven. Both protocols share these templates.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from running.command_line import InputError, Parser, integer, run_script
from running.files import replaced

SHAPES = ("teapot", "hare", "dragon", "cow", "armadillo", "horse", "head")
XPOS = ("left", "center", "right")
YPOS = ("top", "mid", "bottom")
SPOTLIGHT_POS = ("northwest", "northeast", "center", "southwest", "southeast")  # fifths of [0, 1]
# Templates by the number of factors in the caption, then by text_phrasing. S shape, X and Y position, P position of the
# spotlight, C, L, B names of the object's, the spotlight's and the background's colour.
TEMPLATES = {
    1: (
        "A {S} is visible.",
        "A {S} is in the image.",
        "The image shows a {S}.",
        "The picture is a {S}.",
        "There is an object in the form of a {S}.",
    ),
    2: (
        "A {S} is visible, positioned at the {X} of the image.",
        "A {S} is at the {X} of the image.",
        "The {X} of the image shows a {S}.",
        "At the {X} of the picture is a {S}.",
        "At the {X} of the image, there is an object in the form of a {S}.",
    ),
    3: (
        "A {S} is visible, positioned at the {Y}-{X} of the image.",
        "A {S} is at the {Y}-{X} of the image.",
        "The {Y}-{X} of the image shows a {S}.",
        "At the {Y}-{X} of the picture is a {S}.",
        "At the {Y}-{X} of the image, there is an object in the form of a {S}.",
    ),
    4: (
        "A {S} is visible, positioned at the {Y}-{X} of the image, with a spotlight shining from the {P}.",
        "A {S} is at the {Y}-{X} of the image, illuminated by a light from the {P}.",
        "The {Y}-{X} of the image shows a {S}, highlighted by a light source positioned at the {P}.",
        "At the {Y}-{X} of the picture is a {S}, standing out under a light coming from the {P}.",
        "At the {Y}-{X} of the image, there is an object in the form of a {S}, with illumination from the {P}.",
    ),
    5: (
        'A {S} of "{C}" color is visible, positioned at the {Y}-{X} of the image, with a spotlight shining from the {P}.',
        'A "{C}" {S} is at the {Y}-{X} of the image, illuminated by a light from the {P}.',
        'The {Y}-{X} of the image shows a "{C}" colored {S}, highlighted by a light source positioned at the {P}.',
        'At the {Y}-{X} of the picture is a {S} in "{C}" color, standing out under a light coming from the {P}.',
        'At the {Y}-{X} of the image, there is a "{C}" object in the form of a {S}, with illumination from the {P}.',
    ),
    6: (
        'A {S} of "{C}" color is visible, positioned at the {Y}-{X} of the image, '
        'under a "{L}" spotlight shining from the {P}.',
        'A "{C}" {S} is at the {Y}-{X} of the image, illuminated by a "{L}" spotlight from the {P}.',
        'The {Y}-{X} of the image shows a "{C}" colored {S}, highlighted by a "{L}" spotlight positioned at the {P}.',
        'At the {Y}-{X} of the picture is a {S} in "{C}" color, standing out under a "{L}" spotlight coming from the {P}.',
        'At the {Y}-{X} of the image, there is a "{C}" object in the form of a {S}, '
        'with illumination from a "{L}" spotlight at the {P}.',
    ),
    7: (
        'A {S} of "{C}" color is visible, positioned at the {Y}-{X} of the image, '
        'under a "{L}" spotlight shining from the {P}, with a "{B}" background.',
        'A "{C}" {S} is at the {Y}-{X} of the image, illuminated by a "{L}" spotlight from the {P}, '
        'against a "{B}" background.',
        'The {Y}-{X} of the image shows a "{C}" colored {S}, highlighted by a "{L}" spotlight positioned at the {P}, '
        'on a "{B}" backdrop.',
        'At the {Y}-{X} of the picture is a {S} in "{C}" color, bathed in a "{L}" spotlight coming from the {P}, '
        'with a "{B}" background.',
        'At the {Y}-{X} of the image, there is a "{C}" object in the form of a {S}, '
        'standing out under a "{L}" spotlight from the {P}, against a "{B}" background.',
    ),
}
SETTINGS = {f"selections_{k}": k + 1 for k in range(7)} | {f"perturbations_{k}": 7 for k in range(7)}
# Columns of the latents and the number of their values: discrete ones are 0 … count − 1, spotlight_pos lies in [0, 1].
COUNTS = {
    "object_shape": len(SHAPES),
    "object_xpos": len(XPOS),
    "object_ypos": len(YPOS),
    "spotlight_pos": None,
    "text_phrasing": len(TEMPLATES[1]),
}
NAMES = ("object_color_name", "spotlight_color_name", "background_color_name")


def read_latents(path):
    """DataFrame of a setting's latents_text_*.csv; InputError that names the file and what is wrong with it.

    Earlier tools spelled the spotlight's columns `splotlight_color_*`; they are read as `spotlight_color_*`.
    """
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(NAMES, str), keep_default_na=False, na_values=[""])
    except FileNotFoundError:
        raise InputError(f"{path} is missing; generate_latents.py writes it") from None
    except (ValueError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise InputError(f"{path} is damaged ({error}); make it again with generate_latents.py") from None
    table = table.rename(columns=lambda name: name.replace("splotlight", "spotlight"))
    if not table.columns.is_unique:
        twice = table.columns[table.columns.duplicated()][0]
        raise InputError(f"{path} has the column {twice} in two spellings; remove one of them")
    missing = [name for name in (*COUNTS, *NAMES) if name not in table]
    if missing or table.empty:
        raise InputError(f"{path} has no {'rows' if table.empty else 'column ' + ', '.join(missing)}; make it again "
                         "with generate_latents.py")  # fmt: skip
    for name, count in COUNTS.items():
        values = pd.to_numeric(table[name], errors="coerce").to_numpy(float)
        valid = (values >= 0) & (values <= (1 if count is None else count - 1))
        if count is not None:
            valid &= values == np.floor(values)
        reject(path, table[name], valid, "a number in [0, 1]" if count is None else f"an integer in 0 … {count - 1}")
        table[name] = values if count is None else values.astype(int)
    for name in NAMES:
        reject(path, table[name], table[name].notna().to_numpy(), "the name of a colour")
    return table


def reject(path, column, valid, expected):
    """Raise InputError about the first value of `column` (a Series) that is not `valid` (N,) bool."""
    if not valid.all():
        row = int(np.argmin(valid))
        raise InputError(f"{path}, line {row + 2}: {column.name} is {column.iloc[row]}, expected {expected}; make it again "
                         "with generate_latents.py")  # fmt: skip


def captions(table, n_factors):
    """List of N captions that speak of the first `n_factors` factors of `table`, as `read_latents` returns it."""
    fifths = np.minimum((table["spotlight_pos"].to_numpy() * 5).astype(int), 4)
    words = {
        "S": np.array(SHAPES)[table["object_shape"]],
        "X": np.array(XPOS)[table["object_xpos"]],
        "Y": np.array(YPOS)[table["object_ypos"]],
        "P": np.array(SPOTLIGHT_POS)[fifths],
        **dict(zip("CLB", (table[name] for name in NAMES), strict=True)),
    }
    templates = [template.format for template in TEMPLATES[n_factors]]
    rows = zip(table["text_phrasing"].tolist(), *(column.tolist() for column in words.values()), strict=True)
    return [templates[phrasing](**dict(zip(words, row, strict=True))) for phrasing, *row in rows]


def parse_flags(argv):
    """The Namespace of the command line."""
    parser = Parser(description=__doc__.split("\n\n")[0], epilog="\n\n".join(__doc__.split("\n\n")[1:]))
    parser.add_argument("--output-folder", type=Path, required=True, metavar="DIR", help="folder of the data set")
    parser.add_argument("--seed", type=integer(0), default=0,
                        help="taken as by the other scripts, and without effect: the phrasings are latents")  # fmt: skip
    return parser.parse(argv)[0]


def main(argv=None):
    """Write the captions of the fourteen settings; returns the exit code."""
    args = parse_flags(argv)
    if not args.output_folder.is_dir():
        raise InputError(f"{args.output_folder} is missing; generate_latents.py makes it")
    texts, counts = {}, {}
    for setting, n_factors in SETTINGS.items():
        table = read_latents(args.output_folder / f"latents_text_{setting}.csv")
        counts[setting] = len(table)
        texts[setting] = ("\n".join(captions(table, n_factors)) + "\n").encode()
    unequal = next((setting for setting in counts if counts[setting] != counts["selections_0"]), None)
    if unequal:
        raise InputError(f"{args.output_folder}/latents_text_{unequal}.csv has {counts[unequal]} rows, those of "
                         f"selections_0 {counts['selections_0']}: make all again with generate_latents.py")  # fmt: skip
    with contextlib.ExitStack() as stack:
        for setting, content in texts.items():
            folder = args.output_folder / "text" / setting
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(replaced(folder / "text_raw.txt")).write_bytes(content)
    print(f"{args.output_folder}/text: {counts['selections_0']:,} captions in each of {len(SETTINGS)} settings")
    return 0


if __name__ == "__main__":
    run_script(main)
