"""The tasks of this repository: small runs of every script that writes into a model directory, and what of it counts."""

import contextlib
import functools
import importlib
import io
import json
import re
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from running.pictures import save_figure
from running.staging import settle
from torture.children import Fault, run
from torture.trials import Task, empty

# what a run that goes on may have otherwise; the commit, since somebody may work here meanwhile
OTHERWISE = {"started", "seconds", "train_seconds", "eval_seconds", "machines", "git_commit"}
MODEL, PLACE = "models/m", "--model-dir models --model-id m"
DOWNSTREAM = f"--model-id {MODEL} --num-eval-batches 1 --no-cuda"
NUMERIC = "--no-cuda --semantics-n 3 --modality-n 1 --theta-value 3 --num-eval-batches 1 --seed 3 --log-steps 6 --train-steps 14"
IMAGES = "--no-cuda --seed 5 --train-steps 5 --log-steps 3 --checkpoint-steps 2 --hidden-size 4 --batch-size 8"
FAST_IMAGES = f"{IMAGES} --recipe fast --whitening-pairs 8 --precision fp32"
FAST_NUMERIC = f"{NUMERIC} --recipe fast --precision fp32 --batch-size 8 --final-batch-size 24 --spare-dimensions 2 --mlp-eval"
TRAININGS = {
    "numeric, fast": ("main_numeric", "", FAST_NUMERIC),
    "numeric, paper": ("main_numeric", "", f"{NUMERIC} --batch-size 16 --causal-dependence --beta-value 1"),
    "MPI3D": ("main_mpi3dreal", "mpi3d", f"{FAST_IMAGES} --bias-id 2 --datapath data --save-all-checkpoints"),
    "Causal3DIdent": ("main_causal3dident", "causal3dident", f"{FAST_IMAGES} --first-batch-size 12 --bias-id 3 --datapath data"),
}  # script, data, flags
IN_FULL = ("numeric, fast", "Causal3DIdent")  # what goes on and what evaluates is the same of all


def load(*modules):
    """Import these modules, and make what a trial need not compute at full size small: it is about files."""
    for module in modules:
        importlib.import_module(module)
    for (module, name), value in SMALL.items():
        if module in sys.modules:
            setattr(sys.modules[module], name, value)
    tqdm.set_lock(threading.RLock())  # its own is one for all forks: a child that is killed with it would stop the others


def warm(call, folder):
    """Run a script in this process, once: what it imports and fills its caches with, its children need not."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        call()


def small_network(weights, num_classes):
    """Stands for the ResNet-18, whose checkpoints have 130 MB."""
    convolutions = [nn.Conv2d(3, 8, 7, stride=4, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False)]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


def small_picture(scores, *rest):
    """Stands for the pictures of results, which take half of a run's time: a grey pixel for each score."""
    tables = scores.values() if isinstance(next(iter(scores.values())), pd.DataFrame) else [pd.Series(scores)]
    figure = plt.figure(figsize=(1, 1))
    figure.figimage(np.concatenate([table.to_numpy(float).ravel() for table in tables])[None])
    save_figure(figure, next(path for path in rest if isinstance(path, Path)))


SMALL = {
    ("main_numeric", "EVAL_BATCH"): 128,
    ("main_numeric", "FAST_PROBES"): (10, 10.0),
    ("eval_numeric_predict", "STEPS"): 20,
    ("latent_spaces", "CONDITION_DRAWS"): 200,
    ("mlp_probes", "MAX_EPOCHS"): 10,
    ("eval_numeric_predict", "FAST_STEPS"): (20, 20),
    ("image_text", "PROBE_STEPS"): {"code": 10, "paper": 10},
    ("image_text", "MONITOR_PAIRS"): 24,
    ("probes", "threadpool_limits"): lambda *_, **__: contextlib.nullcontext(),  # there is one thread
    ("torchvision.models", "resnet18"): small_network,
    ("eval_numeric_predict", "plot_downstream_scores"): small_picture,
    **{(module, "plot_factor_scores"): small_picture for module, *_ in TRAININGS.values()},
}  # what `load` sets


def script(module, flags):
    """Function that runs the main of a script with these flags."""

    def call():
        sys.argv = [f"{module}.py", *flags.split()]
        return sys.modules[module].main()

    return call


# what counts


def plain(value):
    """A nest of dicts, lists and tensors as one that can be compared bit for bit, without durations and times."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {name: plain(content) for name, content in value.items() if name not in OTHERWISE}
    return [plain(content) for content in value] if isinstance(value, list | tuple) else repr(value)


def content(file):
    """What counts of a file: its bytes, but for times and durations; its bytes where it cannot be read as what it is."""
    readers = {
        "args.json": lambda: json.loads(file.read_text()),
        "train_log.csv": lambda: pd.read_csv(file, dtype=str).to_dict("list"),
    }
    read = readers.get(file.name) or ((lambda: torch.load(file, weights_only=True)) if file.suffix == ".pt" else file.read_bytes)
    try:
        return plain(read())
    except Exception:  # of a damaged file, whatever reads it raises
        return file.read_bytes()


def outcome(folder):
    """Dict path → content of all files below a folder, but for locks, logs, and captions' tokens, which are kept if they can be.

    What is made of data says by their files' times, in its name or within, what it was made of: that is left out.
    """
    found = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        path = file.relative_to(folder)
        if not re.fullmatch(r".*\.(lock|checked)|tokens.*\.npz", file.name) and "logs" not in path.parts:
            found[str(path.with_name(re.sub(r"^(images)\.[0-9a-f]+(\.npy)$", r"\1\2", file.name)))] = content(file)
    return found


# the tasks


# Stands for a training script where reproduce.py starts one, in a process of its own.
STAND_IN = """import shlex, sys
sys.path.insert(0, {root!r})
from running.command_line import run_script
from torture import project
project.load({module!r})
run_script(project.script({module!r}, shlex.join(sys.argv[1:])))
"""
ROOT = Path(__file__).parents[1]


GRID = ["run", "fig3", "--scale", "tiny", "--seeds", "1", "--jobs", "1", "--cpus-per-job", "1"]


def grid():
    """`reproduce.py run` of one figure, which needs one small model and its downstream tasks; the scripts lie in the folder."""
    import reproduce
    from grids import cells, figures, models, numeric

    flags = FAST_NUMERIC.replace("--seed 3", "")
    setting = models.Setting(sys.modules["main_numeric"].NumericExperiment, "tiny", "small", "main_numeric.py", flags)
    parts = [cells.Cell({}, (), "", "", setting, file, {}, "") for file in (numeric.RESULTS, numeric.PREDICT)]
    models.ROOT, figures.FIGURES = Path.cwd(), {"fig3": cells.Figure("fig3", "", "numeric", lambda *_: parts)}
    return reproduce.main(GRID)


def make_data(folder):
    """The smallest data sets of both experiments on images, under `folder`."""
    from datasets import MPI3D_GRID
    from rendering_data.Causal3DIdent import generate_latents, generate_text
    from rendering_data.MPI3D.render_multimodal_mpi3d import render
    from rendering_data.MPI3D.render_standin_images import MPI3D_FILE, write_images

    sizes = dict(zip(MPI3D_GRID, (4, 4, 2, 3, 2, 1, 1), strict=True))
    (folder / "mpi3d").mkdir(parents=True)
    write_images(folder / "mpi3d" / MPI3D_FILE, sizes, 32)
    render(folder / "mpi3d", sizes, train_ratio=0.75, seed=0)
    place = folder / "causal3dident"
    generate_latents.main(["--output-folder", str(place), "--n-points", "150", "--seed", "0"])
    generate_text.main(["--output-folder", str(place)])
    (place / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (150, 16, 16, 3), np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(place / "images" / f"{number:03d}.png")


def one_of_both(folder, before, after):
    """Complaint about a model directory whose results and picture are not all of before the call, or all of after it.

    As whoever reads the model sees them: a process killed between two renames leaves the rest to its next reader.
    """
    with tempfile.TemporaryDirectory() as temporary:
        seen = Path(shutil.copytree(folder, Path(temporary) / "seen"))
        settle(seen / MODEL)
        found = outcome(seen)
    results = {name for name in before | after if "/results" in name or "/downstream" in name}
    part = {name: found.get(name) for name in results}
    if part not in ({name: state.get(name) for name in results} for state in (before, after)):
        return ["the results are neither those of before the call nor the new ones"]
    return []


def tasks(work):
    """(tasks, pairs of calls that race): what they start from is made under `work`."""
    load("eval_numeric_predict", "image_text", "torchvision.models", *(module for module, *_ in TRAININGS.values()))
    make_data(empty(work / "data"))
    found, pairs, reads = [], [], (f"{MODEL}/*.pt", f"{MODEL}/args.json")

    def made(name, data, call=None, fault=None):
        """Folder with a data set, where there is one, in which a script has run, to its end unless there is a Fault."""
        folder = empty(work / name)
        if data:
            shutil.copytree(work / "data" / data, folder / "data")
        code, said = run(call, folder, fault, None if fault else f"{folder}.trace") if call else (0, "")
        if code and not fault:
            raise RuntimeError(f"{name} ends with exit code {code} by itself: {said}")
        return folder

    def task(name, start, call, again=None, **more):
        return Task(name, functools.partial(shutil.copytree, start, dirs_exist_ok=True), call, again or call, outcome, **more)

    for name, (module, data, flags) in TRAININGS.items():
        flags = f"{flags} {PLACE}"
        call = functools.partial(script, module)
        warm(call(flags), made("warm", data))
        anew, finished = made(f"{name} anew", data), made(f"{name} finished", data, call(flags))
        operations = Path(f"{finished}.trace").read_text().splitlines()
        logged = [number for number, line in enumerate(operations) if line.startswith("rename") and "train_log.csv" in line]
        begun = made(f"{name} begun", data, call(flags), Fault("kill", at=logged[1] + 1))
        training = task(f"{name}, training", anew, call(flags), call(f"{flags} --resume"))
        resuming = task(f"{name}, --resume", begun, call(f"{flags} --resume"), reads=reads)
        evaluating = task(
            f"{name}, --evaluate", finished, call(f"{PLACE} --evaluate --seed 9 --no-cuda"), whole=one_of_both, reads=reads
        )
        found += [training, resuming, evaluating] if name in IN_FULL else [training]
        pairs += [(resuming, resuming)] if name in IN_FULL else []
        if name == "numeric, fast":
            other = flags.replace("--seed 3", "--seed 8")
            overwriting = task(f"{name}, --overwrite", finished, call(f"{other} --overwrite"))
            downstream = task("downstream tasks", finished, script("eval_numeric_predict", DOWNSTREAM), reads=reads)
            found += [overwriting, downstream]
            pairs += [(training, task("training by another seed", anew, call(other))),
                      (training, task("--overwrite by another seed", anew, call(f"{other} --overwrite"))),
                      (resuming, task("--overwrite by another seed", begun, call(f"{other} --overwrite"))),
                      (overwriting, task("--overwrite by the seed that was", finished, call(f"{flags} --overwrite"))),
                      (evaluating, task("--evaluate by another seed", finished, call(f"{PLACE} --evaluate --seed 7 --no-cuda"))),
                      (evaluating, downstream), (downstream, downstream)]  # fmt: skip
    scripts = empty(work / "grid")
    for module in ("main_numeric", "eval_numeric_predict"):
        (scripts / f"{module}.py").write_text(STAND_IN.format(root=str(ROOT), module=module))
    found.append(task("reproduce.py run", scripts, grid, costly=True))
    return found, pairs
