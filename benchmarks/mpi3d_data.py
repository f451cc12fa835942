"""Opening MPI3D-Complex and drawing batches from it, against the plain way: a Dataset that reads all and a DataLoader.

    python benchmarks/mpi3d_data.py                          # on data/MPI3d_real_complex, on one CPU core
    python benchmarks/mpi3d_data.py --make-blank --datapath FOLDER               # make a folder of the real size for it
    python benchmarks/mpi3d_data.py --make-blank --datapath FOLDER --positions 20    # or one of 20 × 20 positions

Each way runs in a process of its own, so that its memory is its own. The plain way is what a tutorial writes: np.load the
images, keep those of the split, tokenise each caption with NLTK, and return one tensor and one one-hot matrix an item. It
opens one split, where training needs both, and at the real size takes 11 GB while it does. The folder that --make-blank
writes has blank images and real captions.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pandas as pd
import torch

from datasets import MPI3D_FILE, MPI3D_GRID, MPI3D_MEAN, MPI3D_STD, EpochOrder, load_mpi3d
from rendering_data.MPI3D.render_multimodal_mpi3d import render
from running.command_line import Parser, integer, run_script
from running.devices import describe_device

BATCH_SIZE = 256


def memory():
    """Resident memory of this process now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class PlainDataset(torch.utils.data.Dataset):
    """Images and captions of a split, the plain way."""

    def __init__(self, folder, split, name):
        from nltk.tokenize.destructive import NLTKWordTokenizer

        folder = Path(folder)
        factors = pd.read_csv(folder / split / "image_semantics.csv")
        content = np.load(folder / MPI3D_FILE)
        grid = content["grid"] if "grid" in content else MPI3D_GRID.values()
        self.images = content["images"][np.ravel_multi_index(tuple(factors[key] for key in MPI3D_GRID), tuple(grid))]
        tokenise = NLTKWordTokenizer().tokenize
        self.captions = [tokenise(line) for line in (folder / split / f"text_{name}.txt").read_text().splitlines()]
        vocabulary = json.loads((folder / f"vocab_{name}.json").read_text())
        self.vocabulary = vocabulary.get("w2i", vocabulary)
        self.length = 1 + max(map(len, self.captions))

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, row):
        image = torch.from_numpy(self.images[row]).permute(2, 0, 1).float() / 255
        image = (image - torch.tensor(MPI3D_MEAN)[:, None, None]) / torch.tensor(MPI3D_STD)[:, None, None]
        words = [*self.captions[row], "{eos}"]
        words += ["{pad}"] * (self.length - len(words))
        numbers = torch.tensor([self.vocabulary.get(word, self.vocabulary["{unk}"]) for word in words])
        return image, torch.nn.functional.one_hot(numbers, len(self.vocabulary)).float()


def time_plain(folder, name, batches):
    """Seconds to open, resident memory, samples a second: a dict."""
    started = time.perf_counter()
    dataset = PlainDataset(folder, "train", name)
    opening, opened = time.perf_counter() - started, memory()
    loader = iter(torch.utils.data.DataLoader(dataset, BATCH_SIZE, shuffle=True, drop_last=True))
    next(loader)
    started = time.perf_counter()
    for _ in range(batches):
        next(loader)
    return {"open": opening, "memory": opened, "rate": batches * BATCH_SIZE / (time.perf_counter() - started)}


def time_ours(folder, name, batches):
    """The same of datasets.py; both splits are open, and the pages that the batches touched are in memory's peak."""
    bias_type, bias_id = name.split("_")
    started = time.perf_counter()
    pairs, _ = load_mpi3d(folder, bias_type, int(bias_id))
    opening, opened = time.perf_counter() - started, memory()
    order = EpochOrder(len(pairs.splits["train"]), torch.Generator().manual_seed(0))

    def draw():
        rows = order.next(BATCH_SIZE)
        return pairs.images_of("train", rows), pairs.tokens_of("train", rows)

    draw()
    started = time.perf_counter()
    for _ in range(20 * batches):
        draw()
    return {"open": opening, "memory": opened, "rate": 20 * batches * BATCH_SIZE / (time.perf_counter() - started)}


def make_blank(folder, positions):
    """A folder of the real size, or of fewer positions: blank images and all captions."""
    folder, grid = Path(folder), {**MPI3D_GRID, "H_AXIS": positions, "V_AXIS": positions}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MPI3D_FILE).exists():
        sys.exit(f"error: {folder / MPI3D_FILE} exists already")
    images = np.memmap(folder / "images.npy", np.uint8, "w+", shape=(math.prod(grid.values()), 64, 64, 3))
    np.savez(folder / MPI3D_FILE, images=images, grid=np.array(list(grid.values())))
    (folder / "images.npy").unlink()
    render(folder, grid, train_ratio=0.9, seed=0)


def main():
    """Time each way in a process of its own and print a table."""
    parser = Parser(__doc__)
    parser.add_argument("--datapath", default="data/MPI3d_real_complex")
    parser.add_argument("--setting", default="selection_4", help="captions to open (%(default)s)")
    parser.add_argument("--batches", type=integer(1), default=20, help="of 256, timed the plain way; 20 times as many of ours")
    parser.add_argument("--make-blank", action="store_true", help="write a folder of the real size to time, and stop")
    parser.add_argument("--positions", type=integer(1), default=40, help="of each joint in that folder (%(default)s)")
    parser.add_argument("--way", choices=("plain", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make_blank:
        return make_blank(args.datapath, args.positions)
    if args.way:
        torch.set_num_threads(1)
        timed = {"plain": time_plain, "ours": time_ours}[args.way](args.datapath, args.setting, args.batches)
        return print(json.dumps(timed))
    print(f"{args.datapath}, {args.setting}, one thread of {describe_device(torch.device('cpu'))}")
    cache = Path(args.datapath) / f"tokens_{args.setting}.npz"
    cache.unlink(missing_ok=True)
    results = {}
    for label, way in (("datasets.py, first time", "ours"), ("datasets.py, again", "ours"), ("plain", "plain")):
        command = [sys.executable, __file__, "--way", way, "--datapath", args.datapath, "--setting", args.setting]
        done = subprocess.run([*command, "--batches", str(args.batches)], capture_output=True, text=True)
        if done.returncode:
            print(f"{label:24} failed with exit code {done.returncode}: {done.stderr.strip().splitlines()[-2:]}")
            continue
        results[label] = timed = json.loads(done.stdout)
        print(f"{label:24} opens in {timed['open']:6.2f} s with {timed['memory'] / 1e9:5.2f} GB resident, "
              f"{timed['rate']:9,.0f} pairs/s", flush=True)  # fmt: skip
    if "plain" in results:
        ours, plain = results["datasets.py, first time"], results["plain"]
        print(f"ratios: opening {plain['open'] / ours['open']:.0f}, memory {plain['memory'] / ours['memory']:.0f}, "
              f"batches {ours['rate'] / plain['rate']:.0f}")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
