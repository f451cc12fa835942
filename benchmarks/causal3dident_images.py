"""Rendering Causal3DIdent: generate_images.py against the plain way, its own --plain, on the same latents.

    .venv-blender/bin/python benchmarks/causal3dident_images.py                             # stand-in shapes
    .venv-blender/bin/python benchmarks/causal3dident_images.py --assets multimodal3dident/assets
    .venv-blender/bin/python benchmarks/causal3dident_images.py --rounds 2 --references 2   # a quick look

The plain form is `generate_images.py --plain`: 128 samples in every pixel, denoised, the scene loaded anew for every image.
It runs twice, as one process with all cores and as one process a core; speed is quoted against the faster one. The forms
take turns on the same images, so that a machine whose speed drifts is fair to all; Blender's start is not timed. Quality is
the PSNR of the 8-bit images to references of 2,048 samples, rendered plainly and not denoised, so that they are not biased
towards any denoiser, with noise of their own.
"""

import contextlib
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reading.causal3dident import SHAPES
from rendering_data.Causal3DIdent.generate_images import Renderers, check_assets, render_settings, shape_file
from running.command_line import Parser, integer, run_script
from running.cores import cpu_name, usable_cores

IMAGES = 100_000  # of the data set


def sample_latents(count, shapes, seed):
    """List of `count` dicts of latents, distributed as in the data set; the shapes take turns."""
    draw, rows = random.Random(seed), []
    for k in range(count):
        row = {"object_shape": shapes[k % len(shapes)], "object_xpos": draw.randrange(3), "object_ypos": draw.randrange(3)}
        row |= {f"object_{name}rot": draw.random() for name in ("alpha", "beta", "gamma")}
        row["spotlight_pos"] = draw.random()
        row["object_color"] = ((row["object_xpos"] + row["object_ypos"]) / 2 + draw.random()) / 3
        row["spotlight_color"] = (row["spotlight_pos"] + draw.random()) / 2
        row["background_color"] = (row["spotlight_pos"] + row["spotlight_color"] + draw.random()) / 3
        rows.append(row)
    return rows


def jobs(latents, indices, folder, seed=0):
    """Images for Renderers.render, numbered files in `folder`, their sampling seeded from `seed` on."""
    folder.mkdir(exist_ok=True)
    return [{"file": str(folder / f"{k}.png"), "temporary": str(folder / f".{k}.png.part"), "seed": seed + k,
             "latents": latents[k]} for k in indices]  # fmt: skip


def timed(renderers, images):
    """(seconds, CPU seconds) an image that `images` take."""
    started, used = time.perf_counter(), cpu_seconds(renderers)
    for _ in renderers.render(images):
        pass
    return (time.perf_counter() - started) / len(images), (cpu_seconds(renderers) - used) / len(images)


def cpu_seconds(renderers):
    """CPU seconds that the rendering processes have used so far, on Linux; elsewhere nan."""
    try:
        fields = [Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split() for process in renderers.processes]
    except OSError:
        return math.nan
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


def psnr(file, reference):
    """Peak signal-to-noise ratio of two images in dB."""
    import bpy
    import numpy as np

    def pixels(path):
        image = bpy.data.images.load(str(path))
        return np.round(255 * np.array(image.pixels[:]).reshape(-1, 4)[:, :3])

    return 10 * math.log10(255**2 / max(np.mean((pixels(file) - pixels(reference)) ** 2), 1e-9))


def spread(values):
    return f"median {statistics.median(values):6.3f}, {min(values):.3f} to {max(values):.3f}"


def main():
    parser = Parser(__doc__)
    parser.add_argument("--assets", type=Path, help="folder assets of a clone of Multimodal3DIdent")
    parser.add_argument("--size", type=integer(1), default=128)
    parser.add_argument("--samples", type=integer(1), default=128)
    parser.add_argument("--rounds", type=integer(1), default=5, help="timed rounds of all forms")
    parser.add_argument("--per-round", type=integer(1), default=4, help="images of a round")
    parser.add_argument("--references", type=integer(1), default=8, help="images whose PSNR is measured")
    parser.add_argument("--reference-samples", type=integer(1), default=2048)
    parser.add_argument("--protocol", choices=("code", "paper"), default="code")
    parser.add_argument("--device", choices=("cpu", "cuda", "optix"), default="cpu")
    parser.add_argument("--keep", type=Path, help="folder for the rendered images (none: they are removed)")
    parser.add_argument("--seed", type=integer(0), default=0, help="of the latents")
    args = parser.parse_args()
    shapes = list(range(len(SHAPES)))
    if args.assets:
        shapes = [k for k in shapes if (args.assets / shape_file(k)).is_file()]
        check_assets(args.assets, shapes)
    cores = usable_cores()
    print(f"{cpu_name()}, {cores} usable cores, {args.device}, {'assets' if args.assets else 'stand-in'} shapes, "
          f"{args.size} × {args.size}, {args.samples} samples")  # fmt: skip

    def settings(plain, threads, **changes):
        args.plain = plain
        return render_settings(args, shapes, threads) | changes

    side_by_side = cores if args.device == "cpu" else 1
    forms = {
        "plain, one process": (settings(True, cores), 1),
        "plain, a process a core": (settings(True, max(1, cores // side_by_side)), side_by_side),
        "generate_images.py": (settings(False, max(1, cores // side_by_side)), side_by_side),
    }
    if side_by_side == 1:
        del forms["plain, a process a core"]
    count = max(args.rounds * args.per_round, args.references)
    latents = sample_latents(count + side_by_side, shapes, args.seed)
    folder = args.keep or Path(tempfile.mkdtemp(prefix="causal3dident-"))
    folder.mkdir(parents=True, exist_ok=True)
    seconds, used = {name: [] for name in forms}, {name: [] for name in forms}
    pools = {name: Renderers(*form) for name, form in forms.items()}
    with contextlib.ExitStack() as entered:
        for name, pool in pools.items():
            entered.enter_context(pool)
            if name != "generate_images.py":
                timed(pool, jobs(latents, range(count, count + side_by_side), folder / "warm-up"))
                continue
            started, first = time.perf_counter(), {row["object_shape"]: row for row in latents[:count]}
            for row in first.values():  # two for each process, so that each has what it computes once for a shape
                timed(pool, jobs([row] * 2 * side_by_side, range(2 * side_by_side), folder / "warm-up"))
            print(f"generate_images.py, first {2 * side_by_side} images of each of {len(first)} shapes, with what is computed "
                  f"once for each: {time.perf_counter() - started:.1f} s")  # fmt: skip
        for start in range(0, count, args.per_round):
            indices = range(start, min(start + args.per_round, count))
            for name, pool in pools.items():
                wall, cpu = timed(pool, jobs(latents, indices, folder / name.replace(", ", " ")))
                seconds[name].append(wall)
                used[name].append(cpu)
            print("  ".join(f"{name} {values[-1]:.3f}" for name, values in seconds.items()), "s an image", flush=True)
    own = seconds.pop("generate_images.py")
    for name, values in {**seconds, "generate_images.py": own}.items():
        print(f"{name:24} {spread(values)} s an image over {len(values)} rounds of {args.per_round}; "
              f"CPU time {statistics.median(used[name]):.3f} s")  # fmt: skip
    fastest = min(seconds, key=lambda name: statistics.median(seconds[name]))
    ratios = [plain / fast for plain, fast in zip(seconds[fastest], own, strict=True)]
    print(f"against {fastest}: {spread(ratios)} times faster")
    cpu_ratios = [plain / fast for plain, fast in zip(used[fastest], used["generate_images.py"], strict=True)]
    print(f"by CPU time, which other processes on the machine hardly touch: {spread(cpu_ratios)} times")
    hours = IMAGES * statistics.median(own) / 3600
    print(f"{IMAGES:,} images on this machine: {hours:.1f} hours, plainly "
          f"{IMAGES * statistics.median(seconds[fastest]) / 3600:.1f} hours")  # fmt: skip

    if args.references:
        reference = settings(True, max(1, cores // side_by_side), samples=args.reference_samples, denoise=False)
        with Renderers(reference, side_by_side) as pool:
            timed(pool, jobs(latents, range(args.references), folder / "reference", seed=1000))
        scores = {name: [psnr(folder / name.replace(", ", " ") / f"{k}.png", folder / f"reference/{k}.png")
                         for k in range(args.references)] for name in (fastest, "generate_images.py")}  # fmt: skip
        for name, values in scores.items():
            print(f"{name:24} PSNR mean {statistics.mean(values):.2f} dB, {spread(values)}")
        gains = [fast - plain for plain, fast in zip(*scores.values(), strict=True)]
        print(f"gain                     mean {statistics.mean(gains):+.2f} dB, {spread(gains)} over {len(gains)} images")
    if not args.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    run_script(main)
