"""The numeric experiment: Figures 3, 4 and 7 to 10, Tables 4 and 5."""

import itertools
import math

from grids.cells import Cell, Figure
from grids.models import SCALES, ResultFile, Setting
from main_numeric import NumericExperiment

SEMANTICS = {"paper": 10, "fast": 10, "tiny": 4}
TINY = (
    "--semantics-n 4 --modality-n 2 --batch-size 256 --final-batch-size 0 --train-steps 800 --log-steps 200 "
    "--num-eval-batches 2"
)
FLAGS = {
    "paper": ("--mlp-eval",),
    "fast": ("--recipe", "fast", "--mlp-eval"),
    "tiny": ("--recipe", "fast", "--mlp-eval", *TINY.split()),
}
METRICS = {"r2_linear": "linear R²", "r2_nonlinear": "nonlinear R²"}
ENCODINGS = {"hz_x": "image encoding", "hz_t": "text encoding"}
RESULTS = ResultFile("results.csv", ("encoding", "predicted_factors"), tuple(METRICS))
DOWNSTREAM = {
    "script": "eval_numeric_predict.py",
    # ten thousand full-batch steps are most of a tiny model's time: they get a fifth of the samples
    "flags": {"paper": (), "fast": (), "tiny": ("--num-eval-batches", "1")},
    "record": "downstream",
    "recorded": {
        scale: {"protocol": "code", "num_eval_batches": 1 if scale == "tiny" else 5, "precision": "fp32"}
        for scale in SCALES
    },
}
TASKS = ("y1", "y2", "y3", "y4")
PREDICT = ResultFile(
    "results_predict.csv", ("task",), ("metric_scores",), rows=tuple({"task": task} for task in TASKS), **DOWNSTREAM
)
CLASSIFY = ResultFile("results_classify.csv", (), ("iid", "ood"), rows=({},), **DOWNSTREAM)


def prefix(size, n):
    """Number of the subset {0 … size−1} of n semantics, −1 for the empty one."""
    return sum(math.comb(n, smaller) for smaller in range(1, size)) if size else -1


def subset_name(size):
    """The paper's name of the first `size` semantics."""
    return {0: "{}", 1: "{1}"}.get(size, f"[{size}]")


def numeric_setting(scale, semantics, selected, perturbed=0, encoding_size=0):
    """Setting in which the text speaks of the first `selected` semantics and may state the first `perturbed` wrongly."""
    n = SEMANTICS[scale]
    name, flags = semantics[:3], [*FLAGS[scale], "--theta-value", str(prefix(selected, n))]
    if selected < n or not perturbed:
        name += f"_select_{selected}"
    if perturbed:
        name += f"_perturb_{perturbed}"
        flags += ["--beta-value", str(prefix(perturbed, n))]
    if encoding_size:
        name += f"_size_{encoding_size}"
        flags += ["--encoding-size", str(encoding_size)]
    if semantics == "dependent":
        flags.append("--causal-dependence")
    return Setting(NumericExperiment, scale, name, "main_numeric.py", tuple(flags))


def numeric_cells(figure, scale):
    """Cells of a figure, a column for each subset under its bias, or of a table, whose one subset has a column a factor.

    options: "bias" of a figure, or "sizes" of a table: number of semantics → (selected, perturbed, encoding size, 0: the
    right one); "metrics": columns of results.csv, none: the downstream tasks.
    """
    n, bias, metrics = SEMANTICS[scale], figure.options.get("bias"), figure.options.get("metrics")
    biases = {
        "selection": [(size, 0, 0) for size in range(1, n + 1)],
        "perturbation": [(n, size, 0) for size in range(n)],
    }
    sizes = biases[bias] if bias else [figure.options["sizes"][n]]
    for semantics, (selected, perturbed, size), metric in itertools.product(
        ("independent", "dependent"), sizes, metrics or [None]
    ):
        setting, side = numeric_setting(scale, semantics, selected, perturbed, size), f"{semantics} semantics"
        subset = subset_name(selected if bias == "selection" else perturbed)
        if not metric:
            keys = {"figure": figure.number, "bias": bias, "subset": subset, "semantics": semantics}
            yield from task_cells(setting, keys, subset, side)
            continue
        if bias:
            keys = {"figure": figure.number, "bias": bias, "subset": subset}
        else:
            keys = {"table": figure.number, "selected": subset_name(selected), "perturbed": subset}
            keys["encoding_size"] = size or selected - perturbed
        for encoding, factor in itertools.product(ENCODINGS, ["m_x", "m_t", *range(n)]):
            # the paper counts semantics from 1, the scripts from 0
            is_semantic = isinstance(factor, int)
            shown, stored = (f"s_{factor + 1}", f"s_{factor}") if is_semantic else (factor, factor)
            foretold = semantics == "independent" and metric == "r2_nonlinear"
            learned = (is_semantic and perturbed <= factor < selected) if foretold else None
            own = {**keys, "metric": metric, "semantics": semantics, "encoding": encoding, "factor": shown}
            where = {"encoding": encoding, "predicted_factors": stored}
            place = ((ENCODINGS[encoding], side), shown, subset) if bias else ((METRICS[metric], side), encoding, shown)
            yield Cell(own, *place, setting, RESULTS, where, metric, learned)


def task_cells(setting, keys, subset, side):
    """Cells of the downstream tasks of one setting."""
    for task in TASKS:
        own, panel = {**keys, "metric": "r2", "task": task}, ("R² of the regressions", side)
        yield Cell(own, panel, task, subset, setting, PREDICT, {"task": task}, "metric_scores")
    for task, score in (("id", "iid"), ("ood", "ood")):
        own, panel = {**keys, "metric": "mcc", "task": task}, ("Matthews correlation of the classifier", side)
        yield Cell(own, panel, task, subset, setting, CLASSIFY, {}, score, clipped=False)


def _figure(name, title, paper, curves=False, **options):
    return Figure(name, title, "numeric", numeric_cells, f"numeric_{paper}.csv", curves, options)


FIGURES = (
    *(
        _figure(f"fig{number}", f"{METRICS[metric]} under {bias} bias", "identification", bias=bias, metrics=(metric,))
        for number, metric, bias in (
            (3, "r2_nonlinear", "selection"),
            (7, "r2_nonlinear", "perturbation"),
            (8, "r2_linear", "selection"),
            (9, "r2_linear", "perturbation"),
        )
    ),
    _figure("fig4", "downstream tasks under selection bias", "downstream", curves=True, bias="selection"),
    _figure("fig10", "downstream tasks under perturbation bias", "downstream", curves=True, bias="perturbation"),
    _figure(
        "table4", "encoding larger than the truth", "ablations", sizes={10: (3, 0, 5), 4: (2, 0, 3)}, metrics=METRICS
    ),
    _figure(
        "table5",
        "selection and perturbation bias at once",
        "ablations",
        sizes={10: (8, 2, 0), 4: (3, 1, 0)},
        metrics=METRICS,
    ),
)
