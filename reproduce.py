"""Reproduce the paper's tables and figures: list them, train what they need here or on a SLURM cluster, report.

    python reproduce.py list                                  # every figure: how many models it needs, how many are done
    python reproduce.py list fig3 --scale fast                # its models, one by one
    python reproduce.py run fig3 fig4 table5 --dry-run        # the commands, nothing else
    python reproduce.py run numeric --scale tiny --jobs 2     # train and evaluate what is missing, two models at a time
    python reproduce.py run all --cluster slurm --partition gpu --time 720 --jobs 16
    python reproduce.py report                                # report/index.html from whatever models there are

Scales: paper is the paper's runs, with its dimensions, settings, recipe and steps, and --protocol code, since these runs
differ from its text; fast the paper's dimensions and settings with the fast recipe; tiny a smaller problem, whose numbers
are not those of the paper. Each has folders of its own, and no table mixes them.

A model is a setting and a seed, and its folder is named after them: models/numeric/ind_select_3_seed1 has independent
semantics of which the text speaks of three; models/numeric-tiny/dep_perturb_2_seed3 dependent ones, two of them perturbed.
A run that was killed or failed goes on with the same command; what is finished is not touched, and what is damaged or was
trained otherwise is named and does not count. Logs lie in models/logs/.
"""

from running.command_line import InputError, Parser, integer, number, run_script

# isort: split
import contextlib
import itertools
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from grids import figures, jobs, models
from grids.models import SCALES
from grids.report import write_report


def last_line(log, complaints):
    """Last line of a model's log, or of its job's own error file if that was written later; or words for there being none."""
    last = []
    for file in (log, complaints):
        with contextlib.suppress(OSError):
            lines = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
            if lines and not lines[-1].startswith("$ "):
                last.append((file.stat().st_mtime_ns, lines[-1]))
    return max(last)[1] if last else "it ended without a word" if log.exists() else "it never started"


def shown(commands):
    """Commands of one model or data set, one after another, as a user would type them from the repository."""
    words = " && ".join(map(shlex.join, commands))
    return words.replace(sys.executable, "python").replace(f"{models.ROOT}/", "")


def prepare_data(work, dry_run):
    """Make the data sets of `work` (Model → commands), or print how; returns by reason the models without one.

    They are taken out, unless all is but printed.
    """
    left_out = {}
    for data_set in dict.fromkeys(model.setting.data for model in work if model.setting.data):
        try:
            for command in data_set.missing():
                print(shown([command]) if dry_run else f"$ {shlex.join(command)}", flush=True)
                if not dry_run and (code := subprocess.run(command).returncode):
                    [script] = jobs.scripts([command])
                    raise InputError(f"{script} ended with exit code {code}: the data set is not complete")
        except InputError as error:
            without = [model for model in work if model.setting.data == data_set]
            left_out.setdefault(str(error), []).extend(without)
            if not dry_run and len(without) < len(work):
                print(f"{len(without)} models are left out: {error}", flush=True)
            for model in () if dry_run else without:
                del work[model]
    return left_out


def run(args):
    """`run`: train what is missing; exit code 2 if a model failed, is damaged or left out, InputError if no data can be had."""
    if args.cluster == "slurm" and not args.dry_run and not (shutil.which("sbatch") and shutil.which("srun")):
        place = "run this on a login node of the cluster, or use --cluster local"
        raise InputError(f"--cluster slurm needs SLURM's sbatch and srun in the PATH; {place}")
    needed = figures.needed_models(figures.chosen_figures(args.names), args.scale, args.seeds, args.models)
    lacking, damaged = models.checked(needed)
    work = {model: model.commands(files, args.gpus_per_job) for model, files in lacking.items() if files}
    counts = f"{len(lacking) - len(work)} are done, " + (f"{len(damaged)} damaged, " if damaged else "")
    print(f"{args.scale} scale: {len(needed)} models, {counts}{len(work)} to do", flush=True)
    left_out = prepare_data(work, args.dry_run)
    if args.dry_run:
        for commands in work.values():
            print(shown(commands))
    if left_out and not damaged and (args.dry_run or not work):
        raise InputError(next(iter(left_out)))
    failures, count, started = {}, itertools.count(1), time.monotonic()

    def ended(model, complaints):
        try:
            failed = last_line(model.log(), complaints) if model.missing(lacking[model]) else ""
        except InputError as error:
            failed = str(error)
        if failed:
            failures[model] = failed
        minutes, state = (time.monotonic() - started) / 60, "FAILED" if failed else "done"
        print(f"[{next(count)}/{len(work)}, {minutes:.1f} min] {model.name} {state}", flush=True)

    if work and not args.dry_run:
        (jobs.run_on_slurm if args.cluster == "slurm" else jobs.run_here)(work, args, ended)
    for model, reason in damaged.items():
        print(f"{model.name} is damaged and was left alone: {reason}", file=sys.stderr)
    for reason, without in left_out.items():
        print(f"{len(without)} models were left out, {without[0].name} the first: {reason}", file=sys.stderr)
    if failures:
        print(f"{len(failures)} of {len(work)} models failed; the same command tries them again:", file=sys.stderr)
        for model, line in failures.items():
            print(f"  {model.name}: {line}\n    log: {model.log()}", file=sys.stderr)
    return 2 if failures or damaged or left_out else 0


def show_list(args):
    """`list`: what each figure needs and has; with names, model by model. The exit code is 2 if a model, named, is damaged."""
    plural = "" if args.seeds == 1 else "s"
    print(f"{args.scale} scale ({SCALES[args.scale]}), {args.seeds} seed{plural}, in {args.models}/")
    everything, code = {}, 0
    for figure in figures.chosen_figures(args.names or ["all"]):
        needed = figures.needed_models([figure], args.scale, args.seeds, args.models)
        lacking, damaged = models.checked(needed)
        states = {model: "begun" if model.directory.exists() else "missing" for model in needed}
        states |= {model: "done" for model, files in lacking.items() if not files}
        states |= {model: f"damaged: {reason}" for model, reason in damaged.items()}
        for model, state in states.items():
            everything[model] = everything.get(model, True) and state == "done"
        settings = dict.fromkeys(model.setting for model in needed)
        needs = [setting.script for setting in settings] + [file.script for files in needed.values() for file in files]
        data = [setting.data.file for setting in settings if setting.data]
        needs += [f"{file}{'' if Path(file).exists() else ' (missing)'}" for file in data]
        done = sum(state == "done" for state in states.values())
        counts = f"{len(settings):3} settings {len(needed):4} models {done:4} done"
        print(f"{figure.name:7} {figure.title:44} {counts}   {' + '.join(dict.fromkeys(filter(None, needs)))}")
        for model in states if args.names else damaged:
            print(f"        {model.directory}  {states[model]}")
        code = 2 if damaged else code
    print(f"together {len(everything)} models, each trained once: {sum(everything.values())} done")
    return code


def main(argv=None):
    """Run the command; returns the exit code."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | run | report")
    known = ", ".join([*figures.FIGURES, *figures.GROUPS])
    for name, function, text in (
        ("list", show_list, "what every figure needs and what is done"),
        ("run", run, "train and evaluate what is missing"),
        ("report", write_report, "tables and pictures beside the paper's numbers"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        command.add_argument("names", nargs="+" if name == "run" else "*", metavar="NAME", help=known)
        command.flag("--models", str, "folder of all models", "models")
        if name == "report":
            command.flag("--scale", tuple(SCALES), "this one alone (all that have models)")
            command.flag("--output", str, "folder of the report", "report")
        else:
            scales = "; ".join(f"{scale}: {text}" for scale, text in SCALES.items())
            command.flag("--scale", tuple(SCALES), scales, "paper")
            command.flag("--seeds", integer(1), "seeds 1 … N of each setting", 3)
    command = commands.choices["run"]
    command.flag("--dry-run", bool, "print the commands and do nothing")
    command.flag("--cluster", ("local", "slurm"), "", "local")
    command.flag("--jobs", integer(1), "models at a time (here: one a GPU, or one a core up to 8; SLURM: 32)")
    command.flag(
        "--gpus-per-job",
        integer(0),
        "several train one model, by torchrun; 0 stays on the CPU; here, a machine without GPUs uses its CPU",
        1,
    )
    command.flag("--cpus-per-job", integer(1), "threads (here: the cores shared out; SLURM: 4)")
    command.section("SLURM; account and the like come from the environment, as SBATCH_ACCOUNT")
    command.flag("--partition", str, "(the cluster's default)")
    command.flag("--time", integer(5), "a job that takes longer is told 90 seconds before, requeued and goes on", 720,
                 metavar="MINUTES")  # fmt: skip
    command.flag("--mem", number(0, above=True), "a job", 8.0, metavar="GB")
    args = parser.parse_args(argv)
    return args.function(args)


if __name__ == "__main__":
    run_script(main)
