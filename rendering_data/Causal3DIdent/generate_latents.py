"""Sample the latents of Causal3DIdent: of the images, and of the captions of all fourteen misaligned settings.

    python rendering_data/Causal3DIdent/generate_latents.py --output-folder data/Causal3DIDent --n-points 100000 --seed 0

    latents_image.csv                                    what is in the image
    latents_text_{selections|perturbations}_{0..6}.csv   what the caption says of it

    spotlight_pos ──> spotlight_color ──> background_color        object_xpos ──> object_color <── object_ypos
          └──────────────────────────────────^

A selection setting speaks of the first factors of SELECTED and states them rightly. A perturbation setting speaks of all of
them and states the first factors of PERTURBED as if another image had been drawn. --protocol code: where the background is
not perturbed (perturbations 0), its colour is named from the object's hue, as in the runs behind the paper's figures;
paper: from its own.

Then: generate_text.py writes the captions, generate_images.py the images.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.colors import CSS4_COLORS, TABLEAU_COLORS, XKCD_COLORS, hsv_to_rgb, to_rgb

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from running.command_line import InputError, Parser, integer, run_script
from running.files import replaced

SHAPES = 7  # teapot, hare, dragon, cow, armadillo, horse, head
PHRASINGS = 5
# Factors that the caption of selection setting k speaks of: the first k + 1.
SELECTED = (
    "object_shape",
    "object_xpos",
    "object_ypos",
    "spotlight_pos",
    "object_color",
    "spotlight_color",
    "background_color",
)
# Factors that the caption of perturbation setting k draws anew: the first k.
PERTURBED = ("background_color", "spotlight_color", "object_color", "spotlight_pos", "object_ypos", "object_xpos")
PALETTES = {"object_color": TABLEAU_COLORS, "spotlight_color": CSS4_COLORS, "background_color": XKCD_COLORS}
SETTINGS = [(bias_type, bias_id) for bias_type in ("selections", "perturbations") for bias_id in range(len(SELECTED))]
HUES_AT_ONCE = 2048  # hues of a block whose distances to a palette stay in a CPU cache


def image_latents(size, rng):
    """DataFrame of `size` images' latents, in the order of the specification; hues and rotations in [0, 1]."""
    latents = {name: rng.integers(0, count, size)
               for name, count in (("object_shape", SHAPES), ("object_xpos", 3), ("object_ypos", 3))}  # fmt: skip
    latents["object_zpos"] = np.zeros(size, int)
    for name in ("object_alpharot", "object_betarot", "object_gammarot", "spotlight_pos"):
        latents[name] = rng.random(size)
    latents["object_color"] = ((latents["object_xpos"] + latents["object_ypos"]) / 2 + rng.random(size)) / 3
    latents["spotlight_color"] = (latents["spotlight_pos"] + rng.random(size)) / 2
    latents["background_color"] = (latents["spotlight_pos"] + latents["spotlight_color"] + rng.random(size)) / 3
    return pd.DataFrame(latents)


def perturbed_latents(image, bias_id, rng):
    """Copy of the image's latents (N rows) in which the first `bias_id` factors of PERTURBED are drawn anew, uniformly."""
    text, size = image.copy(), len(image)
    for name in PERTURBED[:bias_id]:
        text[name] = rng.integers(0, 3, size) if name.endswith(("xpos", "ypos")) else rng.random(size)
    return text


def nearest_colors(hues, palette):
    """(N,) int64: index, among the palette's sorted names, of the colour nearest to hsv(hue, 1, 1) in RGB.

    hues: (N,) in [0, 1]; palette: names to colours. Of colours equally near, the first name is taken.
    """
    colors = np.array([to_rgb(palette[name]) for name in sorted(palette)])
    nearest = np.empty(len(hues), np.int64)
    for start in range(0, len(hues), HUES_AT_ONCE):
        wanted = hsv_to_rgb(
            np.stack([hues[start : start + HUES_AT_ONCE], *[np.ones(len(hues[start:][:HUES_AT_ONCE]))] * 2], 1)
        )
        distances = sum((wanted[:, i, None] - colors[:, i]) ** 2 for i in range(3))
        nearest[start : start + HUES_AT_ONCE] = distances.argmin(axis=1)
    return nearest


def caption_latents(text, color_indices, rng):
    """DataFrame of what the captions say: factors as in `text`, colours by name and index, and a phrasing.

    text: N rows of latents; color_indices: each factor of PALETTES to (N,) indices among its palette's sorted names.
    """
    caption = text[["object_shape", "object_xpos", "object_ypos", "spotlight_pos"]].copy()
    for factor, palette in PALETTES.items():
        caption[f"{factor}_name"] = np.array(sorted(palette))[color_indices[factor]]
        caption[f"{factor}_index"] = color_indices[factor]
    caption["text_phrasing"] = rng.integers(0, PHRASINGS, len(text))
    return caption


def sample_tables(size, seed, protocol):
    """Dict of file name to DataFrame: latents_image.csv, and the captions' latents of the fourteen settings.

    Each table has random numbers of its own, so that a setting's does not depend on the others.
    """
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(1 + len(SETTINGS))]
    image = image_latents(size, streams[0])
    image_colors = {factor: nearest_colors(image[factor].to_numpy(), palette) for factor, palette in PALETTES.items()}
    tables = {"latents_image.csv": image}
    for (bias_type, bias_id), rng in zip(SETTINGS, streams[1:], strict=True):
        text, colors = image, dict(image_colors)
        if bias_type == "perturbations":
            text = perturbed_latents(image, bias_id, rng)
            drawn = set(PERTURBED[:bias_id])
            named_from = {factor: factor for factor in drawn & set(PALETTES)}
            if protocol == "code" and "background_color" not in drawn:
                named_from["background_color"] = "object_color"
            for factor, source in named_from.items():
                colors[factor] = nearest_colors(text[source].to_numpy(), PALETTES[factor])
        tables[f"latents_text_{bias_type}_{bias_id}.csv"] = caption_latents(text, colors, rng)
    return tables


def parse_flags(argv):
    """The Namespace of the command line."""
    parser = Parser(description=__doc__.split("\n\n")[0], epilog="\n\n".join(__doc__.split("\n\n")[1:]))
    parser.add_argument("--output-folder", type=Path, required=True, metavar="DIR", help="folder of the data set")
    parser.add_argument("--n-points", type=integer(1), required=True, help="samples")
    parser.add_argument("--seed", type=integer(0), default=0, help="of every random number (%(default)s)")
    parser.add_argument("--protocol", choices=("code", "paper"), default="code",
                        help="background colour in the captions of perturbations 0: from the object's hue, as in the "
                        "paper's runs (code), or from its own (paper) (%(default)s)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true",
                        help="replace other latents in DIR; captions and images have to be made anew then")  # fmt: skip
    return parser.parse(argv)[0]


def main(argv=None):
    """Write the fifteen tables, all or none of them; returns the exit code."""
    args = parse_flags(argv)
    tables = {name: table.to_csv(index=False, lineterminator="\n").encode()
              for name, table in sample_tables(args.n_points, args.seed, args.protocol).items()}  # fmt: skip
    args.output_folder.mkdir(parents=True, exist_ok=True)
    replacing = False
    for name, content in tables.items():
        file = args.output_folder / name
        if file.exists() and file.read_bytes() != content:
            replacing = True
            if not args.overwrite:
                raise InputError(
                    f"{file} holds other latents already; choose another folder, or --overwrite replaces them"
                )
    with contextlib.ExitStack() as stack:
        for name, content in tables.items():
            stack.enter_context(replaced(args.output_folder / name)).write_bytes(content)
    print(f"{args.output_folder}: latents of {args.n_points:,} images and of their captions in {len(SETTINGS)} settings, "
          f"seed {args.seed}, {args.protocol} protocol")  # fmt: skip
    stale = [f"{name}/" for name in ("text", "images") if replacing and (args.output_folder / name).exists()]
    if stale:
        print(f"{' and '.join(stale)} there come from the earlier latents: make them anew")
    return 0


if __name__ == "__main__":
    run_script(main)
