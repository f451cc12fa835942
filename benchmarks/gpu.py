"""All that is open about a GPU, in one command: is it correct there, does it resume, how fast is it.

    python benchmarks/gpu.py                           # one GPU, at most eight minutes; writes gpu.md
    python benchmarks/gpu.py --only step images        # some sections alone
    python benchmarks/gpu.py --device cpu --small      # everything that a CPU can do, to see that it runs

Each section runs in a process of its own with a time limit. What this machine has not (a GPU, Blender) is skipped with its
reason, a section that fails is named, and the next one goes on. It ends with a table to paste into benchmarks/README.md.
The exit code is 2 if a section failed or something measured is outside its bound.
"""

import argparse
import contextlib
import dataclasses
import datetime
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch

from main_causal3dident import Causal3dIdentExperiment
from main_mpi3dreal import Mpi3dExperiment
from main_numeric import NumericExperiment
from running.command_line import Parser, run_script
from running.devices import describe_device
from running.files import write_bytes
from running.optimisation import GRADIENT_NORM, make_optimiser, training_step

ROOT = Path(__file__).resolve().parents[1]
SECONDS = {"correct": 60, "resume": 50, "step": 80, "graph": 30, "evaluation": 60, "images": 60, "rendering": 50, "together": 50}
SMALL = "--semantics-n 4 --modality-n 2 --theta-value 10 --batch-size 128 --num-eval-batches 1"
LOSS_BOUND, GRADIENT_BOUND, SCORE_BOUND = 1e-5, 1e-3, 0.05  # between a GPU and a CPU, in fp32


class Skipped(Exception):
    """A section that this machine cannot run, and why."""


def script(name, *flags, check=True):
    """CompletedProcess of a script of the repository."""
    command = [sys.executable, str(ROOT / name), *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{name} ended with exit code {done.returncode}: {done.stderr.strip().splitlines()[-2:]}")
    return done


def on(options):
    """Flags that keep a script on the device of the options."""
    return ["--no-cuda"] if options.device == "cpu" else []


def model_of(experiment, flags, device):
    """A model of an experiment with its weights drawn, on a device."""
    args, _ = experiment.parse_flags(["--seed", "0", *flags])
    experiment.settle(args)
    args.precision = "fp32" if args.precision == "auto" else args.precision
    model = experiment(args, torch.device(device))
    with tempfile.TemporaryDirectory() as folder:
        model.draw(Path(folder))
    return model


def milliseconds(step, device, count):
    """(median, lowest, highest) milliseconds of `count` calls after three of warm-up."""
    times = []
    for _ in range(count + 3):
        torch.get_device_module(device).synchronize()
        started = time.perf_counter()
        step()
        torch.get_device_module(device).synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[3:]), min(times[3:]), max(times[3:])


# What each section measures: a list of rows (what, figure, whether it is within its bound or None)


def correct(options, data):
    """Loss and gradients of one batch on the device and on the CPU, and the scores of a short run on both."""
    rows = []
    for experiment, flags in (
        (NumericExperiment, SMALL.split()),
        (NumericExperiment, [*SMALL.split(), "--recipe", "fast"]),
        (Mpi3dExperiment, ["--datapath", data / "mpi3d", "--batch-size", "32"]),
        (Mpi3dExperiment, ["--datapath", data / "mpi3d", "--batch-size", "32", "--protocol", "paper"]),
        (Causal3dIdentExperiment, ["--datapath", data / "causal3dident", "--batch-size", "16"]),
    ):
        flags = [str(flag) for flag in flags]
        losses, gradients = [], []
        for device in ("cpu", options.device):
            model = model_of(experiment, flags, device)
            if experiment is NumericExperiment:  # generators of two devices give other numbers
                generator, latents = torch.Generator().manual_seed(0), model_of(experiment, flags, "cpu").latents
                model.latents.sample = lambda count, _, g=generator, sample=latents.sample, to=device: moved(sample(count, g), to)
            loss = model.loss(0.5)
            parameters = [parameter for module in model.modules.values() for parameter in module.parameters()]
            losses.append(loss.item())
            gradients.append(torch.cat([g.flatten().cpu() for g in torch.autograd.grad(loss, parameters)]).double())
        name = f"{experiment.name} {' '.join(flags[-2:])}"
        loss_error = abs(losses[0] - losses[1]) / abs(losses[0])
        gradient_error = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
        rows.append((f"{name}: loss against the CPU", f"{loss_error:.1e}", loss_error < LOSS_BOUND))
        rows.append((f"{name}: gradients against the CPU", f"{gradient_error:.1e}", gradient_error < GRADIENT_BOUND))
    scores = {}
    with tempfile.TemporaryDirectory() as models:
        for device in ("cpu", options.device):
            flags = f"--recipe fast {SMALL} --train-steps 300 --final-batch-size 256 --mlp-eval --seed 0 --model-dir {models}"
            more = ["--no-cuda"] if device == "cpu" else []
            script("main_numeric.py", *flags.split(), "--model-id", device, "--precision", "fp32", "--overwrite", *more)
            scores[device] = pd.read_csv(Path(models) / device / "results.csv").r2_nonlinear.clip(lower=0)
    difference = (scores["cpu"] - scores[options.device]).abs().max()
    rows.append(("R² of a short run, largest difference from the CPU", f"{difference:.3f}", bool(difference < SCORE_BOUND)))
    return rows


def moved(z, device):
    """Latents on another device."""
    return type(z)(*(getattr(z, field.name).to(device) for field in dataclasses.fields(z)))


def resume(options, data):
    """A run that is killed and resumed against one that is not, by the bytes of its weights."""
    flags = [*SMALL.split(), "--train-steps", "120", "--log-steps", "20", "--seed", "3", "--mlp-eval", *on(options)]
    with tempfile.TemporaryDirectory() as models:
        script("main_numeric.py", *flags, "--model-dir", models, "--model-id", "whole")
        command = [sys.executable, "main_numeric.py", *flags, "--model-dir", models, "--model-id", "killed"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (Path(models) / "killed/checkpoint.pt").exists():
            time.sleep(0.02)
        process.kill()
        process.wait()
        script("main_numeric.py", "--resume", "--model-dir", models, "--model-id", "killed", *on(options))
        names = ("f_x.pt", "f_t.pt")
        whole, killed = ([torch.load(Path(models) / m / n, weights_only=True) for n in names] for m in ("whole", "killed"))
    difference = max((a[k] - b[k]).abs().max().item() for a, b in zip(whole, killed, strict=True) for k in a)
    words = "the same bits" if difference == 0 else f"weights differ by {difference:.1e}"
    return [("killed and resumed against never stopped", words, difference < 1e-3)]


def step(options, data):
    """Time and memory of a step in each precision against the plain form, and of the floor: benchmarks/numeric_step.py."""
    flags = ["--rounds", "1", "--steps", "5" if options.small else "20", "--device", options.device]
    out = script("benchmarks/numeric_step.py", *flags, *(["--small"] if options.small else [])).stdout
    rows = []
    for line in out.splitlines():
        if found := re.match(
            r" *(plain|fp32|tf32|bf16) +([\d.]+)s +([\d.]+) - +([\d.]+)s +([\d.]+)x +([\d.]+) GB .* ([\d.]+)$", line
        ):
            form, median, low, high, ratio, memory, floor = found.groups()
            milli = [1e3 * float(value) for value in (median, low, high)]
            rows.append((f"numeric step, {form}", f"{milli[0]:.2f} ms ({milli[1]:.2f} to {milli[2]:.2f}), {ratio}× the plain "
                         f"form, {memory} GB, {floor} of the floor", None))  # fmt: skip
    return [*rows, ("numeric step, exactness", out.strip().splitlines()[-1], None)]


def graph(options, data):
    """Forward and backward of a step captured once as a CUDA graph and replayed, against the step as it is trained."""
    if options.device != "cuda":
        raise Skipped("CUDA graphs need a GPU")
    model = model_of(NumericExperiment, SMALL.split() if options.small else [], "cuda")
    optimiser = make_optimiser(model.modules, model.args, model.rates)
    eager = milliseconds(lambda: training_step(model, optimiser, 0.0), "cuda", 30)
    captured, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    captured.register_generator_state(model.generators["train"])
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimiser.zero_grad()
            model.loss(0.0).backward()
    torch.cuda.current_stream().wait_stream(side)
    optimiser.zero_grad()
    with torch.cuda.graph(captured):
        model.loss(0.0).backward()

    def replayed():
        captured.replay()
        torch.nn.utils.clip_grad_norm_(optimiser.parameters, GRADIENT_NORM)
        optimiser.update(model.args.lr)

    replay = milliseconds(replayed, "cuda", 30)
    return [("numeric step as it is trained", "{:.2f} ms ({:.2f} to {:.2f})".format(*eager), None),
            ("the same, captured as a CUDA graph", "{:.2f} ms ({:.2f} to {:.2f})".format(*replay), None)]  # fmt: skip


def evaluation(options, data):
    """Seconds of an evaluation with MLPs, with kernel ridge regression, and of the downstream probes of one model."""
    rows, size = [], SMALL.split() if options.small else ["--theta-value", "385"]
    with tempfile.TemporaryDirectory() as models:
        place = ["--model-dir", models, "--model-id", "m"]
        script("main_numeric.py", *size, "--train-steps", "1", "--seed", "0", *place, *on(options), "--mlp-eval")
        for name, flags in (("MLP probes", ["--mlp-eval"]), ("kernel ridge regression", [])):
            if name != "MLP probes":
                args = json.loads((Path(models) / "m/args.json").read_text())
                write_bytes(Path(models) / "m/args.json", json.dumps(args | {"mlp_eval": False}).encode())
            started = time.perf_counter()
            script("main_numeric.py", "--evaluate", "--seed", "7", *place, *on(options), *flags)
            rows.append((f"evaluation with {name}, a process", f"{time.perf_counter() - started:.1f} s", None))
        if not options.small:
            started = time.perf_counter()
            script("eval_numeric_predict.py", "--model-id", f"{models}/m", *on(options))
            rows.append(("downstream probes, 10,000 steps, a process", f"{time.perf_counter() - started:.1f} s", None))
    return rows


def images(options, data):
    """Images a second of training from images on the device: benchmarks/mpi3d_step.py."""
    flags = ["--datapath", data / "mpi3d", "--device", options.device, "--steps", "2" if options.small else "50"]
    out = script("benchmarks/mpi3d_step.py", *flags, *(["--batch-size", "16"] if options.small else [])).stdout
    found = re.findall(r"^(plain|fp32|tf32|bf16) +([\d.]+) images/s(.*)$", out, re.MULTILINE)
    return [(f"ResNet-18 and captions, {form}", f"{rate} images/s{ratio}", None) for form, rate, ratio in found]


def rendering(options, data):
    """Seconds an image of Cycles with OptiX, where Blender's package is installed."""
    blender = ROOT / ".venv-blender/bin/python"
    if not blender.exists():
        raise Skipped("Blender's package is not installed; make blender installs it")
    count = 3 if options.small else 60
    with tempfile.TemporaryDirectory() as folder:
        tools = "rendering_data/Causal3DIdent"
        script(f"{tools}/generate_latents.py", "--output-folder", folder, "--n-points", count, "--seed", "0")
        flags = ["--output-folder", folder, "--device", "optix" if options.device == "cuda" else "cpu"]
        flags += ["--size", "32", "--samples", "4"] if options.small else []
        started = time.perf_counter()
        command = [str(blender), str(ROOT / tools / "generate_images.py"), *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"generate_images.py: {done.stderr.strip().splitlines()[-2:]}")
    return [
        (f"rendering {count} images, {flags[3]}, start included", f"{(time.perf_counter() - started) / count:.2f} s each", None)
    ]


def together(options, data):
    """Steps a second of one, two and four models that train at once on one device."""
    rows, steps = [], 100 if options.small else 400
    size = SMALL if options.small else "--theta-value 385"
    for count in (1, 2) if options.small else (1, 2, 4):
        with tempfile.TemporaryDirectory() as models:
            flags = f"{size} --recipe fast --precision fp32 --train-steps {steps} --final-batch-size 0 --log-steps {steps}"
            command = [sys.executable, "main_numeric.py", *flags.split(), "--model-dir", models, *on(options), "--seed", "1"]
            processes = [subprocess.Popen([*command, "--model-id", f"m{k}"], cwd=ROOT, stdout=subprocess.DEVNULL,
                                          stderr=subprocess.DEVNULL) for k in range(count)]  # fmt: skip
            rates = []
            for k, process in enumerate(processes):
                process.wait()
                rates.append(steps / json.loads((Path(models) / f"m{k}/args.json").read_text())["train_seconds"])
        rows.append((f"{count} numeric models at once", f"{sum(rates):.0f} steps/s together, {min(rates):.0f} the slowest", None))
    return rows


SECTIONS = {name: globals()[name] for name in SECONDS}


def make_data(folder):
    """Small data sets of both kinds: stand-in images with captions, and squares in place of Causal3DIdent's scenes."""
    import numpy as np
    from PIL import Image

    grid = ["--size", "64", "--grid", "4", "4", "2", "3", "3", "4", "4"]
    script("rendering_data/MPI3D/render_standin_images.py", "--output-dir", folder / "mpi3d", *grid)
    script("rendering_data/MPI3D/render_multimodal_mpi3d.py", "--output-dir", folder / "mpi3d")
    scenes = folder / "causal3dident"
    script("rendering_data/Causal3DIdent/generate_latents.py", "--output-folder", scenes, "--n-points", "200", "--seed", "0")
    script("rendering_data/Causal3DIdent/generate_text.py", "--output-folder", scenes)
    (scenes / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(200):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(scenes / f"images/{number:03d}.png")


def run_section(name, options, data):
    """(rows, status) of a section, run in a process of its own."""
    limit = SECONDS[name] * (10 if options.device == "cpu" else 1)
    command = [sys.executable, __file__, "--device", options.device, "--worker", name, "--data", str(data)]
    command += ["--small"] * options.small
    with contextlib.suppress(json.JSONDecodeError, IndexError):
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return [], f"stopped after its {limit} seconds"
        if done.returncode == 0:
            answer = json.loads(done.stdout.splitlines()[-1])
            return answer["rows"], answer["status"]
    lines = done.stderr.strip().splitlines() or ["without a word"]
    return [], f"FAILED: {lines[-1]}"


def main():
    """Run the sections and write the table; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(%(default)s)")
    parser.add_argument("--small", action="store_true", help="small problems, to see that everything runs")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), metavar="SECTION", help=f"of {', '.join(SECTIONS)} (all)")
    parser.add_argument("--output", default="gpu.md", help="file of the table (%(default)s)")
    parser.add_argument("--worker", choices=tuple(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                answer = {"rows": SECTIONS[options.worker](options, options.data), "status": ""}
            except Skipped as reason:
                answer = {"rows": [], "status": f"skipped: {reason}"}
            except Exception as error:
                answer = {"rows": [], "status": f"FAILED: {' '.join(f'{type(error).__name__}: {error}'.split())}"}
        print(json.dumps(answer))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: PyTorch sees no CUDA device; --device cpu --small shows that the benchmark runs", file=sys.stderr)
        return 2
    device, failed = torch.device(options.device), False
    lines = [f"{describe_device(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
             f"{datetime.date.today():%d %B %Y}{', small problems' if options.small else ''}", "",
             "| what | measured | within its bound |", "|---|---|---|"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        make_data(data)
        for name in options.only or SECTIONS:
            rows, status = run_section(name, options, data)
            failed |= status.startswith(("FAILED", "stopped")) or any(good is False for *_, good in rows)
            words = {True: "yes", False: "**no**", None: ""}
            lines += [f"| {what} | {figure} | {words[good]} |" for what, figure, good in rows]
            lines += [f"| {name} | {status} | |"] if status else []
            print(*(f"{name:11} {what}: {figure} {words[good]}" for what, figure, good in rows), sep="\n", flush=True)
            if status:
                print(f"{name:11} {status}", flush=True)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(options.output, ("\n".join(lines) + "\n").encode())
    print(f"\n{chr(10).join(lines)}\n\nwritten to {os.path.relpath(options.output)}")
    return 2 if failed else 0


if __name__ == "__main__":
    run_script(main)
