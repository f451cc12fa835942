"""Draw images of Causal3DIdent with their captions, every shape at least once.

    python rendering_data/Causal3DIdent/contact_sheet.py --output-folder data/Causal3DIDent
    ... --settings selections_3 perturbations_3        # captions of two settings below each image

Needs latents, captions and images of the data set, the images of the first batch at least. Writes contact_sheet.png there.
"""

import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib
import pandas as pd
from PIL import Image, UnidentifiedImageError

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from datasets import check_rendered_latents
from running.command_line import InputError, Parser, integer, run_script
from running.files import replaced
from running.pictures import check_picture

SETTINGS = [f"{bias_type}_{bias_id}" for bias_type in ("selections", "perturbations") for bias_id in range(7)]
LINE = 42  # characters of a caption's line


def parse_flags(argv):
    """The Namespace of the command line."""
    parser = Parser(description=__doc__.split("\n\n")[0], epilog="\n\n".join(__doc__.split("\n\n")[1:]))
    parser.add_argument("--output-folder", type=Path, required=True, metavar="DIR", help="folder of the data set")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["selections_6"], metavar="SETTING",
                        help="whose captions are shown (selections_6)")  # fmt: skip
    parser.add_argument("--count", type=integer(1), default=12, help="images, as far as there are some (%(default)s)")
    parser.add_argument("--columns", type=integer(1), default=4, help="(%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the picture (DIR/contact_sheet.png)")
    return parser.parse(argv)[0]


def read(path, reader, *errors):
    """reader(path); InputError that names the file if it is missing or damaged."""
    try:
        return reader(path)
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing; generate_latents.py, generate_text.py and generate_images.py make it"
        ) from None
    except errors as error:
        raise InputError(f"{path} is damaged ({error}); remove it and make it again") from None


def chosen_images(files, shapes, count):
    """Files of `count` images: in turn one of each shape, as far as there are some, in order of shape."""
    table = pd.DataFrame({"file": files, "shape": [shapes[int(file.stem)] for file in files]})
    turn = table.groupby("shape").cumcount()
    return table.loc[turn.sort_values(kind="stable").index[:count]].sort_values("shape", kind="stable")["file"].tolist()


def draw(images, captions, columns, path):
    """Draw images ((H, W, 3) arrays or PIL images) with a caption each in a grid, into `path`."""
    rows = -(-len(images) // columns)
    lines = max(caption.count("\n") + 1 for caption in captions)
    height = 2.6 + 0.17 * lines
    figure, grid = plt.subplots(rows, columns, figsize=(2.75 * columns, height * rows), squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.05 / (height * rows), bottom=0.17 * lines / (height * rows),
                           wspace=0.06, hspace=0.19 * lines / 2.6)  # fmt: skip
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
    args = parse_flags(argv)
    folder, output = args.output_folder, args.output or args.output_folder / "contact_sheet.png"
    check_picture(output)
    latents = read(folder / "latents_image.csv", pd.read_csv, ValueError, UnicodeDecodeError)
    check_rendered_latents(folder)
    if "object_shape" not in latents:
        raise InputError(f"{folder / 'latents_image.csv'} has no column object_shape; make it again")
    files = [
        path
        for path in sorted((folder / "images").glob("*"))
        if path.suffix in (".png", ".jpg") and path.stem.isdecimal()
    ]
    files = [path for path in files if int(path.stem) < len(latents)]
    if not files:
        raise InputError(f"{folder / 'images'} holds no images; generate_images.py renders them")
    files = chosen_images(files, latents["object_shape"].tolist(), args.count)
    captions = [""] * len(files)
    for setting in args.settings:
        lines = read(
            folder / "text" / setting / "text_raw.txt", lambda path: path.read_text().splitlines(), UnicodeDecodeError
        )
        if len(lines) != len(latents):
            raise InputError(
                f"{folder / 'text' / setting} has {len(lines)} captions for {len(latents)} images; make it again"
            )
        for k, file in enumerate(files):
            label = f"{setting.replace('_', ' ')}: " if len(args.settings) > 1 else ""
            captions[k] += textwrap.fill(label + lines[int(file.stem)], LINE, break_on_hyphens=False) + "\n"
    images = [
        read(file, lambda path: Image.open(path).convert("RGB"), UnidentifiedImageError, OSError) for file in files
    ]
    draw(images, [caption.rstrip() for caption in captions], args.columns, output)
    print(f"{output}: {len(images)} images with their captions")
    return 0


if __name__ == "__main__":
    run_script(main)
