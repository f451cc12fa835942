"""Causal3DIdent: Figures 6 and 16 to 18."""

import functools
import itertools

from datasets import causal_bias
from grids.cells import Cell, Figure
from grids.models import BLENDER, SCALES, DataSet, ResultFile, Setting
from main_causal3dident import Causal3dIdentExperiment
from reading.causal3dident import (
    CAUSAL_BIAS_IDS,
    CAUSAL_BIAS_TYPES,
    CAUSAL_IMAGE,
    CAUSAL_TEXT,
    CAUSAL_TOOLS,
    RUNS_SPELLING,
    causal_text_factor,
)

DATA = DataSet(
    "data/Causal3DIDent/latents_image.csv",
    source=f"make the data set with generate_latents.py, generate_text.py and generate_images.py of {CAUSAL_TOOLS}",
)
STANDIN = "data/causal3dident_standin"
# 24,000 images: with 8,000 the image encoder learns those it sees by heart
STANDIN_DATA = DataSet(
    f"{STANDIN}/contact_sheet.png",
    (
        f"{CAUSAL_TOOLS}/generate_latents.py --output-folder {STANDIN} --n-points 24000 --seed 0",
        f"{CAUSAL_TOOLS}/generate_text.py --output-folder {STANDIN}",
        f"{BLENDER} {CAUSAL_TOOLS}/generate_images.py --output-folder {STANDIN} --size 64 --samples 32",
        f"{CAUSAL_TOOLS}/contact_sheet.py --output-folder {STANDIN}",
    ),
)
TINY = f"--recipe fast --datapath {STANDIN} --log-steps 250 --checkpoint-steps 500"
FLAGS = {"paper": "", "fast": "--recipe fast", "tiny": TINY}
SCORES = {
    ("linear", "r2"): "r2_linreg",
    ("nonlinear", "r2"): "r2_krreg",
    ("linear", "mcc"): "mcc_logreg",
    ("nonlinear", "mcc"): "mcc_mlp",
}
KEYS, APPLIES = ("ix", "modality", "factor_name", "factor_type"), {"continuous": "r2", "discrete": "mcc"}
SPELLING = {runs: own for own, runs in RUNS_SPELLING.items()}  # of results.csv; those of earlier versions have our own
RESULTS = ResultFile("results.csv", KEYS, tuple(SCORES.values()), APPLIES, spelling=SPELLING)
# Causes of each semantics; the hues have noise of their own besides.
CAUSES = {
    "object_color": ("object_xpos", "object_ypos"),
    "spotlight_color": ("spotlight_pos",),
    "background_color": ("spotlight_pos", "spotlight_color"),
}


def foretold(bias, name):
    """Whether the theory has a factor of an image or a caption identified, None where it says neither.

    An unbiased discrete one is. What is biased is not, if it has nothing to do with what is unbiased: the caption's own
    phrasing, the image's own rotations, causes whose effects are biased as well. Of hues, and of the position of the
    spotlight that captions state in fifths, no score is foretold where they are unbiased.
    """
    if name in {*CAUSES, *map(causal_text_factor, CAUSES)}:
        return None
    if name in bias.unbiased:
        return True if CAUSAL_IMAGE[name] else None
    return None if any(name in CAUSES.get(other, ()) for other in bias.unbiased) else False


def causal3dident_cells(figure, scale):
    """Cells of every factor of one encoding under every bias; options: "probe", "linear" or "nonlinear", and "modality".

    Columns have the number of their --bias-id, and perturbations before it the paper's, in the paper's order.
    """
    probe, modality = figure.options["probe"], figure.options["modality"]
    factors, data = CAUSAL_IMAGE if modality == "image" else CAUSAL_TEXT, STANDIN_DATA if scale == "tiny" else DATA
    for (factor, values), bias_type in itertools.product(factors.items(), CAUSAL_BIAS_TYPES):
        selection, metric = bias_type == "selections", "mcc" if values else "r2"
        for bias_id in CAUSAL_BIAS_IDS if selection else reversed(CAUSAL_BIAS_IDS):
            bias = causal_bias(bias_type, bias_id)
            if modality == "text" and factor not in [*map(causal_text_factor, bias.selected), "text_phrasing"]:
                continue
            added = (*(bias.selected[-1:] if selection else bias.perturbed[:1]), "∅")[0]
            number = f"{bias_id}" if selection else f"{len(CAUSAL_BIAS_IDS) - bias_id} (id {bias_id})"
            column = f"{number}: {'+ ' if bias_id > (0 if selection else 1) else ''}{added}"
            name, flags = f"{bias_type}_{bias_id}", f"{FLAGS[scale]} --bias-type {bias_type} --bias-id {bias_id}"
            setting = Setting(Causal3dIdentExperiment, scale, name, "main_causal3dident.py", flags, data)
            keys = {"figure": figure.number, "probe": probe, "metric": metric, "bias_type": bias_type, "bias_id": bias_id}
            keys |= {"modality": modality, "factor": RUNS_SPELLING.get(factor, factor)}
            panel = (f"{modality} encoding", f"{bias_type[:-1]} bias")
            where, score = {"modality": modality, "factor_name": factor}, SCORES[probe, metric]
            learned = foretold(bias, factor) if probe == "nonlinear" else None
            yield Cell(keys, panel, factor, column, setting, RESULTS, where, score, learned, clipped=metric == "r2")


_figure = functools.partial(
    Figure,
    experiment="causal3dident",
    make_cells=causal3dident_cells,
    paper="causal3dident.csv",
    compared=tuple(SCALES),
    standin="stand-in shapes",
)
FIGURES = (
    _figure("fig6", "nonlinear scores on Causal3DIdent, image", options={"probe": "nonlinear", "modality": "image"}),
    _figure("fig16", "nonlinear scores on Causal3DIdent, text", options={"probe": "nonlinear", "modality": "text"}),
    _figure("fig17", "linear scores on Causal3DIdent, image", options={"probe": "linear", "modality": "image"}),
    _figure("fig18", "linear scores on Causal3DIdent, text", options={"probe": "linear", "modality": "text"}),
)
