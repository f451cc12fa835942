"""Draw images of MPI3D-Complex with their captions in each of the ten settings (Figures 11 and 15 of the paper).

python rendering_data/MPI3D/show_pairs.py --output docs/mpi3d_pairs.png
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from running.command_line import Parser, integer, run_script

# isort: split

import torch

from datasets import BIAS_IDS, BIAS_TYPES, load_mpi3d
from reading.captions import read_lines
from running.pictures import check_picture, plot_captioned_images


def main(argv=None):
    """Draw the picture; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("--datapath", default="data/MPI3d_real_complex", help="folder of the data set (%(default)s)")
    parser.add_argument("--output", default="mpi3d_pairs.png", help="picture to write (%(default)s)")
    parser.add_argument("--count", type=integer(1), default=4, help="test pairs to show, the first ones (%(default)s)")
    args, _ = parser.parse(argv)
    output = Path(args.output)
    check_picture(output)
    captions = {}
    for bias_type, bias_id in itertools.product(BIAS_TYPES, BIAS_IDS):
        pairs, _ = load_mpi3d(args.datapath, bias_type, bias_id)
        lines = read_lines(Path(args.datapath) / "test" / f"text_{bias_type}_{bias_id}.txt")
        captions[f"{bias_type} {bias_id}"] = lines[: args.count]
    count = min(args.count, len(pairs.splits["test"]))
    images = pairs.images_of("test", torch.arange(count)).numpy()
    plot_captioned_images(images, captions, output)
    print(f"{count} pairs of {len(captions)} settings in {output}")
    return 0


if __name__ == "__main__":
    run_script(main)
