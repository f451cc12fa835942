"""Reproduce the paper's tables and figures: list them, train what they need here or on a SLURM cluster, report.

    python reproduce.py list                                  # every figure: how many models it needs, how many are done
    python reproduce.py list fig3 --scale fast                # its models, one by one
    python reproduce.py run fig3 fig4 table5 --dry-run        # the commands, nothing else
    python reproduce.py run numeric --scale tiny --jobs 2     # train and evaluate what is missing, two models at a time
    python reproduce.py run all --cluster slurm --partition gpu --time 720 --jobs 16
    python reproduce.py report                                # report/index.html from whatever models there are

Scales: paper is the paper's protocol to the letter; fast the paper's dimensions and settings with the fast recipe; tiny
a smaller problem, whose numbers are not those of the paper. Each has folders of its own, and no table mixes them.

A model is a setting and a seed, and its folder is named after them: models/numeric/ind_select_3_seed1 has independent
semantics of which the text speaks of three; models/numeric-tiny/dep_perturb_2_seed3 dependent ones, two of them perturbed.
A run that was killed or failed goes on with the same command; what is finished is not touched. Logs lie in models/logs/.
"""

import base64
import contextlib
import dataclasses
import fcntl
import functools
import html
import importlib
import itertools
import math
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import cloudpickle
import pandas as pd
import submitit

from command_line import InputError, Parser, integer, number, run_script
from figures import plot_beside_paper, plot_score_curves, plot_score_grid
from files import read_csv, read_json, write_bytes, write_csv

ROOT = Path(__file__).resolve().parent
SCALES = {
    "paper": "the paper's protocol to the letter",
    "fast": "the paper's dimensions and settings, trained with the fast recipe",
    "tiny": "a smaller problem with fewer semantics, not comparable with the paper's numbers",
}
COMPARED = ("paper", "fast")  # scales whose numbers stand beside the paper's

# --------------------------------------------------------------------------------------------------------------
# what a figure is made of


@dataclasses.dataclass(frozen=True, eq=False)
class ResultFile:
    """A CSV in a model directory, and the script with its flags at each scale that writes it there.

    record: where args.json tells how it was made, "" for the training's own; recorded: what it must say there at each scale.
    """

    name: str
    columns: tuple
    script: str
    flags: dict
    record: str = ""
    recorded: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, but for the seed: the flags of the experiment's training script."""

    experiment: str
    scale: str
    name: str
    script: str
    flags: tuple

    def folder(self, models):
        """Path of the folder of all models of this experiment and scale."""
        return Path(models) / (self.experiment if self.scale == "paper" else f"{self.experiment}-{self.scale}")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of a figure.

    keys: its key in the paper's CSV; panel (row, column), row and column: where it is drawn; file, where, score: the CSV,
    the values that pick its row and the column to read; learned: whether the theory has the factor identified (True) or
    absent (False), None where it says neither; unit: R² is clipped to [0, 1] as in the paper, a correlation is not.
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


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure or table of the paper. cells(scale): its Cells; None: nobody has written them down yet."""

    name: str
    title: str
    experiment: str
    scripts: tuple
    paper: str = ""  # CSV of the paper's numbers
    curves: bool = False
    cells: Callable | None = None

    def missing(self):
        """What keeps this figure from being made, in words; empty if nothing does."""
        if absent := [script for script in self.scripts if not (ROOT / script).exists()]:
            return f"needs {' and '.join(absent)}"
        return "" if self.cells else "its grid is not written down in reproduce.py"


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
# all figures; a new experiment adds its grid here and nothing elsewhere

_IDENTIFICATION, _DOWNSTREAM = ("main_numeric.py",), ("main_numeric.py", "eval_numeric_predict.py")
_NUMERIC, _MPI3D, _CAUSAL = "numeric_identification.csv", "mpi3d.csv", "causal3dident.csv"
FIGURES = {
    figure.name: figure
    for figure in (
        Figure("fig3", "nonlinear R² under selection bias", "numeric", _IDENTIFICATION, _NUMERIC,
               cells=identification(3, "r2_nonlinear", "selection")),
        Figure("fig4", "downstream tasks under selection bias", "numeric", _DOWNSTREAM, "numeric_downstream.csv",
               curves=True, cells=downstream(4, "selection")),
        Figure("fig5", "nonlinear MCC on MPI3D-Complex", "mpi3d", ("main_mpi3dreal.py",), _MPI3D),
        Figure("fig6", "nonlinear scores on Causal3DIdent", "causal3dident", ("main_causal3dident.py",), _CAUSAL),
        Figure("fig7", "nonlinear R² under perturbation bias", "numeric", _IDENTIFICATION, _NUMERIC,
               cells=identification(7, "r2_nonlinear", "perturbation")),
        Figure("fig8", "linear R² under selection bias", "numeric", _IDENTIFICATION, _NUMERIC,
               cells=identification(8, "r2_linear", "selection")),
        Figure("fig9", "linear R² under perturbation bias", "numeric", _IDENTIFICATION, _NUMERIC,
               cells=identification(9, "r2_linear", "perturbation")),
        Figure("fig10", "downstream tasks under perturbation bias", "numeric", _DOWNSTREAM, "numeric_downstream.csv",
               curves=True, cells=downstream(10, "perturbation")),
        Figure("fig12", "linear MCC on MPI3D-Complex", "mpi3d", ("main_mpi3dreal.py",), _MPI3D),
        Figure("fig13", "encoding sizes on MPI3D-Complex", "mpi3d", ("main_mpi3dreal.py",)),
        *(Figure(f"fig{number}", f"{probe} scores on Causal3DIdent, image and text", "causal3dident",
                 ("main_causal3dident.py",), _CAUSAL)
          for number, probe in ((16, "nonlinear"), (17, "linear"), (18, "linear"))),
        Figure("table4", "encoding larger than the truth", "numeric", _IDENTIFICATION, "numeric_ablations.csv",
               cells=ablation(4, {10: 3, 4: 2}, {10: 0, 4: 0}, {10: 5, 4: 3})),
        Figure("table5", "selection and perturbation bias at once", "numeric", _IDENTIFICATION, "numeric_ablations.csv",
               cells=ablation(5, {10: 8, 4: 3}, {10: 2, 4: 1}, None)),
    )
}  # fmt: skip
GROUPS = {"all": list(FIGURES)} | {
    name: [figure.name for figure in FIGURES.values() if figure.experiment == name]
    for name in ("numeric", "mpi3d", "causal3dident")
}


def chosen_figures(names):
    """Figures of the names and groups given, those that can be made; InputError for an unknown or unavailable one."""
    chosen = {}
    for name in names:
        if name not in FIGURES and name not in GROUPS:
            raise InputError(f"{name!r} is no figure; expected one of {', '.join([*FIGURES, *GROUPS])}")
        for member in GROUPS.get(name, [name]):
            reason = FIGURES[member].missing()
            if not reason:
                chosen[member] = FIGURES[member]
            elif member == name:
                raise InputError(f"{name} cannot be made yet: it {reason}")
    if not chosen:
        raise InputError(f"nothing of {' '.join(names)} can be made yet; `python reproduce.py list` says why")
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
        stored = read_json(file)
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
        return read_csv(self.directory / file.name, file.columns)

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
    """Dict of what args.json of a model of this setting holds: every flag that says what is trained, and its value."""
    script = importlib.import_module(Path(setting.script).stem)
    args, given = script.parse_flags(list(setting.flags))
    script.apply_recipe(args, given, script.RECIPES)
    free = importlib.import_module("training").RUN_FLAGS | {"seed"}
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


# --------------------------------------------------------------------------------------------------------------
# jobs


class ModelJob:
    """What submitit runs: the commands of one model, one after another; returns the first exit code that is not 0.

    The commands are children of the job, because submitit's own handlers stand in the job's process and may interrupt
    any line of Python there. A child gets SIGTERM alone, writes its checkpoint and ends; --resume goes on from there.
    """

    def __init__(self, commands, log, lock, environment):
        self.commands, self.log, self.lock, self.environment = commands, log, lock, environment
        self.child, self.stopped, self.told = None, False, False

    def __call__(self):
        signal.signal(signal.SIGTERM, self.stop)
        with open(self.lock, "a") as lock, open(self.log, "a") as log:
            # An earlier job, whose submitter was killed, may still train this model: wait, then find the work done.
            while not self.stopped:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(1)
            for command in self.commands:
                code = 128 + signal.SIGTERM if self.stopped else self.run(command, log, lock)
                if code:
                    if self.stopped and on_slurm():
                        # SLURM tells SIGTERM first, and submitit's signal or SIGKILL later: who ends is not requeued
                        time.sleep(90)
                    return code
        return 0

    def run(self, command, log, lock):
        """Run one command to its end; returns its exit code."""
        print("$", shlex.join(command), file=log, flush=True)
        self.told = False
        # The lock is handed down, so that a child that outlives its job still holds it.
        self.child = subprocess.Popen(command, env=os.environ | self.environment, stdin=subprocess.DEVNULL, stdout=log,
                                      stderr=log, start_new_session=True, pass_fds=(lock.fileno(),),
                                      preexec_fn=self.set_signals)  # fmt: skip
        while self.child.poll() is None:
            if self.stopped:
                self.tell()
            time.sleep(0.1)
        return self.child.returncode

    @staticmethod
    def set_signals():
        """Signals of a child: what is ignored or blocked is inherited through exec, and SLURM may signal every process."""
        # The training's handler gives the signal back as it was: a second SIGTERM shall not cut its checkpoint short.
        signal.signal(signal.SIGTERM, signal.SIG_IGN if on_slurm() else signal.SIG_DFL)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})

    def stop(self, *_):
        """Handler of SIGTERM: let run() tell the child, whichever line it is at."""
        self.stopped = True

    def tell(self):
        """Send the child SIGTERM, once: it writes its checkpoint and ends."""
        if not self.told:
            self.told = True
            os.kill(self.child.pid, signal.SIGTERM)

    def checkpoint(self):
        """The job to put into the queue again, its child stopped: submitit calls this on preemption and at the time limit."""
        # This runs within run(), at any of its lines: waitid leaves the exit code to Popen.
        with contextlib.suppress(AttributeError, ProcessLookupError, ChildProcessError):
            self.tell()
            for _ in range(600):
                if os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    break
                time.sleep(0.1)
            else:
                os.kill(self.child.pid, signal.SIGKILL)  # what it trained since its last checkpoint is trained again
        return submitit.helpers.DelayedSubmission(ModelJob(self.commands, self.log, self.lock, self.environment))


def on_slurm():
    """Whether this process is in a job on SLURM."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def make_job(model, commands, environment):
    """ModelJob of a model, with its folder of logs made."""
    model.log().parent.mkdir(parents=True, exist_ok=True)
    return ModelJob(commands, str(model.log()), str(model.log(".lock")), environment)


def threads(count):
    """Environment that gives a process `count` threads."""
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(max(1, count)))


def visible_gpus(per_job):
    """Names of the GPUs that jobs may use, as CUDA_VISIBLE_DEVICES writes them; empty without GPUs."""
    if not per_job:
        return []
    if given := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return given.split(",")
    return [str(index) for index in range(importlib.import_module("torch").cuda.device_count())]


def run_here(work, options, ended):
    """Run the jobs of `work` (Model → commands) with submitit on this machine, options.jobs at a time; ended(model) after each.

    Each has its share of the cores and, where there are GPUs, its own one; more jobs than GPUs share them.
    """
    gpus, cores = visible_gpus(options.gpus_per_job), len(os.sched_getaffinity(0))
    count = min(options.jobs or (len(gpus) // options.gpus_per_job if gpus else min(cores, 8)), len(work))
    slots, stopping = queue.SimpleQueue(), threading.Event()
    for slot in range(count):
        own = [gpus[(slot * options.gpus_per_job + i) % len(gpus)] for i in range(options.gpus_per_job)] if gpus else []
        slots.put(threads(options.cpus_per_job or cores // count) | {"CUDA_VISIBLE_DEVICES": ",".join(own)})

    def submit_and_wait(model, commands):
        if stopping.is_set():
            return
        slot = slots.get()
        executor = submitit.LocalExecutor(model.log().parent / "submitit")
        executor.update_parameters(timeout_min=10**6)  # no time limit
        job = executor.submit(make_job(model, commands, slot))
        while not job.done():
            if stopping.is_set():
                os.kill(int(job.job_id), signal.SIGTERM)  # to submitit's controller: cancel() would kill after a second
                time.sleep(1)
            time.sleep(0.1)
        slots.put(slot)

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    # Ctrl-C reaches every process of the terminal, and the jobs shall have one signal only: ours
    mask = (signal.pthread_sigmask, (signal.SIG_BLOCK, {signal.SIGINT}))
    with ThreadPoolExecutor(count, initializer=mask[0], initargs=mask[1]) as pool:
        try:
            futures = {pool.submit(submit_and_wait, *item): item[0] for item in work.items()}
            for future in as_completed(futures):
                future.result()
                ended(futures[future])
        except BaseException:
            stopping.set()
            print("stopping: the runs write their checkpoints; the same command goes on", file=sys.stderr, flush=True)
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)


POLL_SECONDS = 5  # between two looks into SLURM's queue


def queued_jobs():
    """Set of the ids of my jobs in SLURM's queue, or None if squeue does not answer."""
    answer = subprocess.run(["squeue", "--me", "--noheader", "--array", "--format=%i"], capture_output=True, text=True)
    return set(answer.stdout.split()) if answer.returncode == 0 else None


def run_on_slurm(work, options, ended):
    """Run the jobs of `work` (Model → commands) as an array on SLURM, options.jobs at a time; ended(model) after each.

    What an earlier call left in the queue is waited for, not submitted again. Raises InputError if SLURM refuses.
    """
    queued, waiting, new = queued_jobs() or set(), {}, {}
    cpus = options.cpus_per_job or 4
    for model, commands in work.items():
        record = model.log(".job")
        job_id = record.read_text().strip() if record.exists() else ""
        if job_id in queued:
            waiting[job_id] = model
        else:
            new[model] = make_job(model, commands, threads(cpus))
    if waiting:
        print(f"{len(waiting)} jobs of an earlier call are in the queue still")
    if new:
        first = next(iter(new))
        executor = submitit.SlurmExecutor(first.log().parent / "submitit", max_num_timeout=10**6)
        parameters = {"job_name": first.setting.folder("").name, "time": options.time, "cpus_per_task": cpus,
                      "mem": f"{int(options.mem * 1024)}MB", "array_parallelism": options.jobs or 32,
                      "additional_parameters": {"requeue": True}}  # fmt: skip
        if options.gpus_per_job:
            parameters["gpus_per_node"] = options.gpus_per_job
        if options.partition:
            parameters["partition"] = options.partition
        executor.update_parameters(**parameters)
        try:
            jobs = executor.submit_array(list(new.values()))
        except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError, OSError) as error:
            reason = [line for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
            raise InputError(f"SLURM refuses the jobs: {reason[-1]}") from None
        for model, job in zip(new, jobs, strict=True):
            model.log(".job").write_text(f"{job.job_id}\n")
            waiting[job.job_id] = model
        print(f"submitted {len(jobs)} jobs as {jobs[0].job_id.split('_')[0]}; Ctrl-C leaves them in the queue, the same command "
              "waits for them again", flush=True)  # fmt: skip
    absences = dict.fromkeys(waiting, 0)
    while waiting:
        time.sleep(POLL_SECONDS)
        queued = queued_jobs()
        for job_id in list(waiting) if queued is not None else ():
            absences[job_id] = 0 if job_id in queued else absences[job_id] + 1
            if absences[job_id] == 2:  # a job that is requeued may be in between for a moment
                ended(waiting.pop(job_id))


# --------------------------------------------------------------------------------------------------------------
# the report

HIDDEN = ["panel_row", "panel_column", "row", "column", "learned", "setting", "runs"]
CLOSE, NEAR = 0.05, 0.1
# Table 5 prints 0.98 and 0.99 where the theory, its linear rows and its dependent rows have 0
MISPRINTS = {
    "numeric_ablations.csv": {"table": 5, "metric": "r2_nonlinear", "semantics": "independent", "factor": "s_9"}
}


def models_of(setting, models):
    """Finished Models of a setting, in order of their seeds; InputError if one is of another setting or scale."""
    seeds = sorted(
        int(match.group(1))
        for path in setting.folder(models).glob(f"{setting.name}_seed*")
        if (match := re.fullmatch(r".*_seed(\d+)", path.name))
    )
    found = [Model(setting, seed, Path(models)) for seed in seeds]
    return [model for model in found if model.stored().get("finished")]


def cell_value(cell, rows):
    """The cell's number in the rows (dicts) of its file; ValueError unless exactly one row is the cell's."""
    found = [row for row in rows if all(row[name] == value for name, value in cell.where.items())]
    if len(found) != 1:
        raise ValueError(f"expected one row of {' '.join(cell.where.values())}")
    value = float(found[0][cell.score])
    return min(max(value, 0.0), 1.0) if cell.clipped else value


def model_values(cells, model, file):
    """Numbers of `cells` (all of one setting and file) of one model, or None without the file; InputError if it is damaged."""
    if not (model.directory / file.name).exists():
        return None
    rows = model.read(file).to_dict("records")
    try:
        return [cell_value(cell, rows) for cell in cells]
    except (ValueError, TypeError) as error:
        raise InputError(f"{model.directory / file.name} is damaged: {error}; remove it and make it again") from None


def measured(figure, scale, models, damaged):
    """DataFrame of a figure's cells: keys, mean, std (over seeds, n − 1), seeds; at COMPARED scales paper, difference, note.

    Files that cannot be read are left out as a whole and named in `damaged`, path → message.
    """
    cells, groups = list(figure.cells(scale)), {}
    runs = [{} for _ in cells]
    for index, cell in enumerate(cells):
        groups.setdefault((cell.setting, cell.file), []).append(index)
    for (setting, file), indices in groups.items():
        for model in models_of(setting, models):
            path = model.directory / file.name
            try:
                values = None if path in damaged else model_values([cells[i] for i in indices], model, file)
            except InputError as error:
                damaged[path], values = str(error), None
            for index, value in zip(indices, values or (), strict=False):
                runs[index][model.name] = value
    rows = []
    for cell, values in zip(cells, runs, strict=True):
        series = pd.Series(values, dtype=float)
        rows.append({**cell.keys, "mean": series.mean(), "std": series.std(), "seeds": len(series),
                     "panel_row": cell.panel[0], "panel_column": cell.panel[1], "row": cell.row, "column": cell.column,
                     "learned": cell.learned, "setting": cell.setting.name, "runs": values})  # fmt: skip
    table, keys = pd.DataFrame(rows), list(rows[0].keys())[: -len(HIDDEN) - 3]
    if scale not in COMPARED:
        return table
    paper = pd.read_csv(ROOT / "paper" / figure.paper, keep_default_na=False)
    table = table.merge(paper.rename(columns={"value": "paper"}), on=keys, how="left", validate="one_to_one")
    wrong = MISPRINTS.get(figure.paper, {"mean": None})
    misprinted = functools.reduce(
        lambda mask, item: mask & (table[item[0]] == item[1]), wrong.items(), table.paper.notna()
    )
    table["difference"] = (table["mean"] - table.paper).mask(misprinted)
    table["note"] = misprinted.map({True: "paper: misprint", False: ""})
    return table


def summarise(tables, scale):
    """DataFrame of one row a figure: cells, computed, seeds, and of those with a number of the paper how many are how near."""
    rows = []
    for figure, table in tables.items():
        row = {"figure": figure.name, "scale": scale, "cells": len(table), "computed": int((table.seeds > 0).sum())}
        row["seeds"] = "–".join(map(str, sorted({table.seeds.min(), table.seeds.max()})))
        if scale in COMPARED:
            for name, part in (("", table), ("independent_", table[table.semantics == "independent"])):
                difference = part.difference.dropna().abs().round(9)
                row[f"{name}compared"] = len(difference)
                row |= {f"{name}within_{bound}": int((difference <= bound).sum()) for bound in (CLOSE, NEAR)}
            row["misprints"] = int((table.note != "").sum())
        rows.append(row)
    return pd.DataFrame(rows)


def counts_in_words(summary, scale):
    """How many cells are computed, and how many of them are near the paper's numbers."""
    total = summary.sum(numeric_only=True).astype(int)
    words = f"{total.computed} of {total.cells} cells computed"
    if scale not in COMPARED:
        return f"{words} (a smaller problem, not compared with the paper)"
    near, nearer = total[f"within_{NEAR}"], total[f"within_{CLOSE}"]
    words += f", {nearer} of {total.compared} lie within ±{CLOSE} of the paper, {near} within ±{NEAR}"
    return words + (f"; {total.misprints} cells are misprinted in the paper, not compared" if total.misprints else "")


def pattern_broken(tables):
    """(cells, broken): number of independent nonlinear cells, and a DataFrame of those that are not as the theory says.

    Unbiased factors should have R² of at least 0.9, all others at most 0.1; a setting that two figures share counts once.
    """
    cells = pd.concat(tables.values(), ignore_index=True)
    cells = cells[cells.learned.notna() & (cells.seeds > 0)]
    if cells.empty:
        return 0, pd.DataFrame()
    cells = cells.drop_duplicates(["setting", "encoding", "factor"])
    learned = cells.learned.astype(bool)
    broken = cells[(learned & (cells["mean"] < 0.9)) | (~learned & (cells["mean"] > 0.1))]
    columns = {"setting": broken.setting, "encoding": broken.encoding, "factor": broken.factor,
               "expected": ["≥ 0.9" if value else "≤ 0.1" for value in broken.learned], "mean": broken["mean"].round(3),
               "runs": [", ".join(f"{run} {value:.2f}" for run, value in runs.items()) for runs in broken.runs]}  # fmt: skip
    return len(cells), pd.DataFrame(columns)


def durations(figures, scale, models):
    """DataFrame of the finished models: seconds of training and of evaluation, and the device."""
    settings = dict.fromkeys(cell.setting for figure in figures for cell in figure.cells(scale))
    columns = ["train_seconds", "eval_seconds", "device"]
    found = itertools.chain.from_iterable(models_of(setting, models) for setting in settings)
    rows = [[model.name, scale, *(model.stored().get(name) for name in columns)] for model in found]
    return pd.DataFrame(rows, columns=["model", "scale", *columns])


def panels_of(table, value):
    """Dict (panel row, panel column) → DataFrame (rows × columns of the panel) of one column of a figure's table."""
    grids = {}
    for panel, part in table.groupby(["panel_row", "panel_column"], sort=False):
        grids[panel] = part.pivot(index="row", columns="column", values=value)
        grids[panel] = grids[panel].loc[part.row.unique(), part.column.unique()]
    return grids


def draw(figure, table, scale, folder):
    """Draw a figure in the paper's arrangement, and at COMPARED scales beside the paper's; returns the PNGs' paths."""
    title = f"{figure.name}: {figure.title} — {scale} scale, {table.seeds.max()} seed{'s'[: table.seeds.max() - 1]}"
    ours, path = panels_of(table, "mean"), folder / f"{figure.name}.png"
    paper = panels_of(table, "paper") if scale in COMPARED else {}
    if figure.curves:
        plot_score_curves(ours, panels_of(table, "std"), paper, path, title)
        return [path]
    plot_score_grid(ours, path, title)
    if not paper:
        return [path]
    beside, note = folder / f"{figure.name}_beside_paper.png", panels_of(table, "note")
    plot_beside_paper(ours, paper, panels_of(table, "difference"), note, beside, title)
    return [path, beside]


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1250px; padding: 0 1rem; color: #222 }
.first { font-size: 1.15rem; font-weight: 600; margin: .2rem 0 } img { max-width: 100% }
table { border-collapse: collapse; margin: .8rem 0; font-size: 12px } caption { text-align: left; font-weight: 600 }
th, td { border: 1px solid #ddd; padding: .25rem .45rem; text-align: right } th { background: #f4f4f4 }
.text td { text-align: left } small { color: #555 } summary { cursor: pointer }
.scale { border-top: 3px solid #888; margin-top: 2.5rem }
"""
COLOURS = {"close": "#e3f3e3", "near": "#fff3cf", "far": "#fbd9d5", "misprint": "#eee", "": ""}


def cell_text(row):
    """HTML of one cell: mean ± std, and the paper's number with the difference."""
    text = "–" if not row.seeds else f"<b>{row['mean']:.2f}</b>" + (f" ± {row['std']:.2f}" if row.seeds > 1 else "")
    if row.get("note"):
        return f"{text}<br><small>{row.note}</small>"
    if not math.isnan(row.get("paper", math.nan)):
        text += f"<br><small>paper {row.paper:.2f}" + (f" ({row.difference:+.2f})" if row.seeds else "") + "</small>"
    return text


def cell_colour(row):
    """Key of COLOURS of one cell: how near the paper it is."""
    difference = abs(round(row.get("difference", math.nan), 9))
    if row.get("note"):
        return "misprint"
    return "" if math.isnan(difference) else "close" if difference <= CLOSE else "near" if difference <= NEAR else "far"


def figure_tables(table):
    """HTML of a figure's numbers, a table for each panel."""
    table = table.assign(text=table.apply(cell_text, axis=1), colour=table.apply(cell_colour, axis=1))
    colours, parts = panels_of(table, "colour"), []
    for panel, texts in panels_of(table, "text").items():
        texts.index.name = texts.columns.name = None
        styles = colours[panel].map(lambda key: f"background:{COLOURS[key]}" if key else "")
        styler = texts.style.set_caption(" · ".join(panel)).apply(lambda _, styles=styles: styles.to_numpy(), axis=None)
        parts.append(styler.to_html())
    return "\n".join(parts)


def scale_section(scale, tables, summary, pattern, pictures):
    """HTML of one scale: summary, pattern of the theory, and each figure with its numbers."""
    count, broken = pattern
    kept = count - len(broken)
    parts = [f'<section class="scale"><h1>{scale} scale: {SCALES[scale]}</h1>', summary.style.hide().to_html()]
    if count:
        rest = " The rest, with their runs:" if len(broken) else ""
        parts.append(
            f"<h2>Pattern of the theory, {scale} scale</h2><p>Independent semantics, nonlinear R²: {kept} of {count} cells "
            f"({kept / count:.1%}) have at least 0.9 for an unbiased factor and at most 0.1 for any other.{rest}</p>"
        )
        if len(broken):
            parts.append(broken.style.hide().format(precision=3).set_table_attributes('class="text"').to_html())
    for figure, paths in pictures.items():
        parts.append(f"<h2>{figure.name}: {figure.title} ({scale} scale)</h2>")
        for path in paths:
            image = base64.b64encode(path.read_bytes()).decode()
            parts.append(f'<p><img alt="{path.stem}, {scale} scale" src="data:image/png;base64,{image}"></p>')
        heading = f"{figure.name}, {scale} scale: every number (mean ± standard deviation over seeds)"
        parts.append(f"<details><summary>{heading}</summary>{figure_tables(tables[figure])}</details>")
    return "\n".join([*parts, "</section>"])


def page(lines, sections):
    """The report as one HTML document that needs no other file."""
    first = "\n".join(f'<p class="first">{html.escape(line)}</p>' for line in lines)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Negate or Embrace: reproduction</title>'
            f"<style>{STYLE}</style></head><body>\n{first}\n" + "\n".join(sections) + "\n</body></html>\n")  # fmt: skip


# --------------------------------------------------------------------------------------------------------------
# the three commands


def last_line(log):
    """Last line of a log that says something, or words for there being none."""
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines and not lines[-1].startswith("$ ") else "it ended without a word"
    return "it never started"


def run(args):
    """`run`: train and evaluate what is missing; returns the exit code, 2 if a model failed."""
    if args.cluster == "slurm" and not args.dry_run and not (shutil.which("sbatch") and shutil.which("srun")):
        raise InputError("--cluster slurm needs SLURM's sbatch and srun in the PATH; run this on a login node of the "
                         "cluster, or use --cluster local")  # fmt: skip
    needed = needed_models(chosen_figures(args.names), args.scale, args.seeds, args.models)
    missing = {model: files for model, all_files in needed.items() if (files := model.missing(all_files))}
    work = {model: model.commands(files) for model, files in missing.items()}
    print(
        f"{args.scale} scale: {len(needed)} models, {len(needed) - len(work)} are done, {len(work)} to do", flush=True
    )
    if args.dry_run:
        for commands in work.values():
            shown = [["python", Path(script).name, *words] for _, script, *words in commands]
            print(" && ".join(map(shlex.join, shown)))
        return 0
    failures, count, started = {}, itertools.count(1), time.monotonic()

    def ended(model):
        try:
            failed = last_line(model.log()) if model.missing(missing[model]) else ""
        except InputError as error:
            failed = str(error)
        if failed:
            failures[model] = failed
        minutes = (time.monotonic() - started) / 60
        print(
            f"[{next(count)}/{len(work)}, {minutes:.1f} min] {model.name} {'FAILED' if failed else 'done'}", flush=True
        )

    if work:
        (run_on_slurm if args.cluster == "slurm" else run_here)(work, args, ended)
    if failures:
        print(f"{len(failures)} of {len(work)} models failed; the same command tries them again:", file=sys.stderr)
        for model, line in failures.items():
            print(f"  {model.name}: {line}\n    log: {model.log()}", file=sys.stderr)
        return 2
    return 0


def show_list(args):
    """`list`: what every figure needs and what of it is done; with names, model by model. Returns the exit code."""
    print(f"{args.scale} scale ({SCALES[args.scale]}), {args.seeds} seeds, in {args.models}/")
    shown = {figure.name for figure in chosen_figures(args.names)} if args.names else set(FIGURES)
    everything = {}
    for figure in FIGURES.values():
        if figure.name not in shown:
            continue
        if reason := figure.missing():
            print(f"{figure.name:7} {figure.title:44} not available yet: {reason}")
            continue
        needed = needed_models([figure], args.scale, args.seeds, args.models)
        states = {model: not model.missing(files) for model, files in needed.items()}
        everything |= {model: everything.get(model, True) and done for model, done in states.items()}
        settings = len({model.setting for model in needed})
        print(f"{figure.name:7} {figure.title:44} {settings:3} settings {len(needed):4} models {sum(states.values()):4} done"
              f"   {' + '.join(figure.scripts)}")  # fmt: skip
        if args.names:
            for model, done in states.items():
                begun = "begun" if model.directory.exists() else "missing"
                print(f"        {model.directory}  {'done' if done else begun}")
    print(f"together {len(everything)} models, each trained once: {sum(everything.values())} done")
    return 0


def write_report(args):
    """`report`: tables, pictures and index.html of the models that exist; returns the exit code.

    Raises InputError if there are none, and, once the rest is written, if the results of one are damaged.
    """
    figures = chosen_figures(args.names or ["all"])
    output, sections, lines, damaged = Path(args.output), [], [], {}
    for scale in [args.scale] if args.scale else SCALES:
        tables = {figure: measured(figure, scale, args.models, damaged) for figure in figures}
        if not any(table.seeds.any() for table in tables.values()):
            continue
        folder = output / scale
        folder.mkdir(parents=True, exist_ok=True)
        summary, pattern = summarise(tables, scale), pattern_broken(tables)
        lines.append(f"{scale} scale: {counts_in_words(summary, scale)}.")
        write_csv(summary, folder / "summary.csv")
        write_csv(durations(figures, scale, args.models), folder / "models.csv")
        pictures = {}
        for figure, table in tables.items():
            if table.seeds.any():
                write_csv(table.drop(columns=HIDDEN).round(4), folder / f"{figure.name}.csv")
                pictures[figure] = draw(figure, table, scale, folder)
        sections.append(scale_section(scale, tables, summary, pattern, pictures))
    if not lines and not damaged:
        raise InputError(f"no finished model of {', '.join(figure.name for figure in figures)} lies under {args.models}/; "
                         "`python reproduce.py run` trains them")  # fmt: skip
    if lines:
        left_out = [f"Left out: {message}" for message in damaged.values()]
        write_bytes(output / "index.html", page([*lines, *left_out], sections).encode())
        print(*lines, f"report: {output / 'index.html'}", sep="\n")
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise InputError(f"{next(iter(damaged.values()))}{more}: left out of the report")
    return 0


def parse_flags(argv):
    """Namespace of the command line."""
    parser = Parser(description=__doc__.split("\n\n")[0], epilog="\n\n".join(__doc__.split("\n\n")[1:]))
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | run | report")
    known = f"{', '.join([*FIGURES, *GROUPS])}"
    for name, function, text in (
        ("list", show_list, "what every figure needs and what is done"),
        ("run", run, "train and evaluate what is missing"),
        ("report", write_report, "tables and pictures beside the paper's numbers"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        command.add_argument("names", nargs="+" if name == "run" else "*", metavar="NAME", help=known)
        command.add_argument("--models", default="models", help="folder of all models (%(default)s)")
        if name != "report":
            command.add_argument("--scale", choices=tuple(SCALES), default="paper", help="(%(default)s)")
            command.add_argument(
                "--seeds", type=integer(1), default=3, help="seeds 1 … N of each setting (%(default)s)"
            )
        else:
            command.add_argument("--scale", choices=tuple(SCALES), help="this one alone (all that have models)")
            command.add_argument("--output", default="report", help="folder of the report (%(default)s)")
    command = commands.choices["run"]
    command.add_argument("--dry-run", action="store_true", help="print the commands and do nothing")
    command.add_argument("--cluster", choices=("local", "slurm"), default="local", help="(%(default)s)")
    command.add_argument("--jobs", type=integer(1),
                         help="models at a time (here: one a GPU, or one a core up to 8; SLURM: 32)")  # fmt: skip
    command.add_argument("--gpus-per-job", type=integer(0), default=1,
                         help="0 stays on the CPU; here, a machine without GPUs uses its CPU (%(default)s)")  # fmt: skip
    command.add_argument("--cpus-per-job", type=integer(1), help="threads (here: the cores shared out; SLURM: 4)")
    group = command.add_argument_group("SLURM; account and the like come from the environment, as SBATCH_ACCOUNT")
    group.add_argument("--partition", help="(the cluster's default)")
    group.add_argument("--time", type=integer(1), default=720, metavar="MINUTES",
                       help="a job that takes longer is requeued and goes on (%(default)s)")  # fmt: skip
    group.add_argument("--mem", type=number(0, above=True), default=8.0, metavar="GB", help="a job (%(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    """Run the command; returns the exit code."""
    args = parse_flags(argv)
    return args.function(args)


# A job shall not need to import this module, wherever it runs.
if __name__ != "__main__":
    cloudpickle.register_pickle_by_value(sys.modules[__name__])

if __name__ == "__main__":
    run_script(main)
