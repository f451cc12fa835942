"""Draw images of Causal3DIdent with their captions, every shape at least once.

    python rendering_data/Causal3DIdent/contact_sheet.py --output-folder data/Causal3DIDent
    ... --settings selections_3 perturbations_3        # captions of two settings below each image

Needs latents, captions and images of the data set, the images of the first batch at least. Writes contact_sheet.png there.
"""

import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from running.command_line import InputError, Parser, integer, run_script

# isort: split

import matplotlib.pyplot as plt
import pandas as pd

from reading.captions import read_lines
from reading.causal3dident import CAUSAL_IMAGE, CAUSAL_SETTINGS, check_rendered_latents, image_files, read_latents
from reading.images import decode_image
from running.files import replaced
from running.pictures import check_picture

LINE = 42  # characters of a caption's line


def chosen_images(files, shapes, count):
    """Files of `count` images: in turn one of each shape, as far as there are some, in order of shape."""
    table = pd.DataFrame({"file": files, "shape": [shapes[int(file.stem)] for file in files]})
    turn = table.groupby("shape").cumcount()
    return table.loc[turn.sort_values(kind="stable").index[:count]].sort_values("shape", kind="stable")["file"].tolist()


def draw(images, captions, columns, path):
    """Draw images, (H, W, 3) arrays, with a caption each in a grid, into `path`."""
    rows = -(-len(images) // columns)
    lines = max(caption.count("\n") + 1 for caption in captions)
    height = 2.6 + 0.17 * lines
    figure, grid = plt.subplots(rows, columns, figsize=(2.75 * columns, height * rows), squeeze=False)
    top, bottom = 1 - 0.05 / (height * rows), 0.17 * lines / (height * rows)
    figure.subplots_adjust(0.01, bottom, 0.99, top, wspace=0.06, hspace=0.19 * lines / 2.6)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, caption in zip(grid.flat, images, captions, strict=False):
        axes.imshow(image, interpolation="lanczos")
        axes.text(0, -0.03, caption, transform=axes.transAxes, va="top", fontsize=7.5, linespacing=1.25)
    try:
        with replaced(path) as temporary:
            figure.savefig(temporary, dpi=110)
    finally:
        plt.close(figure)


def main(argv=None):
    """Write the contact sheet; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("--output-folder", type=Path, required=True, metavar="DIR", help="folder of the data set")
    settings = {"choices": CAUSAL_SETTINGS, "default": ["selections_6"], "help": "whose captions are shown (selections_6)"}
    parser.add_argument("--settings", nargs="+", metavar="SETTING", **settings)
    parser.add_argument("--count", type=integer(1, 1000), default=12, help="images, as far as there are some (%(default)s)")
    parser.add_argument("--columns", type=integer(1), default=4, help="(%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the picture (DIR/contact_sheet.png)")
    args, _ = parser.parse(argv)
    folder, output = args.output_folder, args.output or args.output_folder / "contact_sheet.png"
    check_picture(output)
    shapes = read_latents(folder / "latents_image.csv", {"object_shape": CAUSAL_IMAGE["object_shape"]})["object_shape"]
    check_rendered_latents(folder)
    files = [Path(entry.path) for number, entry in image_files(folder / "images") if number < len(shapes)]
    if not files:
        raise InputError(f"{folder / 'images'} holds no images; generate_images.py renders them")
    files = chosen_images(files, shapes, args.count)
    captions = [""] * len(files)
    for setting in args.settings:
        path = folder / "text" / setting / "text_raw.txt"
        if not path.exists():
            raise InputError(f"{path} is missing; generate_text.py writes it")
        if len(lines := read_lines(path)) != len(shapes):
            raise InputError(f"{path.parent} has {len(lines)} captions for {len(shapes)} images; make it again")
        label = f"{setting.replace('_', ' ')}: " if len(args.settings) > 1 else ""
        for k, file in enumerate(files):
            captions[k] += textwrap.fill(label + lines[int(file.stem)], LINE, break_on_hyphens=False) + "\n"
    images = [decode_image(file) for file in files]
    draw(images, [caption.rstrip() for caption in captions], min(args.columns, len(images)), output)
    print(f"{output}: {len(images)} images with their captions")
    return 0


if __name__ == "__main__":
    run_script(main)
