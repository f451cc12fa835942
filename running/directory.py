"""The model directory: where a run lives, what it may overwrite, and its files.

    args.json               every flag as it came out, seed, dimensions of the encodings, versions, device, durations, digests of
                            weights and results; "finished": true is written last
    checkpoint.pt           weights, optimiser, step, every random state, the log so far: all that --resume needs
    checkpoint_before.pt    the one before, for the case that the last is damaged; a finished run has it no more
    train_log.csv           one row every --log-steps
    *.pt                    weights alone (state_dict), written when training ends

Every file is written beside its place and renamed, so a run killed at any moment leaves a directory that resumes. Weights that
are not those that args.json names are refused; a file that it does not name, as in older directories, is taken as it is.
"""

import contextlib
import datetime
import hashlib
import io
import itertools
import operator
import os
import platform
import re
import secrets
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from running.command_line import InputError
from running.devices import describe_device
from running.files import read_json, regular_file, replaced, write_bytes, write_json
from running.official import completed, is_official, own_names, shared_names
from running.staging import STAGED, recorded, settle

# Flags that args.json of earlier versions does not name, and what these versions did.
LATER_FLAGS = {"optimiser": "adam", "spare_dimensions": 0, "first_batch_size": 0, "hidden_sizes": "paper", "probes": "paper",
               "checkpoint_minutes": 10, "loss": "infonce", "latents": "gaussian", "save_encodings": False,
               "omission_prob": 0.0, "floor": False, "ceiling": "", "supervised": False}  # fmt: skip
LATER_DOWNSTREAM = {"probes": "paper"}  # the same of the record of a downstream evaluation
CHECKPOINT, CHECKPOINT_BEFORE = "checkpoint.pt", "checkpoint_before.pt"
# What scripts write into a model directory, beside weights.
OWN_FILES = (r"args\.json|checkpoint(_before)?\.pt|train_log\.csv|results(_seed\d+)?\.(csv|png)|encodings\.(npz|png)|"
             r"geometry\.csv|references\.csv|results_(predict|classify)\.csv|downstream\.png")  # fmt: skip
# Variables by which a user has libraries compute with other instructions than the processor's best.
KERNELS = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "OPENBLAS_CORETYPE")
# Of what else is in args.json.
KINDS = {"seed": int, "eval_seed": int, "finished": bool, "machines": list, "downstream": dict, "files": dict, "weights": dict}


def drawn_seed():
    """A seed for a run that was given none."""
    return secrets.randbelow(2**31)


def fresh_id(model_dir, name):
    """`name`, or the first of name-2, name-3, … that is no file in `model_dir`."""
    candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(candidate for candidate in candidates if not (Path(model_dir) / candidate).exists())


def find_directory(args, default_id):
    """Path of the model directory that the flags name; args.model_id, where it was not given, is set to a fresh name.

    Raises InputError for flags that exclude each other or need --model-id, for a --model-id that leads out of --model-dir, and
    for a file in the directory's place.
    """
    if sum((args.resume, args.overwrite, args.evaluate, args.export_official is not None)) > 1:
        raise InputError("--resume, --overwrite, --evaluate and --export-official exclude each other")
    if args.model_id is None:
        for flag in ("resume", "evaluate", "load_args", "export_official"):
            if getattr(args, flag):
                raise InputError(f"--{flag.replace('_', '-')} needs --model-id, the folder of a model in {args.model_dir}")
        args.model_id = fresh_id(args.model_dir, default_id)
    name = Path(args.model_id)
    if name.is_absolute() or ".." in name.parts or not name.parts:
        raise InputError(f"--model-id {args.model_id!r} names no folder inside --model-dir {args.model_dir}")
    directory = Path(args.model_dir) / name
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file, expected the folder of a model")
    return directory


def adopt_stored_flags(args, given, parser, directory):
    """Set the flags of `args` that may not differ, or were not given, to what args.json of the directory has, in place.

    Nothing is adopted where there is no args.json to go on from. Raises InputError if it lacks a flag or has a value that
    the script's Parser would refuse, and if a flag given contradicts it and --load-args was not.
    """
    args_file = directory / "args.json"
    if not (args.evaluate or args.load_args or (args.resume and args_file.exists())):
        return
    stored = known_args(directory, parser)
    own = parser.names("call") | (given & parser.names("freely", "again"))
    if args.evaluate:
        own |= {"seed", *parser.freely}  # of the evaluation
    for name in [name for name in vars(args) if name not in own]:
        check_stored_value(name, stored, args_file, parser)
        if name in given and getattr(args, name) != stored[name]:
            flag = f"--{name.replace('_', '-')}"
            if not args.load_args:
                raise InputError(f"{flag} {getattr(args, name)} contradicts {stored[name]} in {args_file}; "
                                 "leave the flag out, or take what is stored with --load-args")  # fmt: skip
            print(f"{flag} {stored[name]} is taken from {args_file}, not {getattr(args, name)}")
        setattr(args, name, stored[name])


def check_stored_value(name, stored, args_file, parser):
    """Raise InputError unless args.json, the dict `stored`, has a value that the script's Parser gives the flag `name`."""
    if name not in stored:
        raise InputError(f"{args_file} has no {name!r}: it is damaged, or another script's")
    flag, value = f"--{name.replace('_', '-')}", stored[name]
    words = [] if value is False else [flag] if value is True else [f"{flag}={value}"]
    try:
        parsed = getattr(parser.parse(words)[0], name)
    except InputError:
        parsed = None
    if parsed != value or value is None:
        raise InputError(f"{args_file} is damaged: {value!r} is no value of {flag}")


def trained_args(directory, experiment_class):
    """(args, stored) of a finished model: its flags as a Namespace, checked as --evaluate does, and the dict of args.json.

    Raises InputError if args.json is missing or damaged, or says that the model is not finished.
    """
    if not is_finished(directory):
        raise InputError(f"{directory} holds no finished model")
    parser = experiment_class.parser()
    stored = known_args(directory, parser)
    args, _ = parser.parse(["--evaluate"])
    for name in [name for name in vars(args) if name not in parser.freely]:
        check_stored_value(name, stored, Path(directory) / "args.json", parser)
        setattr(args, name, stored[name])
    experiment_class.settle(args)
    return args, stored_args(directory)


def refuse_to_overwrite(args, directory, parser):
    """Raise InputError if the directory holds a model or other files that the flags do not say to go on from or to give up."""
    if (directory / "args.json").exists():
        if args.overwrite:
            _refuse_what_is_no_model(directory, parser)
        if not (args.resume or args.evaluate or args.overwrite):
            if is_finished(directory):
                raise InputError(f"{directory} holds a finished model; --evaluate evaluates it again, --overwrite trains it anew")
            raise InputError(f"{directory} holds an unfinished run; --resume continues it, --overwrite starts it anew")
    elif any(directory.glob("[!.]*")):  # a run killed as it began leaves no more than a hidden file
        raise InputError(f"{directory} holds files but no args.json: it is no model; choose another --model-id")


def _refuse_what_is_no_model(directory, parser):
    try:
        stored = read_json(directory / "args.json")
    except InputError:  # cut short, by whatever: nobody else's file is of that name
        return
    if lacking := shared_names(parser) - {*stored, *LATER_FLAGS}:
        raise InputError(f"{directory / 'args.json'} has no {min(lacking)!r}: it is of no model of this script, which "
                         "--overwrite could give up; choose another --model-id")  # fmt: skip


def stored_args(directory):
    """Dict of args.json of a model directory; InputError if it is missing or damaged."""
    file = Path(directory) / "args.json"
    stored = read_json(file)
    if "seed" not in stored:
        raise InputError(f"{file} is damaged: it has no seed")
    for name, kind in KINDS.items():
        value = stored.get(name, kind())
        if type(value) is not kind or (kind is int and value < 0):
            raise InputError(f"{file} is damaged: its {name!r} is {value!r}")
    if "results.csv" in stored.get("files", {}) and "eval_seed" not in stored:
        raise InputError(f"{file} is damaged: it has the results of an evaluation and not its 'eval_seed'")
    return stored


def known_args(directory, parser):
    """`stored_args`, with what earlier versions and the code behind the paper's figures did where a flag of ours is missing."""
    stored = stored_args(directory)
    if is_official(stored):
        stored = completed(stored, parser)
        encoders = [path for name in ("f_x", "encoder_img") if (path := Path(directory) / f"{name}.pt").exists()]
        if stored.get("encoding_size") == 0 and encoders:  # their default is not ours
            stored["encoding_size"] = encoding_size(read_weights(encoders[0]))
    return LATER_FLAGS | stored


def is_finished(directory):
    """Whether the run in `directory` has ended: trained, evaluated, all files written."""
    stored = stored_args(directory) if (Path(directory) / "args.json").exists() else {"finished": False}
    return bool(stored.get("finished", is_official(stored)))


def own_files(directory, weight_files, half_written=False):
    """List of the files in `directory` that a training script with these files of weights writes, or those half-written."""
    stems = "|".join(re.escape(Path(name).stem) for name in weight_files)
    own = rf"{OWN_FILES}|({stems})(_\d+)?\.pt"
    pattern = re.compile(rf"\.({own}|check)\.\w+(\.\w+)?" if half_written else own)
    return [path for path in sorted(directory.iterdir()) if pattern.fullmatch(path.name) and not path.is_dir()]


def tidy(directory, weight_files):
    """End what a killed process had begun in a directory that nobody else works in: its evaluation, and half-written files."""
    settle(directory)
    if (directory / STAGED).exists():
        shutil.rmtree(directory / STAGED)
    for file in own_files(directory, weight_files, half_written=True):
        file.unlink()


def start_directory(directory, args, details, weight_files):
    """Write args.json: the flags, and `details` of the run. Removes what --overwrite gives up, and nothing of anybody else's.

    Raises OSError if no file can be made there, and InputError if the removal of an earlier model fails halfway.
    """
    check_writable(directory)
    removed = None
    try:
        if args.overwrite:
            with contextlib.suppress(InputError):
                # killed from here on, this is the earlier run, which --resume ends once more
                write_json(directory / "args.json", {**read_json(directory / "args.json"), "finished": False})
            for file in own_files(directory, weight_files):
                if file.name != "args.json":
                    file.unlink()
                    removed = file
        write_args(directory, args, {**details, "finished": False})
    except OSError as error:
        if removed:
            raise InputError(f"{error.strerror}: {error.filename}; the earlier model is removed in part, go on with the same "
                             "command, or with --resume to train it once more") from None  # fmt: skip
        raise


def take_evaluation_seed(args, directory, parser, weight_files):
    """(stored, seed): `known_args` of the model that --evaluate evaluates, and the evaluation's seed, drawn if not given.

    Raises InputError if the seed is that of the training or the model is not trained to its end, and OSError if the results
    could not be written.
    """
    stored, seed = known_args(directory, parser), args.seed
    if not is_finished(directory):
        if (step := checkpoint_step(directory)) < args.train_steps:
            raise InputError(f"{directory} is trained for {step} of {args.train_steps} steps; --resume continues it")
        if not set(weight_files) <= stored.get("weights", dict.fromkeys(weight_files)).keys():
            raise InputError(f"{directory} is trained, but its weights are not written yet; --resume does that")
    if seed is None:
        seed = next(seed for seed in iter(drawn_seed, None) if seed != stored["seed"])
    if seed == stored["seed"]:
        raise InputError(f"--seed {seed} is the training seed of {directory}; evaluate with another one")
    check_writable(directory)
    return stored, seed


def keep_results(directory, folder, earlier_seed, seed):
    """Copy the results of an earlier evaluation with another seed into `folder`, as results_seed{N}.csv and .png."""
    for file in (directory / "results.csv", directory / "results.png"):
        if earlier_seed not in (None, seed) and file.exists():
            write_bytes(folder / f"results_seed{earlier_seed}{file.suffix}", regular_file(file).read_bytes())


def check_writable(directory):
    """Raise OSError if no file can be made in `directory`, or its disk is full."""
    try:
        with tempfile.TemporaryFile(dir=directory, prefix=".check.") as file:
            file.write(bytes(2**20))
            file.flush()
    except OSError as error:
        error.filename = str(directory)
        raise


def write_args(directory, args, details):
    """args.json: every flag that says what was trained and evaluated, then `details`."""
    of_the_call = ("resume", "overwrite", "evaluate", "load_args", "export_official")
    flags = {name: value for name, value in vars(args).items() if name not in of_the_call}
    write_json(directory / "args.json", {**flags, **details})


def provenance(device):
    """Dict of where and with what a run was made: versions, git commit, device, start time."""
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        # whoever owns the repository, which git would ask: its code runs already
        command = ["git", "-c", "safe.directory=*", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        commit = done.stdout.strip()
    asked = [f"{name}={os.environ[name]}" for name in KERNELS if os.environ.get(name)]
    return {
        "device": describe_device(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": " ".join(asked) or "default kernels",
        "git_commit": commit,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def check_machine(directory, stored, details, no_cuda_given):
    """Dict of args.json's "machines", all that worked on a run that is resumed; says in one line what has changed since.

    stored: args.json; details: `provenance` of this machine. Raises InputError if the run was on a GPU and this one is not,
    unless --no-cuda was given.
    """
    now = {name: details[name] for name in ("device", "cpu_capability", "kernels", "versions")}
    machines = stored.get("machines") or [{name: stored.get(name) for name in now}]
    last = machines[-1] if isinstance(machines[-1], dict) else {}
    last = {name: last.get(name) for name in now}
    was_on_gpu = isinstance(last["device"], str) and not last["device"].startswith("CPU ")
    if was_on_gpu and now["device"].startswith("CPU ") and not no_cuda_given:
        raise InputError(
            f"{directory} was trained on {last['device']}, and no CUDA device is found here; --no-cuda goes on with it on the CPU"
        )
    changed = [f"{last[name]}, now {value}" for name, value in now.items() if last[name] not in (None, value)]
    if changed:
        print(f"another machine than before ({'; '.join(changed)}): results may differ in their last digits")
        machines = [*machines, now]
    return {"machines": machines}


# tensors on disk


def save_torch(content, path, keep=None):
    """torch.save, whole or not at all; a full disk is an OSError. keep: path that what was there before is renamed to."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replaced(path, keep) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_torch(path):
    """What `save_torch` wrote, on the CPU; InputError that names a missing or damaged file."""
    try:
        if Path(path).is_dir():
            raise IsADirectoryError
        content = regular_file(path).read_bytes()
        if zipfile.is_zipfile(io.BytesIO(content)):
            archive = zipfile.ZipFile(io.BytesIO(content))
            # torch.save compresses nothing: a small file that inflates to gigabytes is not one of its own
            if sum(member.file_size for member in archive.infolist()) > len(content):
                raise InputError(f"{path} is damaged (it holds more than its size); restore it, or train the model anew")
            if member := archive.testzip():  # torch reads an archive's members without their checksums
                raise InputError(f"{path} is damaged ({member} has another checksum); restore it, or train the model anew")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} is missing: the model is not trained, or the directory is incomplete") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory, expected a file of weights") from None
    except Exception as error:  # torch raises half a dozen types for a damaged archive
        raise InputError(f"{path} is damaged ({type(error).__name__}); restore it, or train the model anew") from None


def has_checkpoint(directory):
    """Whether there is a checkpoint to go on from."""
    return any((directory / name).exists() for name in (CHECKPOINT, CHECKPOINT_BEFORE))


def save_checkpoint(content, directory):
    """Write the checkpoint; the one before is kept."""
    save_torch(content, directory / CHECKPOINT, keep=directory / CHECKPOINT_BEFORE)


def load_checkpoint(directory):
    """(content, path) of the last checkpoint, or of the one before if the last is missing or damaged, which is said in a line.

    Raises InputError that names the last if there is no other.
    """
    last, before = directory / CHECKPOINT, directory / CHECKPOINT_BEFORE
    try:
        return load_torch(last), last
    except InputError as error:
        if not before.exists():
            raise
        reason = str(error).split("; ")[0]
    content = load_torch(before)
    print(f"{reason}: {before} takes its place")
    return content, before


def checkpoint_step(directory):
    """Steps done in the checkpoint; InputError that names a missing or damaged one."""
    content, path = load_checkpoint(directory)
    try:
        return operator.index(content["progress"]["step"])
    except (KeyError, TypeError):
        raise InputError(f"{path} is damaged; train the model anew with --overwrite") from None


def save_weights(state, path):
    """Write a state_dict, without the prefix `module.` of wrappers."""
    save_torch({name.removeprefix("module."): value.cpu() for name, value in state.items()}, path)


def read_weights(path):
    """The state_dict of a network's file, under our names.

    Raises InputError that names the file if it is missing or damaged, or not what args.json beside it knows by a digest.
    """
    state = _state_dict(path)
    _check_digest(state, path)
    return state


def _state_dict(path):
    state = load_torch(path)
    if not isinstance(state, dict) or not all(isinstance(name, str) and _is_dense(value) for name, value in state.items()):
        raise InputError(f"{path} does not hold weights, expected a state_dict")
    return own_names(Path(path).stem, state)


def _check_digest(state, path):
    path = Path(path)
    if recorded(path.parent, "weights").get(path.name, digest := _weights_digest(state)) != digest:
        raise InputError(f"{path} is not of this run: args.json names other weights; restore it, or train the model anew")


def _weights_digest(state):
    """SHA-256 of a state_dict's names, types, shapes and bytes, whatever archive it lay in."""
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        found.update(value.detach().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def weights_digests(directory, names):
    """Dict name → digest of what these files of weights hold."""
    return {name: _weights_digest(_state_dict(directory / name)) for name in names}


def _is_dense(value):
    return isinstance(value, torch.Tensor) and value.layout is torch.strided


def encoding_size(state):
    """Dimensions of the encodings of an encoder's state_dict, whose last weight is the bias of its last layer."""
    return len(list(state.values())[-1])


def load_weights(module, path):
    """Load a network's file into `module`; returns the module. InputError as `read_weights`, and if the shapes differ."""
    state = _state_dict(path)
    load_state(module, state, path)
    _check_digest(state, path)
    return module


def load_state(module, state, path):
    """Load a state_dict that was read from `path` into `module`; InputError if it is of another setting."""
    expected = module.state_dict()
    for name, value in expected.items():
        found = tuple(state[name].shape) if _is_dense(state.get(name)) else "nothing"
        if found != tuple(value.shape):
            raise InputError(f"{path}: {name} is {found}, expected {tuple(value.shape)}: the weights are of another setting")
    if extra := state.keys() - expected.keys():
        raise InputError(f"{path}: {min(extra)} is not a weight of this setting")
    module.load_state_dict(state)
