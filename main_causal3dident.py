"""Train and evaluate one pair of encoders on Causal3DIdent: rendered scenes and generated captions.

    python main_causal3dident.py --bias-type selections --bias-id 0     # captions speak of the shape alone
    python main_causal3dident.py --bias-type perturbations --bias-id 2  # colours of background and spotlight are stated wrongly
    python main_causal3dident.py --recipe fast --bias-id 2              # fewer steps, at a larger learning rate
    python main_causal3dident.py --model-id NAME --resume               # continue a run that was stopped
    python main_causal3dident.py --model-id NAME --evaluate --seed 7    # probe a trained model again

--datapath is the folder that the scripts in rendering_data/Causal3DIdent make; its images are decoded once, into a file
beside them. The paper numbers the perturbations the other way round: its setting k is --bias-id 7 − k.
The model directory receives args.json, encoder_img.pt, encoder_txt.pt, checkpoint.pt, train_log.csv, results.csv, results.png.
"""

import pandas as pd

from datasets import CAUSAL_MEAN, CAUSAL_STD, load_causal3dident
from image_text import MODALITIES, SCORES, Experiment, image_text_recipes, make_parser, names_of, run_experiment
from reading.causal3dident import CAUSAL_BIAS_IDS, CAUSAL_BIAS_TYPES, causal_text_factor
from running.command_line import run_script
from running.pictures import plot_factor_scores
from running.training import apply_recipe  # noqa: F401  (with parse_flags and RECIPES what reproduce.py asks of a script)

RECIPES = image_text_recipes(paper_steps=100_001, optimiser="muon", spare_dimensions=25, first_batch_size=128)
ENCODING_SIZES = (3, 3, 4, 5, 5, 6, 7)  # dimensions for 1 … 7 unbiased semantics
ROTATIONS = (
    "object_alpharot",
    "object_betarot",
    "object_gammarot",
)  # no caption speaks of them, nothing depends on them


def parse_flags(argv):
    """(args, given) of the command line; the recipe's values are not filled in yet."""
    smallest = f"{', '.join(map(str, ENCODING_SIZES))} for 1 … {len(ENCODING_SIZES)} unbiased semantics"
    parser = make_parser(__doc__, RECIPES, "data/Causal3DIDent", smallest)
    group = parser.add_argument_group("setting: what the caption says of the image")
    group.add_argument(
        "--bias-type", choices=CAUSAL_BIAS_TYPES, default="selections",
        help="captions leave factors out, or state them wrongly (%(default)s)")  # fmt: skip
    group.add_argument(
        "--bias-id", type=int, default=0,
        help="selections: 0 shape alone, + 1 xpos, + 2 ypos, + 3 spotlight_pos, colours of + 4 object, + 5 spotlight, "
        "+ 6 background; perturbations: the number of factors stated wrongly, from the background's colour back to xpos "
        "(%(default)s)")  # fmt: skip
    return parser.parse(argv)


def unbiased_names(setting):
    """Set of the names of the unbiased semantics, as image and as text factors."""
    return {*setting.unbiased, *map(causal_text_factor, setting.unbiased)}


def score_tables(results):
    """Dict title → DataFrame (linear, nonlinear × factors) of both encodings: R² of continuous factors, MCC of discrete ones."""
    scores = pd.DataFrame({"linear": results[SCORES[0]].fillna(results[SCORES[2]]),
                           "nonlinear": results[SCORES[1]].fillna(results[SCORES[3]])})  # fmt: skip
    tables = {}
    for modality in MODALITIES:
        own = results.modality == modality
        tables[f"{modality} encoding"] = scores[own].set_axis(results.factor_name[own]).T
    return tables


def verdict(results, setting):
    """One sentence: which unbiased discrete factors of the image are found, and whether its rotations stay out."""
    image = results[results.modality == "image"].set_index("factor_name")
    unbiased = [name for name in setting.unbiased if image.factor_type.get(name) == "discrete"]
    found = [name for name in unbiased if image.mcc_mlp[name] >= 0.8]
    missed = [name for name in unbiased if name not in found]
    lowest = image.mcc_mlp[found or unbiased].min()
    highest = max(image.r2_krreg[list(ROTATIONS)].max(), 0)
    scores = f"nonlinear MCC of at least {lowest:.2f} in the image encoding, the rotations R² of at most {highest:.2f}"
    if not found or highest > 0.1:
        return f"Not (yet) the pattern of the theory: {names_of(unbiased)} has {scores}."
    what, rest = "What is unbiased", ""
    if missed:
        what = "Part of what is unbiased"
        rest = f"; not (yet) {names_of(missed)}, with at most {image.mcc_mlp[missed].max():.2f}"
    return f"{what} is found, and what is the image's own is not: {names_of(found)} has {scores}{rest}."


def show_results(results, setting, args, path):
    """Print the tables and the verdict, and draw results.png."""
    tables, unbiased = score_tables(results), unbiased_names(setting)
    for title, scores in tables.items():
        types = results.set_index(["modality", "factor_name"]).factor_type[title.split()[0]]
        printed = scores.T.clip(lower=0).round(3)
        printed.insert(0, "score", types.map({"continuous": "R²", "discrete": "MCC"}))
        printed.index = [f"{name} *" if name in unbiased else name for name in printed.index]
        print(title, printed.to_string(), sep="\n")
    print("(* unbiased)")
    title = f"{args.bias_type}, setting {args.bias_id}: R² of continuous factors, MCC of discrete ones"
    plot_factor_scores(tables, path, title, unbiased)
    print(verdict(results, setting))


EXPERIMENT = Experiment(
    name="causal3dident",
    recipes=RECIPES,
    bias_ids=CAUSAL_BIAS_IDS,
    load=load_causal3dident,
    mean=CAUSAL_MEAN,
    std=CAUSAL_STD,
    encoding_size=lambda unbiased: ENCODING_SIZES[unbiased - 1],
    perturbing="drawn anew for the caption",
    own_text_factors=True,
    columns={name: name for name in ("ix", "modality", "factor_name", "factor_type", *SCORES)},
    show=show_results,
)


def main(argv=None):
    """Train and evaluate, or with --evaluate evaluate again; returns the exit code."""
    return run_experiment(EXPERIMENT, parse_flags, argv)


if __name__ == "__main__":
    run_script(main)
