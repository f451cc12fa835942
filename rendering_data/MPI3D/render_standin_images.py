"""Draw stand-in images for MPI3D-Complex, for whoever has not downloaded its 5.66 GB of photographs yet.

    python rendering_data/MPI3D/render_standin_images.py                              # 28,800 images, 10 × 10 positions
    python rendering_data/MPI3D/render_standin_images.py --grid 4 4 2 3 3 40 40       # as many as the real data set has
    python rendering_data/MPI3D/render_standin_images.py --size 32                    # images of 32 × 32, faster to train on

THESE ARE DRAWINGS, NOT PHOTOGRAPHS: results on them show that the method and this code work, and are no results on
MPI3D-Complex. The scene is that of the photographs: a dark round table whose rim carries the background colour, seen from
three heights; on it a robot arm, turned and raised by its two joints, that holds an object of one of four shapes, four
colours and two sizes. All seven factors can be seen. The file has the format and the name of the real one, and the sizes of
its grid besides, so that everything that reads the real one reads it.
"""

import itertools
import math
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from running.command_line import InputError, Parser, integer, run_script

# isort: split

import numpy as np

from datasets import MPI3D_FILE, MPI3D_GRID, mpi3d_grid
from running.files import replaced

SIZE, SAMPLES = 64, 128  # of an image along each side: pixels, unless others are asked for, and samples

# yellow, green, olive, red; purple, sea-green, salmon
OBJECT_COLORS = ((245, 225, 30), (25, 190, 60), (128, 135, 75), (220, 45, 25))
RIM_COLORS = ((96, 80, 158), (58, 140, 118), (170, 112, 100))
TABLE_COLOR, BACKDROP_COLOR, ARM_COLOR, INSIDE_COLOR = (38, 46, 45), (7, 14, 9), (13, 14, 15), (214, 228, 218)

# metres and radians: the table's radius is 1
RIM = (0.84, 1.04)
ELEVATIONS = (0.62, 0.38, 0.2)  # of the camera: top, center, bottom
DISTANCE, TARGET, FOCAL = 2.0, (0.0, 0.0, 0.36), 86.0  # of the camera; what it looks at; pixels
POST, REACH = 0.40, 0.52  # height of the post, length of the arm
AZIMUTHS, RISES = (-1.4, 1.4), (-0.45, 0.85)  # range of the joints: to the left and right, down and up
OBJECT_RADII = (0.135, 0.22)  # small, large
# coordinates of the samples in pixels of 64 × 64 images, (SAMPLES, SAMPLES) each
X, Y = np.meshgrid(*2 * [(np.arange(SAMPLES, dtype=np.float32) + 0.5) * (SIZE / SAMPLES)])


def project(points, elevation):
    """(…, 3) points of the scene → (…, 3): pixel x, pixel y and pixels a metre, seen from a camera at that elevation."""
    offset = np.asarray(points, np.float64) - TARGET
    right, up = offset[..., 0], offset[..., 1] * math.sin(elevation) + offset[..., 2] * math.cos(elevation)
    depth = DISTANCE + offset[..., 1] * math.cos(elevation) - offset[..., 2] * math.sin(elevation)
    scale = FOCAL / depth
    return np.stack((SIZE / 2 + right * scale, SIZE / 2 - up * scale, scale), axis=-1)


def draw_scene(elevation):
    """(table, rim) as covers of the samples, (S, S) bool: where the rays meet the plane of the table."""
    horizontal, vertical = (X - SIZE / 2) / FOCAL, (SIZE / 2 - Y) / FOCAL
    # rays from the camera, as directions in the scene
    down = math.sin(elevation) - vertical * math.cos(elevation)
    forward = math.cos(elevation) + vertical * math.sin(elevation)
    height = TARGET[2] + DISTANCE * math.sin(elevation)
    length = np.where(down > 1e-3, height / np.maximum(down, 1e-3), np.inf)
    with np.errstate(invalid="ignore", over="ignore"):
        radius = np.hypot(horizontal * length, forward * length - DISTANCE * math.cos(elevation))
    return radius < RIM[0], (radius >= RIM[0]) & (radius < RIM[1])


def joint_positions(sizes):
    """(tips, azimuths) of the arm for every pair of joint positions, in row-major order: (P, 3), (P,)."""
    joints = zip((AZIMUTHS, RISES), sizes, strict=True)
    values = [np.linspace(*limits, size) if size > 1 else np.zeros(1) for limits, size in joints]
    azimuth, rise = (part.ravel() for part in np.meshgrid(*values, indexing="ij"))
    flat = REACH * np.cos(rise)
    tips = np.stack((flat * np.sin(azimuth), -flat * np.cos(azimuth) * 0.6, POST + REACH * np.sin(rise)), axis=1)
    return tips, azimuth


def draw_arm(tips, elevation):
    """(P, S, S) bool: post, foot and arm up to each of the tips."""
    foot, top = project([[0, 0, 0], [0, 0, POST]], elevation)
    wide = 0.11 * foot[2]
    deep = wide * max(math.sin(elevation), 0.3)
    base = ((X - foot[0]) / wide) ** 2 + ((Y - foot[1]) / deep) ** 2 < 1
    still = base | _near_segment(foot, top, 0.045 * foot[2])
    return np.stack([still | _near_segment(top, end, 0.022 * end[2]) for end in project(tips, elevation)])


def _near_segment(start, end, width):
    dx, dy = end[0] - start[0], end[1] - start[1]
    x, y = X - start[0], Y - start[1]
    share = np.clip((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
    return (x - share * dx) ** 2 + (y - share * dy) ** 2 < width**2


def coffee_cup(u, v):
    """(cover, brightness, white) of the samples at (u, v), v upwards: a round cup with a handle, its inside white."""
    body = (np.abs(u) < 0.66 - 0.22 * np.clip(-0.2 - v, 0, 1) ** 2 * 4) & (v > -0.7) & (v < 0.5)
    inside = (u / 0.66) ** 2 + ((v - 0.5) / 0.27) ** 2 < 1
    ring = np.hypot(u - 0.68, v + 0.05)
    handle = (ring < 0.42) & (ring > 0.22) & (u > 0.5)
    return body | inside | handle, 0.95 - 0.4 * np.abs(u), inside


def tennis_ball(u, v):
    """A ball with two white seams."""
    radius = np.hypot(u, v)
    seam = np.minimum(np.abs(np.hypot(u - 1.0, v) - 0.72), np.abs(np.hypot(u + 1.0, v) - 0.72)) < 0.07
    return radius < 0.82, 1.05 - 0.5 * radius**2 + 0.25 * v, seam & (radius < 0.82)


def croissant(u, v):
    """A crescent with dark grooves, its horns downwards."""
    cover = (np.hypot(u, v + 0.3) < 1.0) & (np.hypot(u * 0.92, v + 0.95) > 0.88)
    grooves = np.cos(9 * np.arctan2(u, v + 0.75))
    return cover, 0.8 + 0.3 * grooves, np.zeros_like(cover)


def beer_cup(u, v):
    """A tall glass with ribs, wider above, and white foam on top."""
    glass = (np.abs(u) < 0.42 + 0.12 * v) & (v > -0.95) & (v < 0.6)
    foam = (np.abs(u) < 0.58) & (v >= 0.52) & (v < 0.92 - 0.6 * u**2)
    return glass | foam, 0.8 + 0.25 * np.cos(14 * u), foam


SHAPES = (coffee_cup, tennis_ball, croissant, beer_cup)


def draw_object(shape, radius, tips, azimuths, elevation):
    """(cover, brightness, white) of an object at each of the tips, (P, S, S) each; it turns with the arm."""
    ends = project(tips, elevation)[:, :, None, None].astype(np.float32)
    across, along = (X - ends[:, 0]) / (radius * ends[:, 2]), (ends[:, 1] - Y) / (radius * ends[:, 2])
    angle = (0.45 * azimuths)[:, None, None].astype(np.float32)
    return shape(across * np.cos(angle) - along * np.sin(angle), across * np.sin(angle) + along * np.cos(angle))


def downsample(layer, pixels):
    """(…, S, S) samples → (…, pixels, pixels, 1) float32 means."""
    parts = layer.reshape(*layer.shape[:-2], pixels, SAMPLES // pixels, pixels, SAMPLES // pixels)
    return parts.mean(axis=(-3, -1), dtype=np.float32)[..., None]


def rim_scenes(elevation, count, pixels):
    """(count, pixels, pixels, 3) float32: the empty scene with each rim colour."""
    table, rim = (downsample(cover, pixels) for cover in draw_scene(elevation))
    light = np.float32(0.75 + 0.5 * np.arange(pixels)[:, None, None] / pixels)  # nearer is brighter
    ground = table * np.float32(TABLE_COLOR) * light + (1 - table - rim) * np.float32(BACKDROP_COLOR)
    return ground + rim * np.float32(RIM_COLORS[:count])[:, None, None]


def blocks(sizes, pixels=SIZE):
    """The images of a grid in row-major order, as one (H·V, pixels, pixels, 3) uint8 array for each combination of the rest."""
    _, shapes, object_sizes, cameras, backgrounds, *joints = sizes
    tips, azimuths = joint_positions(joints)
    scenes = [rim_scenes(ELEVATIONS[camera], backgrounds, pixels) for camera in range(cameras)]
    arms = [downsample(draw_arm(tips, ELEVATIONS[camera]), pixels).astype(np.float16) for camera in range(cameras)]
    layers = {}  # in half precision: a full grid has 24 × 1600 of them
    for shape, size, camera in itertools.product(range(shapes), range(object_sizes), range(cameras)):
        cover, brightness, white = draw_object(SHAPES[shape], OBJECT_RADII[size], tips, azimuths, ELEVATIONS[camera])
        parts = (cover, (cover & ~white) * brightness, white)
        layers[shape, size, camera] = [downsample(part, pixels).astype(np.float16) for part in parts]
    for color, shape, size, camera, background in itertools.product(*map(range, sizes[:5])):
        cover, shaded, white = layers[shape, size, camera]
        arm = arms[camera].astype(np.float32)
        image = scenes[camera][background] * (1 - arm) + arm * np.float32(ARM_COLOR)
        image *= 1 - cover.astype(np.float32)
        image += shaded * np.float32(OBJECT_COLORS[color]) + white * np.float32(INSIDE_COLOR)
        yield np.clip(image + 0.5, 0, 255).astype(np.uint8)


def write_images(path, sizes, pixels=SIZE):
    """Write the npz of a grid, a dict factor → number of values: `images` of pixels × pixels, a divisor of 128, and `grid`."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (math.prod(sizes.values()), pixels, pixels, 3)}
    # entries without a time: the same bytes whenever it is drawn
    with replaced(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        with archive.open(zipfile.ZipInfo("images.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for block in blocks(tuple(sizes.values()), pixels):
                member.write(block.tobytes())
        with archive.open(zipfile.ZipInfo("grid.npy"), "w") as member:
            np.lib.format.write_array(member, np.array(tuple(sizes.values())), allow_pickle=False)


def main(argv=None):
    """Draw the images; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("--output-dir", default="data/MPI3d_real_complex", help="folder of the data set (%(default)s)")
    default, names = [4, 4, 2, 3, 3, 10, 10], f"values of {', '.join(MPI3D_GRID)} (4 4 2 3 3 10 10)"
    parser.add_argument("--grid", type=integer(1), nargs=7, metavar="SIZE", default=default, help=names)
    pixels = "pixels along each side; the photographs have %(default)s"
    parser.add_argument("--size", type=int, choices=(32, 64, 128), default=SIZE, help=pixels)
    parser.add_argument("--overwrite", action="store_true", help="replace images that lie in the folder")
    args, _ = parser.parse(argv)
    sizes, path = mpi3d_grid(args.grid, "--grid"), Path(args.output_dir) / MPI3D_FILE
    if path.exists() and not args.overwrite:
        raise InputError(f"{path} exists already; --overwrite replaces it, a downloaded file too")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_images(path, sizes, args.size)
    print(f"{math.prod(sizes.values())} stand-in images in {path}: drawings, not the photographs of MPI3D-Complex")
    return 0


if __name__ == "__main__":
    run_script(main)
