"""Render the images of Causal3DIdent with Blender's Cycles, from their latents.

    make blender                                                           # Blender as a Python package, once
    .venv-blender/bin/python rendering_data/Causal3DIdent/generate_images.py --output-folder data/Causal3DIDent
    blender --background --python rendering_data/Causal3DIdent/generate_images.py -- --output-folder data/Causal3DIDent

    ... --assets multimodal3dident/assets         # the real shapes, of a clone of Multimodal3DIdent; else stand-ins
    ... --device optix                            # on a GPU
    ... --n-batches 50 --batch-index 7            # the eighth fiftieth of the images: for a job array
    ... --plain                                   # the plain way, without what makes it fast

Reads latents_image.csv, which generate_latents.py wrote, and writes images/000000.png … and images.json, which says what
they were rendered from. Images appear whole or not at all, and those already there are kept: a run that was stopped goes on
with the same command, and an image does not depend on what was rendered before it.
"""

import concurrent.futures
import contextlib
import datetime
import hashlib
import importlib.util
import json
import os
import queue
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from running.command_line import InputError, Parser, integer, run_script

# isort: split
import numpy as np

from reading.causal3dident import CAUSAL_IMAGE, SHAPES, image_files, latents_digest, read_latents
from running.cores import usable_cores
from running.files import write_json

STANDINS = ("ring", "cone", "coil", "star", "jack", "arch", "monkey")  # for SHAPES
BASE_FILES = {"scene": "scenes/base_scene_equal_xyz.blend", "material": "materials/Rubber.blend"}  # of the assets
PROGRESS_SECONDS = 10
OLDEST_BLENDER = (4, 2)
STALE_SECONDS = 24 * 3600  # age of an unfinished image that no process works on any more


def shape_file(number):
    """File of an object shape in the assets; the object in it has the file's name."""
    return f"shapes/Shape{SHAPES[number].capitalize()}.blend"


def pixels_alone(png):
    """Bytes of a PNG without its texts: dates and durations would make equal images differ."""
    kept, position = [png[:8]], 8
    while position < len(png):
        end = position + 12 + int.from_bytes(png[position : position + 4], "big")
        if png[position + 4 : position + 8] in (b"IHDR", b"IDAT", b"IEND"):
            kept.append(png[position:end])
        position = end
    return b"".join(kept)


def work():
    """A rendering process: settings, then one image a line on standard input, as JSON; answers a line for each.

    "ready", "done SECONDS" and "error MESSAGE" go to what standard output was; Blender's own lines go nowhere.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        import bpy

        from rendering_data.Causal3DIdent import scenes

        if bpy.app.version < OLDEST_BLENDER:
            found, expected = bpy.app.version_string, ".".join(map(str, OLDEST_BLENDER))
            raise InputError(f"Blender {found} is too old, expected {expected} or newer; `make blender` installs one")
        settings = json.loads(sys.stdin.readline())
        scene = scenes.build_scene(settings)
        lamp_by_lamp = None if settings["plain"] else scenes.LampByLamp(scene, settings)
        print("ready", file=answers)
        for line in sys.stdin:
            started = time.perf_counter()
            image = json.loads(line)
            temporary = Path(image["temporary"])
            os.chdir(temporary.parent)  # Blender takes braces in a folder's name for a variable of its own
            image["temporary"] = f"./{temporary.name}"
            if settings["plain"]:
                scene = scenes.build_scene(settings)
                scenes.set_latents(*scene, image["latents"], settings["protocol"])
                bpy.context.scene.cycles.seed = image["seed"]
                bpy.context.scene.render.filepath = image["temporary"]
                bpy.ops.render.render(write_still=True)
            else:
                lamp_by_lamp.render(image)
            temporary.write_bytes(pixels_alone(temporary.read_bytes()))
            temporary.replace(image["file"])
            print(f"done {time.perf_counter() - started:.6f}", file=answers)
    except ImportError as error:
        print(f"error Blender cannot be loaded ({error}); `make blender` installs it for Python 3.11", file=answers)
        return 2
    except (InputError, OSError, RuntimeError) as error:
        print("error", " ".join(str(error).split()), file=answers)
        return 2
    return 0


def renderer_command():
    """Command line of a rendering process: this Python where it has bpy, or the Blender that runs this script."""
    bpy = sys.modules.get("bpy")
    if bpy and bpy.app.binary_path:
        return [bpy.app.binary_path, "--background", "--factory-startup", "--python", __file__, "--", "--work"]
    if importlib.util.find_spec("bpy") is None:
        raise InputError(
            "this Python has no Blender: `make blender` installs it (package bpy, Python 3.11), then run "
            ".venv-blender/bin/python; or run this script inside Blender, see --help"
        )
    return [sys.executable, __file__, "--work"]


class Renderers:
    """Processes that render images side by side; a context manager that ends them, whatever happens.

    settings: dict of what scenes.build_scene needs. Each process takes an image as soon as it has none, so that a
    slow image holds up no other. Raises InputError with a process's last words if one ends.
    """

    def __init__(self, settings, count):
        self.settings, self.count, self.processes, self.ready = settings, count, [], set()

    def __enter__(self):
        command = renderer_command()
        self.threads = concurrent.futures.ThreadPoolExecutor(self.count)
        self.complaints = tempfile.TemporaryFile()  # closed by __exit__
        # Blender makes a folder there, which a process that is killed leaves
        self.temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # The denoiser's threads would otherwise be as many as cores in every process, bound to the same cores.
        denoiser = {"OIDN_NUM_THREADS": str(self.settings["threads"]), "OIDN_SET_AFFINITY": "0"}
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.complaints, "text": True, "bufsize": 1}
        own = {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": self.temporary.name}
        options = {"env": os.environ | denoiser | own, "start_new_session": True}
        for _ in range(self.count):
            self.processes.append(subprocess.Popen(command, **streams, **options))
            tell(self.processes[-1], self.settings)
        return self

    def render(self, images):
        """Yield (image, seconds) as images are done; each a dict of file, temporary, seed and latents."""
        waiting, answers = iter(images), queue.SimpleQueue()
        for process in self.processes:
            self.threads.submit(self._serve, process, waiting, answers)
        for _ in images:
            answer = answers.get()
            if isinstance(answer, Exception):
                raise answer
            yield answer

    def _serve(self, process, waiting, answers):
        """Have a process render images, one after another, that no other process has taken from the iterator `waiting`."""
        try:
            if process not in self.ready:
                self._answer(process, "Blender did not start: it ended", "`make blender` installs one that fits")
                self.ready.add(process)
            for image in waiting:
                tell(process, image)
                kept = "the images so far are kept, and the same command continues"
                answers.put((image, float(self._answer(process, f"a rendering process ended at {image['file']}", kept))))
        except Exception as error:  # whatever it is, `render` must not wait for an answer
            answers.put(error)

    def _answer(self, process, ended, advice):
        """What follows "ready" or "done" in a process's next answer; InputError if it has an error to tell, or has ended."""
        for line in process.stdout:
            word, _, rest = line.rstrip("\n").partition(" ")
            if word == "error":
                raise InputError(rest)
            if word in ("ready", "done"):
                return rest
        code, file = process.wait(), self.complaints.fileno()
        # the processes go on writing at the end of the file
        complaints = os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace").split("\n")
        words = [f" ({line.strip()})" for line in complaints if line.strip()]
        raise InputError(f"{ended} with code {code}{''.join(words[-1:])}; {advice}")

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
        self.threads.shutdown()
        for process in self.processes:
            process.communicate()  # waits for it and closes its pipes
        self.complaints.close()
        self.temporary.cleanup()


def tell(process, content):
    """Hand a line of JSON to a process; one that has ended says so by itself."""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(content) + "\n")


def check_assets(assets, shapes):
    """Raise InputError that names every file that is missing for the object shapes of the latents."""
    files = [*BASE_FILES.values(), *map(shape_file, shapes)]
    if missing := ", ".join(name for name in files if not (assets / name).is_file()):
        raise InputError(f"{assets} lacks {missing}; expected the folder assets of a clone of Multimodal3DIdent")


def is_done(file, size):
    """Whether an image is there; InputError if it is damaged or of another size."""
    try:
        with open(file, "rb") as stream:
            head = stream.read(24)
            stream.seek(-12, os.SEEK_END)
            tail = stream.read()
    except FileNotFoundError:
        return False
    except OSError:  # too short to hold an end
        head = tail = b""
    if len(head) < 24 or head[:8] != b"\x89PNG\r\n\x1a\n" or tail[4:8] != b"IEND":
        raise InputError(f"{file} is damaged: remove it, and the same command renders it again")
    width, height = struct.unpack(">II", head[16:])
    if (width, height) != (size, size):
        advice = "choose another folder, or remove images/"
        raise InputError(f"{file} has {width} × {height} pixels, not {size} × {size}: {advice}")
    return True


def record_origin(folder, names, origin):
    """Write images.json: what the images `names`, a set, come from; InputError if some are there of other names or origin."""
    path, images, advice = folder / "images.json", folder / "images", "choose another folder, or remove images/ and images.json"
    # looked at before images.json: a job that starts at the same time writes that first
    there = {entry.name for _, entry in image_files(images)}
    if foreign := there - names:
        expected = f"{min(names)} … {max(names)}"
        raise InputError(f"{images} holds {min(foreign)}, and the images of these latents are {expected}: {advice}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        differing = ", ".join(name for name in origin if stored[name] != origin[name])
    except FileNotFoundError:
        if there:
            lost = f"{path}, which says what they were rendered from, is missing: restore it, or {advice}"
            raise InputError(f"{images} holds images, and {lost}") from None
        differing = "everything"
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged: remove it together with {images}") from None
    if differing and there:
        raise InputError(f"{images} was rendered with other {differing} ({path}): {advice}")
    if differing:
        write_json(path, origin)


def batch_indices(count, n_batches, batch_index):
    """Range of the images of one batch: the batches are contiguous, of equal size within one, and cover 0 … count − 1."""
    return range(count * batch_index // n_batches, count * (batch_index + 1) // n_batches)


def parse_flags(argv):
    """The Namespace of the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--output-folder", type=Path, required=True, metavar="DIR", help="folder of the data set")
    parser.add_argument("--assets", type=Path, metavar="DIR", help="assets of a clone of Multimodal3DIdent (none: stand-ins)")
    parser.add_argument("--samples", type=integer(1), default=128, help="samples of a pixel (%(default)s)")
    parser.add_argument("--size", type=integer(8), default=128, help="pixels of an image's side (%(default)s)")
    parser.add_argument("--seed", type=integer(0), default=0, help="of the sampling noise (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda", "optix"), default="cpu", help="(%(default)s)")
    parser.add_argument("--workers", type=integer(1), help="processes (CPU: one a core, of one thread each; GPU: one)")
    parser.add_argument("--n-batches", type=integer(1), default=1, help="parts of the data set, for job arrays (%(default)s)")
    parser.add_argument("--batch-index", type=integer(0), default=0, help="the part to render, from 0 (%(default)s)")
    hues = (
        "hues of ground and spotlight below 0: as colorsys takes them, closer to the published data set's statistics (code), "
        "or wrapped, as the formula reads (paper) (%(default)s)"
    )
    parser.add_argument("--protocol", choices=("code", "paper"), default="code", help=hues)
    parser.add_argument("--plain", action="store_true", help="all lamps at once, denoised, the scene loaded for each image")
    args = parser.parse(argv)[0]
    if args.batch_index >= args.n_batches:
        batches = f"--n-batches {args.n_batches} has the batches 0 … {args.n_batches - 1}"
        raise InputError(f"--batch-index {args.batch_index} is out of range: {batches}")
    return args


def render_settings(args, shapes, threads):
    """Dict of what a rendering process needs to know: JSON."""
    told = {name: getattr(args, name) for name in ("samples", "size", "device", "plain", "protocol")}
    assets = args.assets and args.assets.resolve()
    return told | {
        "assets": assets and {name: str(assets / file) for name, file in BASE_FILES.items()},
        "shapes": [(number, str(assets / shape_file(number)) if assets else STANDINS[number]) for number in shapes],
        "denoise": True,
        "threads": threads,
    }


def main(argv=None):
    """Render the images of one batch that are not there yet; returns the exit code."""
    args = parse_flags(argv)
    table = read_latents(args.output_folder / "latents_image.csv", CAUSAL_IMAGE)
    latents = [dict(zip(table, row, strict=True)) for row in zip(*map(np.ndarray.tolist, table.values()), strict=True)]
    shapes = sorted({row["object_shape"] for row in latents})
    if args.assets:
        check_assets(args.assets, shapes)
    renderer_command()
    folder, digits = args.output_folder / "images", len(str(len(latents) - 1))
    folder.mkdir(exist_ok=True)
    for place in (args.output_folder, folder):  # a folder that cannot be written is found before Blender starts
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            raise InputError(f"{place} cannot be written ({error.strerror}); choose another --output-folder") from None
    for part in folder.glob(".*.part"):  # of a process that was killed
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                part.unlink()
    names = [f"{index:0{digits}d}.png" for index in range(len(latents))]
    origin = {"latents": latents_digest(args.output_folder), "shapes": "assets" if args.assets else "stand-ins"}
    origin |= {name: getattr(args, name) for name in ("size", "samples", "seed", "protocol", "plain")}
    record_origin(args.output_folder, set(names), origin)
    batch = batch_indices(len(latents), args.n_batches, args.batch_index)
    images, run = [], secrets.token_hex(4)  # two runs of the same command shall not write into the same file
    for index in batch:
        file = (folder / names[index]).resolve()
        if not is_done(folder / names[index], args.size):
            seed = int.from_bytes(hashlib.sha256(f"{args.seed}/{index}".encode()).digest()[:4], "big") >> 1
            temporary = file.with_name(f".{file.name}.{run}.part")
            images.append({"file": str(file), "temporary": str(temporary), "seed": seed, "latents": latents[index]})
    if not args.assets:
        print(f"no --assets: stand-in shapes instead of the data set's ({', '.join(STANDINS)} for {', '.join(SHAPES)})")
    if not images:
        print(f"{folder}: all {len(batch):,} images of this batch are there already")
        return 0
    workers = min(args.workers or (usable_cores() if args.device == "cpu" else 1), len(images))
    # On the CPU one thread each, whatever the number of processes: the last bits of an image depend on it.
    threads = 1 if args.device == "cpu" else max(1, usable_cores() // workers)
    there = f"{len(batch) - len(images):,} there already; {args.device}, {workers} processes"
    print(f"{folder}: {len(images):,} images of {args.size} × {args.size}, {there}", flush=True)
    # SIGTERM ends the script as Ctrl-C does, inside Blender too.
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    done, started, reported = 0, None, 0.0
    try:
        with Renderers(render_settings(args, shapes, threads), workers) as renderers:
            for done, (_, seconds) in enumerate(renderers.render(images), 1):
                now = time.perf_counter()
                started = started or now - seconds
                if now - reported > PROGRESS_SECONDS or done == len(images):
                    reported, rate = now, done / max(now - started, 1e-9)
                    left = datetime.timedelta(seconds=round((len(images) - done) / rate))
                    print(f"image {done:,}/{len(images):,}  {rate:.2f} images/s, {left} left", flush=True)
    except KeyboardInterrupt:
        print(f"stopped after {done:,} of {len(images):,} images; the same command continues", flush=True)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one of Blender's own, not of Python's
        for image in images:
            Path(image["temporary"]).unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    arguments = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else sys.argv[1:]
    if arguments == ["--work"]:
        sys.exit(work())
    run_script(lambda: main(arguments))
