"""The numeric experiment: Figures 3, 4 and 7 to 10, Tables 4 and 5."""

import functools
import itertools

from grids.cells import Cell, Figure
from grids.models import SCALES, ResultFile, Setting, flags_of
from latent_spaces import MisalignedLatents, index_from_subset
from main_numeric import NumericExperiment

SEMANTICS = {"paper": 10, "fast": 10, "tiny": 4}
FLAGS = {
    "paper": "--mlp-eval",
    "fast": "--recipe fast --mlp-eval",
    "tiny": "--recipe fast --mlp-eval --semantics-n 4 --modality-n 2 --batch-size 256 --final-batch-size 0 "
    "--train-steps 800 --log-steps 200 --num-eval-batches 2",
}
METRICS = {"r2_linear": "linear R²", "r2_nonlinear": "nonlinear R²"}
ENCODINGS = {"hz_x": "image encoding", "hz_t": "text encoding"}
RESULTS = ResultFile("results.csv", ("encoding", "predicted_factors"), tuple(METRICS))
TASKS = ("y1", "y2", "y3", "y4")
# a tiny model's probes get a fifth of the samples
DOWNSTREAM = {"script": "eval_numeric_predict.py", "flags": {"tiny": "--num-eval-batches 1"}, "record": "downstream"}
DOWNSTREAM["recorded"] = {
    scale: {"protocol": "code", "num_eval_batches": 1 if scale == "tiny" else 5, "precision": "fp32",
            "probes": "paper" if scale == "paper" else "fast"} for scale in SCALES
}  # fmt: skip
PREDICT = ResultFile("results_predict.csv", ("task",), ("metric_scores",), rows=[{"task": task} for task in TASKS], **DOWNSTREAM)
CLASSIFY = ResultFile("results_classify.csv", (), ("iid", "ood"), rows=({},), **DOWNSTREAM)


def subset_name(size):
    """The paper's name of the first `size` semantics."""
    return {0: "{}", 1: "{1}"}.get(size, f"[{size}]")


def numeric_setting(scale, semantics, selected, perturbed=0, encoding_size=0):
    """Setting in which the text speaks of the first `selected` semantics and may state the first `perturbed` wrongly."""
    n = SEMANTICS[scale]
    name, flags = semantics[:3], f"{FLAGS[scale]} --theta-value {index_from_subset(range(selected), n)}"
    if selected < n or not perturbed:
        name += f"_select_{selected}"
    if perturbed:
        name, flags = f"{name}_perturb_{perturbed}", f"{flags} --beta-value {index_from_subset(range(perturbed), n)}"
    if encoding_size:
        name, flags = f"{name}_size_{encoding_size}", f"{flags} --encoding-size {encoding_size}"
    flags += " --causal-dependence" if semantics == "dependent" else ""
    return Setting(NumericExperiment, scale, name, "main_numeric.py", flags)


@functools.cache
def model_latents(setting, seed):
    """The MisalignedLatents of a model."""
    return MisalignedLatents.from_flags(flags_of(setting), seed)


def numeric_cells(figure, scale):
    """Cells of a figure, a column for each subset under its bias, or of a table, whose one subset has a column a factor.

    options: "bias", "selection" or "perturbation", or of a table number of semantics → (selected, perturbed, encoding size, 0:
    the right one); "metrics": columns of results.csv, or "tasks".
    """
    n, bias = SEMANTICS[scale], figure.options["bias"]
    is_table = isinstance(bias, dict)
    factors = {"m_x": "m_x", "m_t": "m_t"} | {f"s_{i}": f"s_{i + 1}" for i in range(n)}  # the paper counts from 1
    selections, perturbations = [(size, 0, 0) for size in range(1, n + 1)], [(n, size, 0) for size in range(n)]
    sizes = [bias[n]] if is_table else selections if bias == "selection" else perturbations
    combinations = itertools.product(("independent", "dependent"), sizes, figure.options["metrics"])
    for semantics, (selected, perturbed, size), metric in combinations:
        setting, side = numeric_setting(scale, semantics, selected, perturbed, size), f"{semantics} semantics"
        subset = subset_name(selected if bias == "selection" else perturbed)
        keys = {"figure": figure.number, "bias": bias, "subset": subset}
        if metric == "tasks":
            yield from task_cells(setting, {**keys, "semantics": semantics}, subset, side)
            continue
        if is_table:
            keys = {"table": figure.number, "selected": subset_name(selected), "perturbed": subset}
            keys["encoding_size"] = size or selected - perturbed
        unbiased = {f"s_{i}" for i in range(perturbed, selected)}
        for encoding, (factor, shown) in itertools.product(ENCODINGS, factors.items()):
            learned = factor in unbiased if (semantics, metric) == ("independent", "r2_nonlinear") else None
            own = {**keys, "metric": metric, "semantics": semantics, "encoding": encoding, "factor": shown}
            where = {"encoding": encoding, "predicted_factors": factor}
            in_figure = (ENCODINGS[encoding], side), shown, subset
            place = ((METRICS[metric], side), encoding, shown) if is_table else in_figure
            theory = functools.partial(theory_of, setting, factor)
            yield Cell(own, *place, setting, RESULTS, where, metric, learned, theory=theory)


def theory_of(setting, factor, seed):
    """R² of a factor in the encodings of a model that holds the unbiased block and nothing else."""
    return model_latents(setting, seed).identified_r2(factor)


def task_cells(setting, keys, subset, side):
    """Cells of the downstream tasks of one setting."""
    for task in TASKS:
        own, panel = {**keys, "metric": "r2", "task": task}, ("R² of the regressions", side)
        yield Cell(own, panel, task, subset, setting, PREDICT, {"task": task}, "metric_scores")
    for task, score in (("id", "iid"), ("ood", "ood")):
        own, panel = {**keys, "metric": "mcc", "task": task}, ("Matthews correlation of the classifier", side)
        yield Cell(own, panel, task, subset, setting, CLASSIFY, {}, score, clipped=False)


FIGURES = tuple(
    Figure(
        name, title, "numeric", numeric_cells, f"numeric_{paper}.csv", {"bias": bias, "metrics": metrics}, metrics == ["tasks"]
    )
    for name, title, paper, bias, metrics in (
        ("fig3", "nonlinear R² under selection bias", "identification", "selection", ["r2_nonlinear"]),
        ("fig4", "downstream tasks under selection bias", "downstream", "selection", ["tasks"]),
        ("fig7", "nonlinear R² under perturbation bias", "identification", "perturbation", ["r2_nonlinear"]),
        ("fig8", "linear R² under selection bias", "identification", "selection", ["r2_linear"]),
        ("fig9", "linear R² under perturbation bias", "identification", "perturbation", ["r2_linear"]),
        ("fig10", "downstream tasks under perturbation bias", "downstream", "perturbation", ["tasks"]),
        ("table4", "encoding larger than the truth", "ablations", {10: (3, 0, 5), 4: (2, 0, 3)}, METRICS),
        ("table5", "selection and perturbation bias at once", "ablations", {10: (8, 2, 0), 4: (3, 1, 0)}, METRICS),
    )
)
