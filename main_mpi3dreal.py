"""Train and evaluate one pair of encoders on MPI3D-Complex: photographs and generated captions.

    python main_mpi3dreal.py --bias-type selection --bias-id 0     # captions speak of the colour alone
    python main_mpi3dreal.py --bias-type perturbation --bias-id 2  # camera and background are stated wrongly
    python main_mpi3dreal.py --bias-id 0 --encoding-size 1         # encodings of one dimension
    python main_mpi3dreal.py --recipe fast --bias-id 2             # fewer steps, at a larger learning rate
    python main_mpi3dreal.py --model-id NAME --resume              # continue a run that was stopped
    python main_mpi3dreal.py --model-id NAME --evaluate --seed 7   # probe a trained model again

--datapath is the folder of the images, with the captions of rendering_data/MPI3D/render_multimodal_mpi3d.py in it.
The model directory receives args.json, encoder_img.pt, encoder_txt.pt, checkpoint.pt, train_log.csv, results.csv, results.png.
"""

import pandas as pd

from datasets import BIAS_IDS, BIAS_TYPES, MPI3D_GRID, MPI3D_MEAN, MPI3D_STD, load_mpi3d
from image_text import MODALITIES, Experiment, image_text_recipes, make_parser, names_of, run_experiment
from running.command_line import run_script
from running.pictures import plot_factor_scores
from running.training import apply_recipe  # noqa: F401  (with parse_flags and RECIPES what reproduce.py asks of a script)

RECIPES = image_text_recipes(paper_steps=200_001, text_lr_factor=0.1)
SMALLEST_ENCODING = 3  # dimensions, where fewer semantics are unbiased


def parse_flags(argv):
    """(args, given) of the command line; the recipe's values are not filled in yet."""
    smallest = f"number of unbiased semantics, at least {SMALLEST_ENCODING}"
    parser = make_parser(__doc__, RECIPES, "data/MPI3d_real_complex", smallest)
    group = parser.add_argument_group("setting: what the caption says of the image")
    group.add_argument(
        "--bias-type", choices=BIAS_TYPES, default="selection",
        help="captions leave factors out, or state them wrongly (%(default)s)")  # fmt: skip
    group.add_argument(
        "--bias-id", type=int, default=0,
        help="selection: 0 colour alone, + 1 shape, + 2 size, + 3 camera, + 4 background; perturbation: the number of "
        "factors stated wrongly, of background, camera, size, shape (%(default)s)")  # fmt: skip
    return parser.parse(argv)


def verdict(results, setting):
    """One sentence: whether exactly the unbiased factors were learned."""
    inside = results.factor_name.isin(setting.unbiased)
    lowest, highest = results[inside].mcc_mlp.min(), max(results[~inside].mcc_mlp.max(), 0)
    found = f"{names_of(setting.unbiased)} has nonlinear MCC of at least {lowest:.2f}, everything else at most {highest:.2f}"
    if lowest >= 0.9 and highest <= 0.1:
        return f"Exactly the unbiased block is learned: {found}."
    return f"Not (yet) the pattern of the theory: {found}."


def show_results(results, setting, args, path):
    """Print the table and the verdict, and draw results.png."""
    tables = {}
    for score, title in (("mcc_logreg", "linear"), ("mcc_mlp", "nonlinear")):
        table = results.pivot(index="modality", columns="factor_name", values=score)
        tables[f"{title} MCC"] = table[list(MPI3D_GRID)].loc[list(MODALITIES)]
    printed = pd.concat({title: scores.T for title, scores in tables.items()}, axis=1)
    printed.index = [f"{name} *" if name in setting.unbiased else name for name in printed.index]
    printed.columns.names = [None, None]
    print(printed.clip(lower=0).round(3).to_string(), "(* unbiased)", sep="\n")
    plot_factor_scores(tables, path, f"{args.bias_type} bias, setting {args.bias_id}", set(setting.unbiased))
    print(verdict(results, setting))


EXPERIMENT = Experiment(
    name="mpi3d",
    recipes=RECIPES,
    bias_ids=BIAS_IDS,
    load=load_mpi3d,
    mean=MPI3D_MEAN,
    std=MPI3D_STD,
    encoding_size=lambda unbiased: max(SMALLEST_ENCODING, unbiased),
    perturbing="each with probability 0.9",
    own_text_factors=False,
    columns={
        "ix": "ix",
        "modality": "modality",
        "semantic_name": "factor_name",
        "mcc_logreg": "mcc_logreg",
        "mcc_mlp": "mcc_mlp",
    },
    show=show_results,
)


def main(argv=None):
    """Train and evaluate, or with --evaluate evaluate again; returns the exit code."""
    return run_experiment(EXPERIMENT, parse_flags, argv)


if __name__ == "__main__":
    run_script(main)
