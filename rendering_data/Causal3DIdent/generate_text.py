"""Write the captions of Causal3DIdent, one a line, from the latents of the captions.

    python rendering_data/Causal3DIdent/generate_text.py --output-folder data/Causal3DIDent

Reads latents_text_{selections|perturbations}_{0..6}.csv, which generate_latents.py or the paper's own code wrote, and writes
text/{selections|perturbations}_{0..6}/text_raw.txt, all of them or none. The captions of selection setting k speak of its
first k + 1 factors, those of the perturbation settings of all seven. Where omitted_text_{setting}.csv says that a caption leaves
one of them out, it has a word in its place that says so. Both protocols share these templates.
"""

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from running.command_line import InputError, Parser, integer, run_script

# isort: split
import numpy as np

from reading.causal3dident import (
    CAUSAL_SEMANTICS,
    CAUSAL_SETTINGS,
    CAUSAL_TEXT,
    SHAPES,
    read_latents,
    read_omitted,
    spotlight_fifths,
)
from running.files import replaced
from running.memory import limit_memory

# Words for the values of shape, X and Y position, and position of the spotlight, in fifths of [0, 1].
WORDS = {
    "S": SHAPES,
    "X": ("left", "center", "right"),
    "Y": ("top", "mid", "bottom"),
    "P": ("northwest", "northeast", "center", "southwest", "southeast"),
}
# What a caption has in the place of a factor that it leaves out.
OMITTED = {"S": "thing", "X": "part", "Y": "some", "P": "place", **dict.fromkeys("CLB", "unspecified")}
# Templates by the number of factors in the caption, then by text_phrasing. S, X, Y, P are WORDS, and C, L, B names of the
# object's, the spotlight's and the background's colour.
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
        'A {S} of "{C}" color is visible, positioned at the {Y}-{X} of the image, under a "{L}" spotlight shining from the {P}.',
        'A "{C}" {S} is at the {Y}-{X} of the image, illuminated by a "{L}" spotlight from the {P}.',
        'The {Y}-{X} of the image shows a "{C}" colored {S}, highlighted by a "{L}" spotlight positioned at the {P}.',
        'At the {Y}-{X} of the picture is a {S} in "{C}" color, standing out under a "{L}" spotlight coming from the {P}.',
        'At the {Y}-{X} of the image, there is a "{C}" object in the form of a {S}, '
        'with illumination from a "{L}" spotlight at the {P}.',
    ),
    7: (
        'A {S} of "{C}" color is visible, positioned at the {Y}-{X} of the image, '
        'under a "{L}" spotlight shining from the {P}, with a "{B}" background.',
        'A "{C}" {S} is at the {Y}-{X} of the image, illuminated by a "{L}" spotlight from the {P}, against a "{B}" background.',
        'The {Y}-{X} of the image shows a "{C}" colored {S}, highlighted by a "{L}" spotlight positioned at the {P}, '
        'on a "{B}" backdrop.',
        'At the {Y}-{X} of the picture is a {S} in "{C}" color, bathed in a "{L}" spotlight coming from the {P}, '
        'with a "{B}" background.',
        'At the {Y}-{X} of the image, there is a "{C}" object in the form of a {S}, '
        'standing out under a "{L}" spotlight from the {P}, against a "{B}" background.',
    ),
}


def captions(latents, n_factors, omitted=None):
    """List of N captions that speak of the first `n_factors` of CAUSAL_SEMANTICS.

    latents: dict of these, and text_phrasing → (N,): classes, [0, 1] for spotlight_pos, the names of colours; omitted: dict
    factor → (N,) bool, whether a caption leaves it out, or None if all captions state all factors.
    """
    words = {}
    for letter, factor in zip("SXYPCLB", CAUSAL_SEMANTICS[:n_factors], strict=False):
        if letter in WORDS:
            numbers = spotlight_fifths(latents[factor]) if factor == "spotlight_pos" else latents[factor]
            words[letter] = np.array(WORDS[letter])[numbers]
        else:
            words[letter] = latents[f"{factor}_name"]
        if omitted:
            words[letter] = np.where(omitted[factor], OMITTED[letter], words[letter])
    rows = zip(latents["text_phrasing"], *(column.tolist() for column in words.values()), strict=True)
    return [TEMPLATES[n_factors][phrasing].format(**dict(zip(words, row, strict=True))) for phrasing, *row in rows]


def main(argv=None):
    """Write the captions of the fourteen settings; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("--output-folder", type=Path, required=True, metavar="DIR", help="folder of the data set")
    seed = "taken as by the other scripts, and without effect: the phrasings are latents"
    parser.add_argument("--seed", type=integer(0), default=0, help=seed)
    args, _ = parser.parse(argv)
    limit_memory()
    if not args.output_folder.is_dir():
        raise InputError(f"{args.output_folder} is missing; generate_latents.py makes it")
    texts = {}
    for setting in CAUSAL_SETTINGS:
        bias_type, bias_id = setting.split("_")
        stated = CAUSAL_SEMANTICS[: int(bias_id) + 1 if bias_type == "selections" else None]
        factors = {name: CAUSAL_TEXT[name] for name in (*stated[: len(WORDS)], "text_phrasing")}
        names = [f"{name}_name" for name in stated[len(WORDS) :]]
        latents = read_latents(args.output_folder / f"latents_text_{setting}.csv", factors, names)
        omitted = read_omitted(args.output_folder / f"omitted_text_{setting}.csv", stated, len(latents["text_phrasing"]))
        texts[setting] = captions(latents, len(stated), omitted)
    count = len(texts["selections_0"])
    if unequal := [setting for setting, lines in texts.items() if len(lines) != count]:
        found = f"latents_text_{unequal[0]}.csv has {len(texts[unequal[0]])} rows, those of selections_0 {count}"
        raise InputError(f"{args.output_folder}/{found}: make all again with generate_latents.py")
    with contextlib.ExitStack() as stack:
        for setting, lines in texts.items():
            folder = args.output_folder / "text" / setting
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(replaced(folder / "text_raw.txt")).write_bytes(("\n".join(lines) + "\n").encode())
    print(f"{args.output_folder}/text: {count:,} captions in each of {len(texts)} settings")
    return 0


if __name__ == "__main__":
    run_script(main)
