"""MPI3D-Complex: Figures 5, 12 and 13."""

import functools
import itertools

from datasets import BIAS_IDS, BIAS_TYPES, MPI3D_FILE, MPI3D_GRID, MPI3D_SOURCE, mpi3d_bias
from grids.cells import Cell, Figure
from grids.models import SCALES, DataSet, ResultFile, Setting
from main_mpi3dreal import SMALLEST_ENCODING, Mpi3dExperiment

FOLDER, STANDIN = "data/MPI3d_real_complex", "data/mpi3d_standin"
CAPTIONS = "rendering_data/MPI3D/render_multimodal_mpi3d.py"
DATA = DataSet(
    f"{FOLDER}/vocab_perturbation_4.json",
    source=f"put {MPI3D_FILE} of {MPI3D_SOURCE} into {FOLDER}, and write its captions with `python {CAPTIONS}`",
)
# 20 × 20 positions: from fewer pairs than 5,760 the probes do not learn the places of 288 combinations of five factors
STANDIN_DATA = DataSet(
    f"{STANDIN}/vocab_perturbation_4.json",
    (
        f"rendering_data/MPI3D/render_standin_images.py --output-dir {STANDIN} --overwrite --grid 4 4 2 3 3 20 20",
        f"{CAPTIONS} --output-dir {STANDIN} --overwrite",
    ),
)
FLAGS = {"paper": "", "fast": "--recipe fast", "tiny": f"--recipe fast --datapath {STANDIN}"}
RESULTS = ResultFile("results.csv", ("ix", "modality", "semantic_name"), ("mcc_logreg", "mcc_mlp"))


def mpi3d_cells(figure, scale):
    """Cells of every factor under every bias, or for encodings of several sizes, the colour alone selected.

    options: "metric", the column of results.csv; "sizes" of the encodings. Columns are named after what a bias adds.
    """
    metric, sizes = figure.options["metric"], figure.options.get("sizes")
    biases = itertools.product(BIAS_TYPES, BIAS_IDS, [SMALLEST_ENCODING])
    for bias_type, bias_id, size in [("selection", 0, size) for size in sizes] if sizes else biases:
        bias = mpi3d_bias(bias_type, bias_id)
        if sizes:
            keys, side, column = {"encoding_size": size}, "colour selected", f"size {size}"
        else:
            added = (*(bias.selected[-1:] if bias_type == "selection" else bias.perturbed[:1]), "∅")[0]
            keys, side = {"bias_type": bias_type, "bias_id": bias_id}, f"{bias_type} bias"
            column = f"{bias_id}: {'+ ' if bias_id else ''}{added}"
        name, flags = f"{bias_type}_{bias_id}", f"{FLAGS[scale]} --bias-type {bias_type} --bias-id {bias_id}"
        if size != SMALLEST_ENCODING:
            name, flags = f"{name}_size_{size}", f"{flags} --encoding-size {size}"
        data = STANDIN_DATA if scale == "tiny" else DATA
        setting = Setting(Mpi3dExperiment, scale, name, "main_mpi3dreal.py", flags, data)
        for modality, factor in itertools.product(("image", "text"), MPI3D_GRID):
            learned = factor in bias.unbiased if metric == "mcc_mlp" and size == SMALLEST_ENCODING else None
            own = {"figure": figure.number, **keys, "metric": metric, "modality": modality, "factor": factor}
            where, panel = {"modality": modality, "semantic_name": factor}, (f"{modality} encoding", side)
            yield Cell(own, panel, factor, column, setting, RESULTS, where, metric, learned, clipped=False)


_figure = functools.partial(Figure, experiment="mpi3d", make_cells=mpi3d_cells, standin="drawings in its place")
FIGURES = (
    _figure("fig5", "nonlinear MCC on MPI3D-Complex", paper="mpi3d.csv", compared=tuple(SCALES), options={"metric": "mcc_mlp"}),
    _figure("fig12", "linear MCC on MPI3D-Complex", paper="mpi3d.csv", compared=tuple(SCALES), options={"metric": "mcc_logreg"}),
    _figure("fig13", "encoding sizes on MPI3D-Complex", options={"metric": "mcc_mlp", "sizes": (1, 2, 3, 4)}),
)
