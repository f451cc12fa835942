"""What the paper's tables and figures are made of: their cells, the settings behind them, and the models on disk.

A Figure is a list of Cells; a Cell is one number of a result file of one Setting; a Model is a Setting and a seed, with its
directory, what it lacks and the commands that make that. A new experiment adds its grid here and nothing elsewhere.
"""

import dataclasses
import functools
import importlib
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path

from datasets import BIAS_IDS, BIAS_TYPES, MPI3D_FILE, MPI3D_GRID, MPI3D_SOURCE, causal_bias, mpi3d_bias
from reading.causal3dident import CAUSAL_BIAS_IDS, CAUSAL_BIAS_TYPES, CAUSAL_IMAGE, CAUSAL_TEXT, causal_text_factor
from running.command_line import InputError
from running.files import read_csv, read_json
from running.training import LATER_FLAGS

ROOT = Path(__file__).resolve().parents[1]
SCALES = {
    "paper": "the paper's protocol to the letter",
    "fast": "the paper's dimensions and settings, trained with the fast recipe",
    "tiny": "a smaller problem with fewer semantics, not comparable with the paper's numbers",
}
COMPARED = ("paper", "fast")  # scales whose numbers stand beside the paper's
BLENDER = ".venv-blender/bin/python"  # interpreter of the scripts that render

# --------------------------------------------------------------------------------------------------------------
# what a figure is made of


@dataclasses.dataclass(frozen=True, eq=False)
class ResultFile:
    """A CSV in a model directory, and the script with its flags at each scale that writes it there.

    record: where args.json tells how it was made, "" for the training's own; recorded: what it must say there at each scale;
    gaps: whether a score that does not apply to a row is left empty.
    """

    name: str
    columns: tuple
    script: str
    flags: dict
    record: str = ""
    recorded: dict = dataclasses.field(default_factory=dict)
    gaps: bool = False


@dataclasses.dataclass(frozen=True)
class DataSet:
    """What the models of an experiment are trained on: its last file, and the commands that make it or, without, its source.

    A command is a script and its flags; another interpreter than this one stands before them.
    """

    file: str
    commands: tuple = ()
    source: str = ""

    def missing(self):
        """Commands (lists of words) that make the data set, none if it is there; InputError if only a user can get it."""
        if Path(self.file).exists():
            return []
        if not self.commands:
            raise InputError(f"{self.file} is missing: {self.source}")
        commands = []
        for command in self.commands:
            python, script, *flags = command if command[0] == BLENDER else (sys.executable, *command)
            if not (ROOT / python).exists():
                raise InputError(
                    f"{self.file} is missing, and {python}, which renders it; `make blender` installs that"
                )
            commands.append([str(ROOT / python), str(ROOT / script), *flags])
        return commands


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, but for the seed: the flags of the experiment's training script."""

    experiment: str
    scale: str
    name: str
    script: str
    flags: tuple
    data: DataSet | None = None

    def folder(self, models):
        """Path of the folder of all models of this experiment and scale."""
        return Path(models) / (self.experiment if self.scale == "paper" else f"{self.experiment}-{self.scale}")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of a figure.

    keys: its key in the paper's CSV; panel (row, column), row and column: where it is drawn; file, where, score: the CSV,
    the values that pick its row and the column to read; learned: whether the theory has the factor identified (True) or
    absent (False), None where it says neither; clipped: to [0, 1], as R² is in the paper and a correlation is not.
    """

    keys: dict
    panel: tuple
    row: str
    column: str
    setting: Setting
    file: ResultFile
    where: dict
    score: str
    learned: bool | None = None
    clipped: bool = True

    @property
    def source(self):
        """Where the number stands, in words: what figures share is known by it."""
        return f"{self.setting.name} {' '.join(map(str, self.where.values()))}"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure or table of the paper. scripts: what makes its models; cells(scale): its Cells."""

    name: str
    title: str
    experiment: str
    scripts: tuple
    cells: Callable
    paper: str = ""  # CSV of the paper's numbers
    curves: bool = False


# --------------------------------------------------------------------------------------------------------------
# the numeric experiment

SEMANTICS = {"paper": 10, "fast": 10, "tiny": 4}
NUMERIC_FLAGS = {
    "paper": ("--mlp-eval",),
    "fast": ("--recipe", "fast", "--mlp-eval"),
    "tiny": (*("--recipe", "fast", "--mlp-eval", "--semantics-n", "4", "--modality-n", "2"),
             *("--batch-size", "256", "--final-batch-size", "0", "--train-steps", "800",
             "--log-steps", "200", "--num-eval-batches", "2")),
}  # fmt: skip
# ten thousand full-batch steps are most of a tiny model's time: they get a fifth of the samples
DOWNSTREAM_FLAGS = {"paper": (), "fast": (), "tiny": ("--num-eval-batches", "1")}
RESULTS = ResultFile("results.csv", ("encoding", "predicted_factors", "r2_linear", "r2_nonlinear"),
                     "main_numeric.py", NUMERIC_FLAGS)  # fmt: skip
DOWNSTREAM = ("eval_numeric_predict.py", DOWNSTREAM_FLAGS, "downstream", {
    scale: {"protocol": "code", "num_eval_batches": 1 if scale == "tiny" else 5} for scale in SCALES
})  # fmt: skip
PREDICT = ResultFile("results_predict.csv", ("task", "metric_scores"), *DOWNSTREAM)
CLASSIFY = ResultFile("results_classify.csv", ("iid", "ood"), *DOWNSTREAM)
METRICS = {"r2_linear": "linear R²", "r2_nonlinear": "nonlinear R²"}
ENCODINGS = {"hz_x": "image encoding", "hz_t": "text encoding"}


def prefix(size, n):
    """Number of the subset {0 … size−1} of n semantics, −1 for the empty one."""
    return sum(math.comb(n, smaller) for smaller in range(1, size)) if size else -1


def subset_name(size):
    """The paper's name of the first `size` semantics."""
    return {0: "{}", 1: "{1}"}.get(size, f"[{size}]")


def numeric_setting(scale, semantics, selected, perturbed=0, encoding_size=0):
    """Setting in which the text speaks of the first `selected` semantics and may state the first `perturbed` wrongly."""
    n = SEMANTICS[scale]
    name, flags = semantics[:3], [*NUMERIC_FLAGS[scale], "--theta-value", str(prefix(selected, n))]
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
    return Setting("numeric", scale, name, "main_numeric.py", tuple(flags))


def biases(scale, bias):
    """(selected, perturbed) of each setting of a figure about "selection" or "perturbation"."""
    n = SEMANTICS[scale]
    return [(size, 0) for size in range(1, n + 1)] if bias == "selection" else [(n, size) for size in range(n)]


def factor_cells(scale, setting, semantics, metric, selected, perturbed, place):
    """Cells of both encodings and all factors of one setting; place(encoding, factor): keys, panel, row, column."""
    n = SEMANTICS[scale]
    for encoding, factor in itertools.product(ENCODINGS, ["m_x", "m_t", *range(n)]):
        # the paper counts semantics from 1, the scripts from 0
        shown, stored = (factor, factor) if isinstance(factor, str) else (f"s_{factor + 1}", f"s_{factor}")
        learned = None
        if semantics == "independent" and metric == "r2_nonlinear":
            learned = not isinstance(factor, str) and perturbed <= factor < selected
        keys, panel, row, column = place(encoding, shown)
        keys = {**keys, "metric": metric, "semantics": semantics, "encoding": encoding, "factor": shown}
        where = {"encoding": encoding, "predicted_factors": stored}
        yield Cell(keys, panel, row, column, setting, RESULTS, where, metric, learned)


def identification(figure, metric, bias):
    """cells(scale) of Figures 3, 7, 8 and 9: R² of every factor under every bias."""

    def cells(scale):
        for semantics, (selected, perturbed) in itertools.product(("independent", "dependent"), biases(scale, bias)):
            subset = subset_name(selected if bias == "selection" else perturbed)

            def place(encoding, factor, semantics=semantics, subset=subset):
                keys = {"figure": figure, "bias": bias, "subset": subset}
                return keys, (ENCODINGS[encoding], f"{semantics} semantics"), factor, subset

            setting = numeric_setting(scale, semantics, selected, perturbed)
            yield from factor_cells(scale, setting, semantics, metric, selected, perturbed, place)

    return cells


def downstream(figure, bias):
    """cells(scale) of Figures 4 and 10: scores of the downstream tasks under every bias."""

    def cells(scale):
        for semantics, (selected, perturbed) in itertools.product(("independent", "dependent"), biases(scale, bias)):
            subset = subset_name(selected if bias == "selection" else perturbed)
            setting = numeric_setting(scale, semantics, selected, perturbed)
            keys = {"figure": figure, "bias": bias, "subset": subset, "semantics": semantics}
            for task in ("y1", "y2", "y3", "y4"):
                panel = ("R² of the regressions", f"{semantics} semantics")
                yield Cell({**keys, "metric": "r2", "task": task}, panel, task, subset, setting, PREDICT,
                           {"task": task}, "metric_scores")  # fmt: skip
            for task, score in (("id", "iid"), ("ood", "ood")):
                panel = ("Matthews correlation of the classifier", f"{semantics} semantics")
                yield Cell({**keys, "metric": "mcc", "task": task}, panel, task, subset, setting, CLASSIFY,
                           {}, score, clipped=False)  # fmt: skip

    return cells


def ablation(table, selected, perturbed, encoding_size):
    """cells(scale) of Tables 4 and 5; the sizes are dicts by number of semantics, encoding_size None: the right one."""

    def cells(scale):
        n = SEMANTICS[scale]
        s, p = selected[n], perturbed[n]
        keys = {"table": table, "selected": subset_name(s), "perturbed": subset_name(p)}
        keys["encoding_size"] = encoding_size[n] if encoding_size else s - p
        for semantics, metric in itertools.product(("independent", "dependent"), METRICS):

            def place(encoding, factor, semantics=semantics, metric=metric):
                return keys, (METRICS[metric], f"{semantics} semantics"), encoding, factor

            setting = numeric_setting(scale, semantics, s, p, encoding_size[n] if encoding_size else 0)
            yield from factor_cells(scale, setting, semantics, metric, s, p, place)

    return cells


# --------------------------------------------------------------------------------------------------------------
# MPI3D-Complex

_MPI3D_REAL = "data/MPI3d_real_complex"
_CAPTIONS = "rendering_data/MPI3D/render_multimodal_mpi3d.py"
MPI3D_DATA = DataSet(
    f"{_MPI3D_REAL}/vocab_perturbation_4.json",
    source=f"put {MPI3D_FILE} of {MPI3D_SOURCE} into {_MPI3D_REAL}, and write its captions with `python {_CAPTIONS}`",
)
MPI3D_STANDIN = "data/mpi3d_standin"
# 20 × 20 positions: from fewer pairs than 5,760 the probes do not learn the places of 288 combinations of five factors
MPI3D_STANDIN_DATA = DataSet(
    f"{MPI3D_STANDIN}/vocab_perturbation_4.json",
    (("rendering_data/MPI3D/render_standin_images.py", "--output-dir", MPI3D_STANDIN, "--overwrite",
      "--grid", "4", "4", "2", "3", "3", "20", "20"),
     (_CAPTIONS, "--output-dir", MPI3D_STANDIN, "--overwrite")),
)  # fmt: skip
MPI3D_FLAGS = {"paper": (), "fast": ("--recipe", "fast"), "tiny": ("--recipe", "fast", "--datapath", MPI3D_STANDIN)}
MPI3D_RESULTS = ResultFile("results.csv", ("ix", "modality", "semantic_name", "mcc_logreg", "mcc_mlp"),
                           "main_mpi3dreal.py", MPI3D_FLAGS)  # fmt: skip
MPI3D_ENCODING_SIZES = (1, 2, 3, 4)  # of Figure 13; 3 is that of every run with fewer unbiased semantics


def mpi3d_cells(scale, bias_type, bias_id, size, metric, keys, column):
    """Cells of both encodings and all factors of one setting of MPI3D-Complex; size: of the encodings, 0 the right one."""
    flags = [*MPI3D_FLAGS[scale], "--bias-type", bias_type, "--bias-id", str(bias_id)]
    name = f"{bias_type}_{bias_id}"
    if size:
        name, flags = f"{name}_size_{size}", [*flags, "--encoding-size", str(size)]
    data = MPI3D_STANDIN_DATA if scale == "tiny" else MPI3D_DATA
    setting = Setting("mpi3d", scale, name, "main_mpi3dreal.py", tuple(flags), data)
    unbiased = mpi3d_bias(bias_type, bias_id).unbiased
    for modality, factor in itertools.product(("image", "text"), MPI3D_GRID):
        learned = factor in unbiased if metric == "mcc_mlp" and not size else None
        own = {**keys, "metric": metric, "modality": modality, "factor": factor}
        where = {"modality": modality, "semantic_name": factor}
        yield Cell(own, (f"{modality} encoding", column[0]), factor, column[1], setting, MPI3D_RESULTS, where, metric,
                   learned, clipped=False)  # fmt: skip


def mpi3d_factors(figure, metric):
    """cells(scale) of Figures 5 and 12: MCC of every factor under every bias; columns are named after what they add."""

    def cells(scale):
        for bias_type, bias_id in itertools.product(BIAS_TYPES, BIAS_IDS):
            setting = mpi3d_bias(bias_type, bias_id)
            added = setting.selected[-1:] if bias_type == "selection" else setting.perturbed[:1]
            column = (f"{bias_type} bias", f"{bias_id}: {'+ ' if bias_id else ''}{(*added, '∅')[0]}")
            keys = {"figure": figure, "bias_type": bias_type, "bias_id": bias_id}
            yield from mpi3d_cells(scale, bias_type, bias_id, 0, metric, keys, column)

    return cells


def mpi3d_encoding_sizes(figure, metric):
    """cells(scale) of Figure 13: MCC of every factor for encodings of several sizes, the colour alone selected."""

    def cells(scale):
        for size in MPI3D_ENCODING_SIZES:
            keys, column = {"figure": figure, "encoding_size": size}, ("colour selected", f"size {size}")
            yield from mpi3d_cells(scale, "selection", 0, 0 if size == 3 else size, metric, keys, column)

    return cells


# --------------------------------------------------------------------------------------------------------------
# Causal3DIdent

_CAUSAL_TOOLS = "rendering_data/Causal3DIdent"
CAUSAL_DATA = DataSet(
    "data/Causal3DIDent/latents_image.csv",
    source=f"make the data set with generate_latents.py, generate_text.py and generate_images.py of {_CAUSAL_TOOLS}",
)
CAUSAL_STANDIN = "data/causal3dident_standin"
# 24,000 images: with 8,000 the image encoder learns those it sees by heart
CAUSAL_STANDIN_DATA = DataSet(
    f"{CAUSAL_STANDIN}/contact_sheet.png",
    ((f"{_CAUSAL_TOOLS}/generate_latents.py", "--output-folder", CAUSAL_STANDIN, "--n-points", "24000", "--seed", "0"),
     (f"{_CAUSAL_TOOLS}/generate_text.py", "--output-folder", CAUSAL_STANDIN),
     (BLENDER, f"{_CAUSAL_TOOLS}/generate_images.py", "--output-folder", CAUSAL_STANDIN, "--size", "64", "--samples", "32"),
     (f"{_CAUSAL_TOOLS}/contact_sheet.py", "--output-folder", CAUSAL_STANDIN)),
)  # fmt: skip
CAUSAL_FLAGS = {
    "paper": (),
    "fast": ("--recipe", "fast"),
    "tiny": ("--recipe", "fast", "--datapath", CAUSAL_STANDIN, "--log-steps", "250", "--checkpoint-steps", "500"),
}
CAUSAL_SCORES = ("r2_linreg", "r2_krreg", "mcc_logreg", "mcc_mlp")
CAUSAL_RESULTS = ResultFile("results.csv", ("ix", "modality", "factor_name", "factor_type", *CAUSAL_SCORES),
                            "main_causal3dident.py", CAUSAL_FLAGS, gaps=True)  # fmt: skip
PAPER_SPELLING = {"spotlight_color_index": "splotlight_color_index"}  # in the tables of the paper's numbers
# Causes of each semantics; the hues have noise of their own besides.
CAUSES = {
    "object_color": ("object_xpos", "object_ypos"),
    "spotlight_color": ("spotlight_pos",),
    "background_color": ("spotlight_pos", "spotlight_color"),
}


def causal_learned(setting, name):
    """Whether the theory has a factor of an image or a caption identified, None where it says neither.

    An unbiased discrete one is. What is biased is not, if it has nothing to do with what is unbiased: the caption's own
    phrasing, the image's own rotations, causes whose effects are biased as well. Of hues, and of the position of the
    spotlight that captions state in fifths, no score is foretold where they are unbiased.
    """
    hues = {*CAUSES, *map(causal_text_factor, CAUSES)}
    if name in hues:
        return None
    if name in setting.unbiased:
        return True if CAUSAL_IMAGE[name] else None
    return None if any(name in CAUSES.get(other, ()) for other in setting.unbiased) else False


def causal_cells(figure, probe, modality):
    """cells(scale) of Figures 6 and 16 to 18: scores of every factor of one encoding under every bias.

    Columns have the number of their --bias-id, and perturbations before it the paper's, in the paper's order.
    """
    scores = {"r2": "r2_krreg", "mcc": "mcc_mlp"} if probe == "nonlinear" else {"r2": "r2_linreg", "mcc": "mcc_logreg"}
    factors = CAUSAL_IMAGE if modality == "image" else CAUSAL_TEXT

    def cells(scale):
        data = CAUSAL_STANDIN_DATA if scale == "tiny" else CAUSAL_DATA
        for (factor, values), bias_type in itertools.product(factors.items(), CAUSAL_BIAS_TYPES):
            selection = bias_type == "selections"
            for bias_id in CAUSAL_BIAS_IDS if selection else reversed(CAUSAL_BIAS_IDS):
                bias = causal_bias(bias_type, bias_id)
                stated = [*map(causal_text_factor, bias.selected), "text_phrasing"]
                if modality == "text" and factor not in stated:
                    continue
                added = (*(bias.selected[-1:] if selection else bias.perturbed[:1]), "∅")[0]
                number = f"{bias_id}" if selection else f"{len(CAUSAL_BIAS_IDS) - bias_id} (id {bias_id})"
                column = f"{number}: {'+ ' if bias_id > (0 if selection else 1) else ''}{added}"
                flags = (*CAUSAL_FLAGS[scale], "--bias-type", bias_type, "--bias-id", str(bias_id))
                setting = Setting(
                    "causal3dident", scale, f"{bias_type}_{bias_id}", "main_causal3dident.py", flags, data
                )
                metric = "mcc" if values else "r2"
                keys = {"figure": figure, "probe": probe, "metric": metric, "bias_type": bias_type, "bias_id": bias_id,
                        "modality": modality, "factor": PAPER_SPELLING.get(factor, factor)}  # fmt: skip
                learned = causal_learned(bias, factor) if probe == "nonlinear" else None
                yield Cell(keys, (f"{modality} encoding", f"{bias_type[:-1]} bias"), factor, column, setting,
                           CAUSAL_RESULTS, {"modality": modality, "factor_name": factor}, scores[metric], learned,
                           clipped=metric == "r2")  # fmt: skip

    return cells


# --------------------------------------------------------------------------------------------------------------
# all figures; a new experiment adds its grid here and nothing elsewhere

_IDENTIFICATION, _DOWNSTREAM = ("main_numeric.py",), ("main_numeric.py", "eval_numeric_predict.py")
_NUMERIC, _MPI3D, _CAUSAL = "numeric_identification.csv", "mpi3d.csv", "causal3dident.csv"
FIGURES = {
    figure.name: figure
    for figure in (
        Figure("fig3", "nonlinear R² under selection bias", "numeric", _IDENTIFICATION, paper=_NUMERIC,
               cells=identification(3, "r2_nonlinear", "selection")),
        Figure("fig4", "downstream tasks under selection bias", "numeric", _DOWNSTREAM, paper="numeric_downstream.csv",
               curves=True, cells=downstream(4, "selection")),
        Figure("fig5", "nonlinear MCC on MPI3D-Complex", "mpi3d", ("main_mpi3dreal.py",), paper=_MPI3D,
               cells=mpi3d_factors(5, "mcc_mlp")),
        Figure("fig6", "nonlinear scores on Causal3DIdent, image", "causal3dident", ("main_causal3dident.py",), paper=_CAUSAL,
               cells=causal_cells(6, "nonlinear", "image")),
        Figure("fig7", "nonlinear R² under perturbation bias", "numeric", _IDENTIFICATION, paper=_NUMERIC,
               cells=identification(7, "r2_nonlinear", "perturbation")),
        Figure("fig8", "linear R² under selection bias", "numeric", _IDENTIFICATION, paper=_NUMERIC,
               cells=identification(8, "r2_linear", "selection")),
        Figure("fig9", "linear R² under perturbation bias", "numeric", _IDENTIFICATION, paper=_NUMERIC,
               cells=identification(9, "r2_linear", "perturbation")),
        Figure("fig10", "downstream tasks under perturbation bias", "numeric", _DOWNSTREAM, paper="numeric_downstream.csv",
               curves=True, cells=downstream(10, "perturbation")),
        Figure("fig12", "linear MCC on MPI3D-Complex", "mpi3d", ("main_mpi3dreal.py",), paper=_MPI3D,
               cells=mpi3d_factors(12, "mcc_logreg")),
        Figure("fig13", "encoding sizes on MPI3D-Complex", "mpi3d", ("main_mpi3dreal.py",),
               cells=mpi3d_encoding_sizes(13, "mcc_mlp")),
        *(Figure(f"fig{number}", f"{probe} scores on Causal3DIdent, {modality}", "causal3dident",
                 ("main_causal3dident.py",), paper=_CAUSAL, cells=causal_cells(number, probe, modality))
          for number, probe, modality in ((16, "nonlinear", "text"), (17, "linear", "image"), (18, "linear", "text"))),
        Figure("table4", "encoding larger than the truth", "numeric", _IDENTIFICATION, paper="numeric_ablations.csv",
               cells=ablation(4, {10: 3, 4: 2}, {10: 0, 4: 0}, {10: 5, 4: 3})),
        Figure("table5", "selection and perturbation bias at once", "numeric", _IDENTIFICATION, paper="numeric_ablations.csv",
               cells=ablation(5, {10: 8, 4: 3}, {10: 2, 4: 1}, None)),
    )
}  # fmt: skip
GROUPS = {"all": list(FIGURES)} | {
    name: [figure.name for figure in FIGURES.values() if figure.experiment == name]
    for name in ("numeric", "mpi3d", "causal3dident")
}


def chosen_figures(names):
    """Figures of the names and groups given, each once; InputError for an unknown name."""
    chosen = {}
    for name in names:
        if name not in FIGURES and name not in GROUPS:
            raise InputError(f"{name!r} is no figure; expected one of {', '.join([*FIGURES, *GROUPS])}")
        chosen |= {member: FIGURES[member] for member in GROUPS.get(name, [name])}
    return list(chosen.values())


# --------------------------------------------------------------------------------------------------------------
# models on disk


@dataclasses.dataclass(frozen=True)
class Model:
    """A setting and a seed, with its place under `models`."""

    setting: Setting
    seed: int
    models: Path

    @property
    def name(self):
        """Name of the model directory."""
        return f"{self.setting.name}_seed{self.seed}"

    @property
    def directory(self):
        """Path of the model directory."""
        return self.setting.folder(self.models) / self.name

    def log(self, suffix=".log"):
        """Path of the log, or of another file that goes with the model's jobs."""
        return Path(self.models) / "logs" / self.setting.folder("").name / f"{self.name}{suffix}"

    def stored(self):
        """Dict of args.json, {} if there is none; InputError if it is damaged or of another setting, recipe or scale."""
        file = self.directory / "args.json"
        if not file.exists():
            return {}
        stored = LATER_FLAGS | read_json(file)
        for name, value in (expected_args(self.setting) | {"seed": self.seed}).items():
            if name not in stored:
                raise InputError(f"{file} has no {name!r}: it is damaged, or another script's; move the model away")
            if stored[name] != value:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{file} has {flag} {stored[name]}, but {self.name} at {self.setting.scale} scale has "
                                 f"{value}; move the model away, or name another folder with --models")  # fmt: skip
        return stored

    def missing(self, files):
        """Those of `files` that this model does not have yet; InputError that names a damaged one."""
        if not self.stored().get("finished"):
            return list(files)
        for file in files:
            if (self.directory / file.name).exists():
                self.read(file)
        return [file for file in files if not (self.directory / file.name).exists()]

    def read(self, file):
        """DataFrame of a ResultFile of this model; InputError that names it if it is missing, damaged or made otherwise."""
        if file.record:
            record = self.stored().get(file.record, {})
            for name, value in file.recorded[self.setting.scale].items():
                if record.get(name) != value:
                    raise InputError(f"{self.directory / file.name} was made with {name} {record.get(name)}, and the "
                                     f"{self.setting.scale} scale has {value}; remove it and `run` makes it again")  # fmt: skip
        return read_csv(self.directory / file.name, file.columns, file.gaps)

    def commands(self, files):
        """Commands that make `files`: lists of words, the training first, each script once."""
        commands = {}
        train = ["--model-dir", str(self.directory.parent), "--model-id", self.name, "--seed", str(self.seed)]
        if not self.stored().get("finished"):
            commands[self.setting.script] = [*self.setting.flags, *train, "--resume"]
        for file in files:
            if file.script != self.setting.script:
                flags = file.flags[self.setting.scale]
                commands[file.script] = ["--model-id", str(self.directory), *flags, "--overwrite"]
            elif self.setting.script not in commands:  # trained, but the file is gone
                commands[self.setting.script] = [*train[:4], "--seed", str(self.seed + 1), "--evaluate"]
        return [[sys.executable, str(ROOT / script), *flags] for script, flags in commands.items()]


@functools.cache
def expected_args(setting):
    """Dict of what args.json of a model of this setting holds: every flag that says what is trained, and its value.

    How many processes read the data and when checkpoints are written is free: no result depends on it.
    """
    script = importlib.import_module(Path(setting.script).stem)
    args, given = script.parse_flags(list(setting.flags))
    script.apply_recipe(args, given, script.RECIPES)
    own = {"seed", "workers", "checkpoint_steps", "save_all_checkpoints"}
    free = importlib.import_module("running.training").RUN_FLAGS | own
    return {name: value for name, value in vars(args).items() if name not in free and value != "auto"}


def needed_models(figures, scale, seeds, models):
    """Dict Model → list of ResultFiles: all that the figures need, each model once."""
    needed = {}
    for cell in itertools.chain.from_iterable(figure.cells(scale) for figure in figures):
        for seed in range(1, seeds + 1):
            files = needed.setdefault(Model(cell.setting, seed, Path(models)), [])
            if cell.file not in files:
                files.append(cell.file)
    return needed
