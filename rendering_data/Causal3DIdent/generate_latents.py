"""Sample the latents of Causal3DIdent: of the images, and of the captions of all fourteen misaligned settings.

    python rendering_data/Causal3DIdent/generate_latents.py --output-folder data/Causal3DIDent --n-points 100000 --seed 0

    latents_image.csv                                    what is in the image
    latents_text_{selections|perturbations}_{0..6}.csv   what the caption says of it, and nothing that its setting leaves out
    omitted_text_{selections|perturbations}_{0..6}.csv   with --omission-prob: 1 where the caption leaves a factor out after all
    latents.json                                         the flags that they come from

    spotlight_pos ──> spotlight_color ──> background_color        object_xpos ──> object_color <── object_ypos
          └──────────────────────────────────^

A selection setting speaks of the first of seven factors and states them rightly. A perturbation setting speaks of all of them
and states the first factors of PERTURBED as if another image had been drawn. --protocol code: where the background is
not perturbed (perturbations 0), its colour is named from the object's hue, as in the runs behind the paper's figures;
paper: from its own. With --omission-prob a caption leaves out some of the factors that its setting tells, each by itself;
its latents still hold them, and one seed gives the same latents with and without.

Then: generate_text.py writes the captions, generate_images.py the images.
"""

import contextlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from running.command_line import InputError, Parser, integer, number, run_script

# isort: split
import numpy as np
import pandas as pd
from matplotlib.colors import CSS4_COLORS, TABLEAU_COLORS, XKCD_COLORS, hsv_to_rgb, to_rgb

from reading.causal3dident import CAUSAL_IMAGE, CAUSAL_SEMANTICS, CAUSAL_SETTINGS, CAUSAL_TEXT, ROTATIONS, RUNS_SPELLING
from running.files import regular_file, replaced
from running.memory import limit_memory

# Factors that the caption of perturbation setting k draws anew: the first k.
PERTURBED = ("background_color", "spotlight_color", "object_color", "spotlight_pos", "object_ypos", "object_xpos")
PALETTES = {"object_color": TABLEAU_COLORS, "spotlight_color": CSS4_COLORS, "background_color": XKCD_COLORS}
HUES_AT_ONCE = 2048  # hues of a block whose distances to a palette stay in a CPU cache


def image_latents(size, rng):
    """DataFrame of `size` images' latents, in the order of the data set's file; hues and rotations in [0, 1]."""
    latents = {name: rng.integers(0, count, size) for name, count in CAUSAL_IMAGE.items() if count}
    latents["object_zpos"] = np.zeros(size, int)
    for name in (*ROTATIONS, "spotlight_pos"):
        latents[name] = rng.random(size)
    latents["object_color"] = ((latents["object_xpos"] + latents["object_ypos"]) / 2 + rng.random(size)) / 3
    latents["spotlight_color"] = (latents["spotlight_pos"] + rng.random(size)) / 2
    latents["background_color"] = (latents["spotlight_pos"] + latents["spotlight_color"] + rng.random(size)) / 3
    return pd.DataFrame(latents)


def perturbed_latents(image, bias_id, rng):
    """Copy of the image's latents (N rows) in which the first `bias_id` factors of PERTURBED are drawn anew, uniformly."""
    text, size = image.copy(), len(image)
    for name in PERTURBED[:bias_id]:
        text[name] = rng.integers(0, CAUSAL_IMAGE[name], size) if CAUSAL_IMAGE[name] else rng.random(size)
    return text


def nearest_colors(hues, palette):
    """(N,) int64: index, among the palette's sorted names, of the colour nearest to hsv(hue, 1, 1) in RGB.

    hues: (N,) in [0, 1]; palette: names to colours. Of colours equally near, the first name is taken.
    """
    colors = np.array([to_rgb(palette[name]) for name in sorted(palette)])
    nearest = np.empty(len(hues), np.int64)
    for start in range(0, len(hues), HUES_AT_ONCE):
        part = hues[start : start + HUES_AT_ONCE]
        wanted = hsv_to_rgb(np.stack([part, np.ones_like(part), np.ones_like(part)], 1))
        distances = sum((wanted[:, i, None] - colors[:, i]) ** 2 for i in range(3))
        nearest[start : start + HUES_AT_ONCE] = distances.argmin(axis=1)
    return nearest


def caption_latents(text, stated, color_indices, rng):
    """DataFrame of what the captions say: the factors `stated` as in `text`, colours by name and index, and a phrasing.

    text: N rows of latents; color_indices: each factor of PALETTES to (N,) indices among its palette's sorted names.
    """
    caption = {}
    for factor in stated:
        if factor in PALETTES:
            caption[f"{factor}_name"] = np.array(sorted(PALETTES[factor]))[color_indices[factor]]
            caption[f"{factor}_index"] = color_indices[factor]
        else:
            caption[factor] = text[factor]
    caption["text_phrasing"] = rng.integers(0, CAUSAL_TEXT["text_phrasing"], len(text))
    return pd.DataFrame(caption).rename(columns=RUNS_SPELLING)


def sample_tables(size, seed, protocol, omission_prob=0.0):
    """Dict of file name to DataFrame: latents_image.csv, the captions' latents of the fourteen settings, and their omissions.

    Each table has random numbers of its own, so that a setting's does not depend on the others. The omissions, 1 where a
    caption leaves a factor out, with probability `omission_prob`, are there if that is above 0.
    """
    count = len(CAUSAL_SETTINGS)
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(1 + 2 * count)]
    image = image_latents(size, streams[0])
    image_colors = {factor: nearest_colors(image[factor].to_numpy(), palette) for factor, palette in PALETTES.items()}
    tables = {"latents_image.csv": image}
    for setting, rng, omission_rng in zip(CAUSAL_SETTINGS, streams[1 : 1 + count], streams[1 + count :], strict=True):
        text, colors, stated = image, dict(image_colors), CAUSAL_SEMANTICS
        bias_type, bias_id = setting.split("_")
        if bias_type == "selections":
            stated = CAUSAL_SEMANTICS[: int(bias_id) + 1]
        if bias_type == "perturbations":
            text = perturbed_latents(image, int(bias_id), rng)
            named_from = {factor: factor for factor in PERTURBED[: int(bias_id)] if factor in PALETTES}
            if protocol == "code" and "background_color" not in named_from:
                named_from["background_color"] = "object_color"
            for factor, source in named_from.items():
                colors[factor] = nearest_colors(text[source].to_numpy(), PALETTES[factor])
        tables[f"latents_text_{setting}.csv"] = caption_latents(text, stated, colors, rng)
        if omission_prob:
            omitted = omission_rng.random((size, len(stated))) < omission_prob
            tables[f"omitted_text_{setting}.csv"] = pd.DataFrame(omitted.astype(int), columns=stated)
    return tables


def main(argv=None):
    """Write the tables, all or none of them, and latents.json, what they come from; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("--output-folder", type=Path, required=True, metavar="DIR", help="folder of the data set")
    parser.add_argument("--n-points", type=integer(1), required=True, help="samples")
    parser.add_argument("--seed", type=integer(0), default=0, help="of every random number (%(default)s)")
    protocol = "background colour in the captions of perturbations 0: from the object's hue (code), its own (paper) (%(default)s)"
    parser.add_argument("--protocol", choices=("code", "paper"), default="code", help=protocol)
    omission = "probability that a caption leaves out a factor which its setting tells, each by itself (%(default)s)"
    parser.add_argument("--omission-prob", type=number(0, 1), default=0.0, help=omission)
    overwrite = "replace other latents in DIR; captions and images have to be made anew then"
    parser.add_argument("--overwrite", action="store_true", help=overwrite)
    args, _ = parser.parse(argv)
    limit_memory()
    folder, files = args.output_folder, {}
    for name, table in sample_tables(args.n_points, args.seed, args.protocol, args.omission_prob).items():
        files[folder / name] = table.to_csv(index=False, lineterminator="\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    image, omitted = folder / "latents_image.csv", [folder / f"omitted_text_{setting}.csv" for setting in CAUSAL_SETTINGS]
    differing = [file for file, content in files.items() if file.exists() and regular_file(file).read_bytes() != content]
    others = [f"{file} holds other latents" for file in differing]
    # the image's latents come to their place after the other tables: beside them no omissions are missing
    if image.exists() and any(file.exists() != (file in files) for file in omitted):
        others.append(f"{folder} holds latents {'without' if args.omission_prob else 'with'} omissions")
    if others and not args.overwrite:
        raise InputError(f"{others[0]} already; choose another folder, or --overwrite replaces them")
    origin = {name: getattr(args, name) for name in ("n_points", "seed", "protocol", "omission_prob")}
    told = folder / "latents.json"  # taken away first and there last: of tables half replaced it would say what is not so
    with contextlib.ExitStack() as stack:
        for file, content in {told: json.dumps(origin, indent=2).encode() + b"\n", **files}.items():
            stack.enter_context(replaced(file)).write_bytes(content)
        for file in [*(set(omitted) - files.keys()), *([told] if others else [])]:
            file.unlink(missing_ok=True)
    made = f"latents of {args.n_points:,} images and of their captions in {len(CAUSAL_SETTINGS)} settings"
    print(f"{folder}: {made}, seed {args.seed}, {args.protocol} protocol")
    changed = {"text": others, "images": image in differing}
    if stale := [f"{name}/" for name in changed if changed[name] and (folder / name).exists()]:
        print(f"{' and '.join(stale)} there come from the earlier latents: make them anew")
    return 0


if __name__ == "__main__":
    run_script(main)
