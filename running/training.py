"""The one training loop: device, precision, learning rate, clipping, progress, checkpoints, signals and resuming.

A run lives in its model directory:

    args.json        every flag as it came out, seed, versions, device, duration; "finished": true is written last
    checkpoint.pt    weights, optimiser, step, every random state, the log so far: all that --resume needs
    train_log.csv    one row every --log-steps
    *.pt             weights alone (state_dict), written when training ends

Every file is written beside its place and renamed, so a run killed at any moment leaves a directory that resumes.
"""

import contextlib
import dataclasses
import datetime
import io
import itertools
import math
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from running.command_line import InputError, integer, number
from running.files import read_json, write_bytes, write_csv, write_json
from running.optimisation import Adam, InputWhitening, Muon, fan_in_rates

# Flags that args.json of earlier versions does not name, and what these versions did.
LATER_FLAGS = {"optimiser": "adam", "spare_dimensions": 0, "first_batch_size": 0}
# Flags that say how to run, not what: they may differ between the calls that work on one model directory, though a run
# that is resumed keeps its log_steps and no_cuda unless they are given.
RUN_FLAGS = {"model_dir", "model_id", "log_steps", "evaluate", "no_cuda", "load_args", "resume", "overwrite"}
GRADIENT_NORM = 2.0


# --------------------------------------------------------------------------------------------------------------
# flags


def recipe_values(recipes, name):
    """What each recipe sets a flag to, in words."""
    return ", ".join(f"{recipe} {values[name]}" for recipe, values in recipes.items())


def add_training_flags(parser, recipes, default_log_steps=1000):
    """Add the flags that every training script shares; `recipes` maps a name to the values of the flags that it sets."""

    group = parser.add_argument_group("run")
    group.add_argument("--model-dir", default="models", help="folder of all models (%(default)s)")
    group.add_argument("--model-id", help="folder of this model inside it; none given: a fresh one is made and printed")
    group.add_argument(
        "--seed",
        type=integer(0),
        help="training seed, or with --evaluate the evaluation's; none given: one is drawn and stored",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue an unfinished run from its last checkpoint; start it if there is none",
    )
    group.add_argument("--overwrite", action="store_true", help="train anew where a model lies already")
    group.add_argument(
        "--evaluate", action="store_true", help="do not train: evaluate a trained model again, with another seed"
    )
    group.add_argument(
        "--load-args", action="store_true", help="let args.json of the model directory win over contradicting flags"
    )
    group.add_argument(
        "--log-steps",
        type=integer(1),
        default=default_log_steps,
        help="steps between two lines of progress and checkpoints (%(default)s)",
    )
    group.add_argument("--no-cuda", action="store_true", help="stay on the CPU")
    group = parser.add_argument_group("training", "--recipe sets what follows it at once; a flag that is given wins")
    group.add_argument(
        "--protocol",
        choices=("code", "paper"),
        default="code",
        help="where the paper's text and its runs differ, follow which (%(default)s)",
    )
    group.add_argument(
        "--recipe", choices=tuple(recipes), default="paper", help="the paper's training, or a faster one (%(default)s)"
    )
    group.add_argument(
        "--init",
        choices=("default", "he"),
        help=f"encoders' weights: PyTorch's default or He's ({recipe_values(recipes, 'init')})",
    )
    group.add_argument(
        "--lr",
        type=number(0, above=True),
        help=f"Adam's learning rate, its peak under a schedule ({recipe_values(recipes, 'lr')})",
    )
    group.add_argument(
        "--optimiser",
        choices=("adam", "muon"),
        help="muon takes the filters of convolutions, and Adam all else, see optimisation.py "
        f"({recipe_values(recipes, 'optimiser')})",
    )
    group.add_argument(
        "--layer-lr",
        choices=("uniform", "fan-in"),
        help="learning rate of all layers alike, or larger where the fan-in is smaller, see optimisation.py "
        f"({recipe_values(recipes, 'layer_lr')})",
    )
    group.add_argument(
        "--preconditioner",
        choices=("none", "inputs"),
        help="of Adam's gradients; inputs: whiten by each layer's inputs, see optimisation.py "
        f"({recipe_values(recipes, 'preconditioner')})",
    )
    group.add_argument(
        "--lr-schedule",
        choices=tuple(LR_SCHEDULES),
        help=f"one cycle warms up and comes down to nothing ({recipe_values(recipes, 'lr_schedule')})",
    )
    group.add_argument("--batch-size", type=integer(2), help=f"pairs a step ({recipe_values(recipes, 'batch_size')})")
    group.add_argument(
        "--final-batch-size",
        type=integer(2, or_zero=True),
        help="pairs in the last step: the batch grows geometrically from --batch-size; 0 = it does not; a recipe's auto: "
        f"larger for larger encodings ({recipe_values(recipes, 'final_batch_size')})",
    )
    group.add_argument(
        "--train-steps",
        type=integer(1),
        help=f"steps of training; a recipe's auto: by the size of the encodings ({recipe_values(recipes, 'train_steps')})",
    )
    group.add_argument("--precision", choices=("fp32", "tf32", "bf16"),
                       help="of matrix products; tf32 on CUDA alone; a recipe's auto: bf16 where the device computes it fast, "
                       f"else fp32 ({recipe_values(recipes, 'precision')})")  # fmt: skip


def apply_recipe(args, given, recipes):
    """Fill the flags that the recipe sets and that were not given, in place."""
    for name, value in recipes[args.recipe].items():
        if name not in given:
            setattr(args, name, value)


# --------------------------------------------------------------------------------------------------------------
# device and precision


def select_device(args):
    """Device of the run; settles args.precision ("auto": bf16 where the device computes it fast, else fp32).

    Raises InputError for a precision that the device does not have.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    if args.precision == "auto":
        args.precision = "bf16" if has_fast_bf16(device) else "fp32"
    if args.precision == "tf32" and device.type != "cuda":
        raise InputError("--precision tf32 needs a CUDA device, and this run is on the CPU; use fp32 or bf16")
    if args.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise InputError(f"--precision bf16 is not known to {torch.cuda.get_device_name()}; use fp32")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def has_fast_bf16(device):
    """Whether the device computes bf16 itself, not by way of fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text()
        return "amx_bf16" in flags or "avx512_bf16" in flags
    return False


def _keep_freed_memory():
    """Have glibc keep the memory of freed tensors: returning it costs a page fault for every 4 KiB of every step."""
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


@contextlib.contextmanager
def matrix_precision(precision):
    """Context in which CUDA's products and convolutions may be computed in TF32, if `precision` is tf32.

    Optimisers and probes stay outside.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def autocast(device, precision):
    """Context in which matrix products are computed in `precision`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def describe_device(device):
    """One line: the GPU's name, or the CPU's with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"CPU {model}, {torch.get_num_threads()} threads"


# --------------------------------------------------------------------------------------------------------------
# the model directory


def drawn_seed():
    """A seed for a run that was given none."""
    return secrets.randbelow(2**31)


def open_model_directory(args, given, default_id, script_run_flags=frozenset(), parse_flags=None):
    """Directory of the run as a Path, with `args` completed in place from its args.json where it holds a model already.

    Changes nothing on disk. `given`: the flags on the command line; `default_id`: name of a fresh directory;
    `script_run_flags`: the script's own flags that may differ from args.json; `parse_flags`: the script's parser of command
    lines, if args.json is to hold no value that it would refuse. Raises InputError if it does, if the directory holds a
    model and neither --resume, --evaluate nor --overwrite was given, if it holds files but no args.json, or if a flag
    given contradicts args.json and --load-args was not.
    """
    if sum((args.resume, args.overwrite, args.evaluate)) > 1:
        raise InputError("--resume, --overwrite and --evaluate exclude each other")
    if args.model_id is None:
        for flag in ("resume", "evaluate", "load_args"):
            if getattr(args, flag):
                raise InputError(
                    f"--{flag.replace('_', '-')} needs --model-id, the folder of a model in {args.model_dir}"
                )
        args.model_id = fresh_id(args.model_dir, default_id)
    directory = Path(args.model_dir) / args.model_id
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file, expected the folder of a model")
    has_args = (directory / "args.json").exists()
    if args.evaluate or args.load_args or (args.resume and has_args):
        _take_stored_args(args, given, directory, script_run_flags, parse_flags)
    if has_args and not (args.resume or args.evaluate or args.overwrite):
        if is_finished(directory):
            raise InputError(
                f"{directory} holds a finished model; --evaluate evaluates it again, --overwrite trains it anew"
            )
        raise InputError(f"{directory} holds an unfinished run; --resume continues it, --overwrite starts it anew")
    # a run killed as it began leaves no more than a hidden file
    if directory.exists() and not has_args and _holds_files(directory):
        raise InputError(f"{directory} holds files but no args.json: it is no model; choose another --model-id")
    return directory


def _holds_files(directory):
    return any(directory.glob("[!.]*"))


def fresh_id(model_dir, name):
    """`name`, or the first of name-2, name-3, … that is no file in `model_dir`."""
    candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(candidate for candidate in candidates if not (Path(model_dir) / candidate).exists())


def _take_stored_args(args, given, directory, script_run_flags, parse_flags):
    """Set the flags of `args` that say what is trained to their values in args.json, in place."""
    stored, args_file = LATER_FLAGS | stored_args(directory), directory / "args.json"
    if_given = script_run_flags | ({"log_steps", "no_cuda"} if args.resume else set())
    own = RUN_FLAGS - if_given | ({"seed"} if args.evaluate else set()) | (if_given & given)
    for name in [name for name in vars(args) if name not in own]:
        if name not in stored:
            raise InputError(f"{args_file} has no {name!r}: it is damaged, or another script's")
        if parse_flags:
            _check_stored_value(name, stored[name], args_file, parse_flags)
        if name in given and getattr(args, name) != stored[name]:
            flag = f"--{name.replace('_', '-')}"
            if not args.load_args:
                raise InputError(f"{flag} {getattr(args, name)} contradicts {stored[name]} in {args_file}; "
                                 "leave the flag out, or take what is stored with --load-args")  # fmt: skip
            print(f"{flag} {stored[name]} is taken from {args_file}, not {getattr(args, name)}")
        setattr(args, name, stored[name])
    if args.evaluate:
        args.precision = "fp32"  # in full, also where the device does not have the precision of the training


def _check_stored_value(name, value, args_file, parse_flags):
    flag = f"--{name.replace('_', '-')}"
    words = [] if value is False else [flag] if value is True else [f"{flag}={value}"]
    try:
        parsed = getattr(parse_flags(words)[0], name)
    except InputError:
        parsed = None
    if parsed != value or value is None:
        raise InputError(f"{args_file} is damaged: {value!r} is no value of {flag}")


def stored_args(directory):
    """Dict of args.json of a model directory; InputError if it is missing or damaged."""
    stored = read_json(Path(directory) / "args.json")
    seed = stored.get("seed")
    if type(seed) is not int or seed < 0:
        raise InputError(f"{Path(directory) / 'args.json'} is damaged: it has no seed")
    return stored


def is_finished(directory):
    """Whether the run in `directory` has ended: trained, evaluated, all files written."""
    return (Path(directory) / "args.json").exists() and bool(stored_args(directory).get("finished"))


def start_directory(directory, args, details):
    """Make the directory and write args.json: the flags, and `details` of the run. Removes what --overwrite gives up.

    Raises OSError if no file can be made there, and InputError if another run has begun there since it was looked at.
    """
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    if not (args.resume or args.overwrite) and _holds_files(directory):
        raise InputError(f"another run has just begun in {directory}; choose another --model-id")
    try:
        check_writable(directory)
    except OSError:
        if is_new:
            directory.rmdir()
        raise
    given_up = [] if args.resume else ["*.pt", "*.csv", "*.png"]
    if given_up:
        with contextlib.suppress(InputError):
            # killed from here on, this is the earlier run, which --resume ends once more
            write_json(directory / "args.json", {**read_json(directory / "args.json"), "finished": False})
    half_written = [".*.pt", ".*.csv", ".*.png", ".*.json"]  # by a process that was killed
    for pattern in given_up + half_written:
        for file in directory.glob(pattern):
            file.unlink()
    write_args(directory, args, {**details, "finished": False})


def take_evaluation_seed(args, directory):
    """Dict of args.json of the model that --evaluate evaluates; args.seed is drawn if it was not given.

    Raises InputError if the seed is that of the training or the model is not trained to its end, and OSError if the results
    could not be written.
    """
    stored = stored_args(directory)
    if not stored.get("finished") and (step := _checkpoint_step(directory / "checkpoint.pt")) < args.train_steps:
        raise InputError(f"{directory} is trained for {step} of {args.train_steps} steps; --resume continues it")
    if args.seed is None:
        args.seed = next(seed for seed in iter(drawn_seed, None) if seed != stored["seed"])
    if args.seed == stored["seed"]:
        raise InputError(f"--seed {args.seed} is the training seed of {directory}; evaluate with another one")
    check_writable(directory)
    return stored


def keep_results(directory, earlier_seed, seed):
    """Rename the results of an earlier evaluation with another seed to results_seed{N}.csv and .png.

    Then args.json says that the results are of `seed`: whenever a process is killed, none are taken for those of another.
    """
    for file in (directory / "results.csv", directory / "results.png"):
        if earlier_seed not in (None, seed) and file.exists():
            file.replace(file.with_stem(f"results_seed{earlier_seed}"))
    write_json(directory / "args.json", {**read_json(directory / "args.json"), "eval_seed": seed})


def check_writable(directory):
    """Raise OSError if no file can be made in `directory`, or its disk is full."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(2**20))
            file.flush()
    except OSError as error:
        error.filename = str(directory)
        raise


def write_args(directory, args, details):
    """args.json: every flag that says what was trained and evaluated, then `details`."""
    flags = {
        name: value
        for name, value in vars(args).items()
        if name not in ("resume", "overwrite", "evaluate", "load_args")
    }
    write_json(directory / "args.json", {**flags, **details})


def provenance(device):
    """Dict of where and with what a run was made: versions, git commit, device, start time."""
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        here = Path(__file__).parent
        commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], cwd=here,
                                capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    return {
        "device": describe_device(device),
        "git_commit": commit,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def save_torch(content, path):
    """torch.save, whole or not at all; a full disk is an OSError."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getbuffer())


def load_torch(path):
    """What `save_torch` wrote, on the CPU; InputError that names a missing or damaged file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: the model is not trained, or the directory is incomplete") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory, expected a file of weights") from None
    except Exception as error:  # torch raises half a dozen types for a damaged archive
        raise InputError(f"{path} is damaged ({type(error).__name__}); restore it, or train the model anew") from None


def save_weights(module, path):
    """state_dict of a module, without the prefix `module.` of wrappers."""
    save_torch({name.removeprefix("module."): value.cpu() for name, value in module.state_dict().items()}, path)


def load_weights(module, path):
    """Load a state_dict into `module`, with or without the prefix `module.`; returns the module.

    Raises InputError naming the file if it is missing, damaged or of another shape.
    """
    state = load_torch(path)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path} does not hold weights, expected the state_dict of a {type(module).__name__}")
    _load_state(module, {name.removeprefix("module."): value for name, value in state.items()}, path)
    return module


def _load_state(module, state, path):
    expected = module.state_dict()
    for name, value in expected.items():
        found = tuple(state[name].shape) if name in state else "nothing"
        if found != tuple(value.shape):
            raise InputError(
                f"{path}: {name} is {found}, expected {tuple(value.shape)}: the weights are of another setting"
            )
    if extra := state.keys() - expected.keys():
        raise InputError(f"{path}: {min(extra)} is not a weight of this setting")
    module.load_state_dict(state)


# --------------------------------------------------------------------------------------------------------------
# the loop


def batch_size_at(args, share_done):
    """Pairs in the batch of a step: args.batch_size, growing geometrically to args.final_batch_size unless that is 0."""
    growth = (args.final_batch_size or args.batch_size) / args.batch_size
    return round(args.batch_size * growth**share_done)


LR_SCHEDULES = {
    "constant": lambda progress: 1.0,
    # warm up over the first tenth, then a half cosine down to nothing (Smith & Topin, 2018)
    "onecycle": lambda progress: (
        0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * progress / 0.1))
        if progress < 0.1
        else 1e-4 + 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))
    ),
}


@dataclasses.dataclass
class Progress:
    """Where a run stands: steps done, loss since the last line of the log, the log, seconds spent in the loop."""

    step: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    log: list = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def train(modules, compute_loss, args, directory, generators, device, monitor=None, every=None, rates=None):
    """Train `modules` for args.train_steps steps of Adam; returns the Progress at the end.

    modules: dict name → nn.Module; compute_loss(progress): a scalar tensor of one fresh batch, where progress in [0, 1)
    is the share of the steps done; generators: dict name → torch.Generator or what else has its get_state and set_state,
    every source of randomness that compute_loss uses, the order of the data too; monitor(): (dict column → number, text)
    for each line of the log, from random numbers of its own; every: (n, function), of which function(step) is called
    when n more steps are done; rates: dict name of a module → factor of its learning rate, 1 where there is none.
    Continues from checkpoint.pt if the directory has one. SIGINT and SIGTERM write a checkpoint, say how to resume and
    exit with 128 + the signal's number. Raises InputError if the loss is no longer finite, and if checkpoint.pt is damaged
    or of another run.
    """
    moving = [
        (name, parameter)
        for name, module in modules.items()
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    parameters = [parameter for _, parameter in moving]
    by_layer, by_module = fan_in_rates(modules) if args.layer_lr == "fan-in" else {}, rates or {}
    factors = [by_layer.get(id(parameter), 1.0) * by_module.get(name, 1.0) for name, parameter in moving]
    optimiser = (Muon if args.optimiser == "muon" else Adam)(parameters, factors)
    preconditioner = InputWhitening(modules) if args.preconditioner == "inputs" else None
    checkpoint = directory / "checkpoint.pt"
    progress = Progress()
    for module in modules.values():
        module.train()
    if checkpoint.exists():
        progress = _load_checkpoint(checkpoint, modules, optimiser, preconditioner, generators)
        print(f"resumed from step {progress.step} of {args.train_steps}")
    schedule = LR_SCHEDULES[args.lr_schedule]
    loss_sum = torch.tensor(progress.loss_sum, dtype=torch.float64, device=device)
    already, started = progress.seconds, time.perf_counter()
    bar = tqdm(
        total=args.train_steps, initial=progress.step, unit="step", disable=not sys.stderr.isatty(), smoothing=0.05
    )

    def mean_loss():
        loss = loss_sum.item() / max(progress.loss_steps, 1)
        for name, value in (("loss", loss), ("norm of the gradient", norm.item())):
            if not math.isfinite(value):
                raise InputError(
                    f"the {name} is {value} within the steps up to {progress.step}; lower --lr, or use --precision fp32"
                )
        return loss

    def save():
        mean_loss()  # what is not finite shall not take the place of the last checkpoint
        progress.loss_sum = loss_sum.item()
        progress.seconds = already + time.perf_counter() - started
        _save_checkpoint(checkpoint, progress, modules, optimiser, preconditioner, generators)
        write_csv(pd.DataFrame(progress.log), directory / "train_log.csv")

    with bar, _StopSignals() as stop:
        while progress.step < args.train_steps:
            share_done = progress.step / args.train_steps
            lr = args.lr * schedule(share_done)
            optimiser.zero_grad()
            if preconditioner:
                preconditioner.before_forward(progress.step)
            with matrix_precision(args.precision):
                with autocast(device, args.precision):
                    loss = compute_loss(share_done)
                loss.backward()
            # the graph is freed now: its nodes would lie between the next step's activations and scatter the heap
            loss = loss.detach()
            if preconditioner:
                preconditioner.precondition()
            norm = torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
            optimiser.step(lr)
            loss_sum += loss
            progress.step += 1
            progress.loss_steps += 1
            if every and progress.step % every[0] == 0:
                mean_loss()
                every[1](progress.step)
            if bar.update():
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if progress.step % args.log_steps == 0 or progress.step == args.train_steps:
                row = {
                    "step": progress.step,
                    "loss": mean_loss(),
                    "lr": lr,
                }
                row["seconds"] = round(already + time.perf_counter() - started, 3)
                columns, text = monitor() if monitor else ({}, "")
                progress.log.append({**row, **columns})
                loss_sum.zero_()
                progress.loss_steps = 0
                save()
                bar.write(_progress_line(progress, args.train_steps, text), file=sys.stdout)
                sys.stdout.flush()
            if stop.signal:
                save()
                bar.close()
                _end_by(stop.signal, f"after step {progress.step} of {args.train_steps}", args)
    return progress


def _end_by(number, where, args):
    print(
        f"stopped by {signal.Signals(number).name} {where}; the checkpoint is written, continue with: "
        f"python {Path(sys.argv[0]).name} --model-dir {args.model_dir} --model-id {args.model_id} --resume",
        file=sys.stderr,
    )
    sys.exit(128 + number)


@contextlib.contextmanager
def after_training(args):
    """Context of what follows `train`: SIGINT and SIGTERM, unless they are ignored, end it and say how to resume."""
    previous = {}
    with contextlib.suppress(ValueError):  # not in the main thread: the caller has the signals
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, lambda number, _: _end_by(number, "in the evaluation", args))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _progress_line(progress, total, text):
    row, previous = progress.log[-1], progress.log[-2] if len(progress.log) > 1 else {"step": 0, "seconds": 0.0}
    rate = (row["step"] - previous["step"]) / max(row["seconds"] - previous["seconds"], 1e-9)
    left = datetime.timedelta(seconds=round((total - row["step"]) / rate))
    return f"step {row['step']:>{len(str(total))}}/{total}  loss {row['loss']:.3f}  {text}  {rate:.1f} steps/s, {left} left"


def _save_checkpoint(path, progress, modules, optimiser, preconditioner, generators):
    save_torch(
        {
            "progress": dataclasses.asdict(progress),
            "modules": {name: module.state_dict() for name, module in modules.items()},
            "optimiser": optimiser.state_dict(),
            "preconditioner": preconditioner.state_dict() if preconditioner else None,
            "generators": {name: generator.get_state() for name, generator in generators.items()},
        },
        path,
    )


def _load_checkpoint(path, modules, optimiser, preconditioner, generators):
    content = load_torch(path)
    try:
        for name, module in modules.items():
            _load_state(module, content["modules"][name], path)
        optimiser.load_state_dict(content["optimiser"])
        if preconditioner:
            preconditioner.load_state_dict(content["preconditioner"])
        for name, generator in generators.items():
            generator.set_state(content["generators"][name])
        return Progress(**content["progress"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path} is not a checkpoint of this run ({type(error).__name__}: {error}); start anew with --overwrite"
        ) from None


def _checkpoint_step(path):
    """Steps done in a checkpoint; InputError that names a missing or damaged one."""
    content = load_torch(path)
    try:
        return int(content["progress"]["step"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path} is damaged; train the model anew with --overwrite") from None


class _StopSignals:
    """Context that notes the first SIGINT or SIGTERM in `signal` and leaves the second to do what it did before."""

    def __enter__(self):
        self.signal = None
        self._previous = {}
        with contextlib.suppress(ValueError):  # not in the main thread: the caller has the signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def __exit__(self, *exception):
        self._restore()
