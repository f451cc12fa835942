"""What the images of MPI3D-Complex show, photographs and drawings alike: by it, those of another order are told apart.

Of the photographs two numbers are assumed, generously: the mean and the standard deviation of their pixels. Any other fact
compares images, or parts of them, with one another.
"""

import os

import numpy as np

from running.command_line import InputError

SAMPLES = 48  # images that are looked at, and as many more for each change of a factor
ALIKE = 0.75  # of the difference between images of which nothing is known: what a step of the arm makes at most
FINE_AXIS = 10  # positions of an axis from which one step moves the object by less than its size
GREEN, RED = 1, 3  # of OBJ_COLOR
# mean and standard deviation of all pixels, from half of what is known to twice of it: frames of the photographs have 29 and 30,
# the constants that the training normalises with are 2.2 and 19
BRIGHTNESS, CONTRAST = (1, 60), (9.5, 60)
AXES, OTHERS = ("H_AXIS", "V_AXIS"), ("OBJ_COLOR", "OBJ_SHAPE", "OBJ_SIZE", "BACKGROUND")


def check_scenes(path, images, grid):
    """Raise InputError, which names the file `path`, unless its images (N, H, W, 3) show scenes in the order of `grid`.

    grid: dict factor → number of values. A few hundred images are read. With MPI3D_UNCHECKED=1 in the environment the fact is
    said in a line, and the file is taken as it is.
    """
    for fact in broken_facts(images, grid):
        refuse(path, fact)


def refuse(path, fact):
    """Raise InputError: the file is not that of the data set, as `fact` says; with MPI3D_UNCHECKED=1 a line says so instead."""
    message = f"{path} is damaged, or its images or pixels are in another order: {fact}"
    if os.environ.get("MPI3D_UNCHECKED") != "1":
        raise InputError(f"{message}; get it again, or take it as it is with MPI3D_UNCHECKED=1 in the environment")
    print(f"{message}; it is taken as it is")


def broken_facts(images, grid):
    """Yield, in words, what does not hold of the images that should hold of the scenes in the order of `grid`.

    It cannot tell H_AXIS from V_AXIS, two axes of as many positions, nor always BACKGROUND from one of them or OBJ_SHAPE from
    OBJ_SIZE; nor the values of a factor in another order, but for those of OBJ_COLOR; nor images that are mirrored left to right
    or shifted by a few places; nor damage to some images, since few are looked at: see `reading.images.check_stored_images`.
    """
    rng = np.random.default_rng(0)  # which images are looked at: the same at each start
    points = {name: rng.integers(0, size, SAMPLES) for name, size in grid.items()}

    def shown(**changes):
        rows = np.ravel_multi_index(tuple((points | changes).values()), tuple(grid.values()))
        return images[rows].astype(np.float32)

    def varied(name):
        return shown(**{name: (points[name] + 1) % grid[name]})

    def leans(name):
        """How much more red than green the images have with each value of a factor, (values, SAMPLES)."""
        parts = (shown(**{name: value}) for value in range(grid[name]))
        return np.stack([(part[..., 0] - part[..., 1]).mean((1, 2)) for part in parts])

    base = shown()
    pixels = base.reshape(SAMPLES, -1, 3)
    for name, value, (least, most) in (("mean", base.mean(), BRIGHTNESS), ("standard deviation", base.std(), CONTRAST)):
        if not least <= value <= most:
            yield f"the pixels have a {name} of {value:.1f}, expected {least} … {most}"
    unrelated = distance(pixels, rng.permutation(pixels, axis=1))
    if max(distance(base[:, :, 1:], base[:, :, :-1]), distance(base[:, 1:], base[:, :-1])) > unrelated / 2:
        yield "neighbouring pixels do not resemble each other"
    upper, *_, lower = np.array_split(base.mean((0, 2, 3)), 4)  # the backdrop is dark, and the table is lit
    mirrored = distance(base.mean(0), base.mean(0)[:, ::-1]), distance(base.mean(0), base.mean(0)[::-1])
    if mirrored[0] > mirrored[1] or upper.mean() > lower.mean():
        yield "the table does not lie below"
    unrelated = distance(base, rng.permutation(base))
    for name in AXES:
        if grid[name] >= FINE_AXIS:
            start = np.minimum(points[name], grid[name] - 5)
            one, *more = (distance(shown(**{name: start}), shown(**{name: start + step})) for step in range(1, 5))
            if one >= min(more) or (grid["CAMERA"] > 1 and one >= ALIKE * unrelated):
                yield f"a step along {name} changes more than it should"
    if grid["OBJ_COLOR"] > 1:
        lean = leans("OBJ_COLOR")
        if lean.var(axis=0).mean() <= leans("OBJ_SHAPE").var(axis=0).mean():
            yield "OBJ_SHAPE changes the colour more than OBJ_COLOR does"
        if len(lean) > RED and (lean.mean(1).argmin(), lean.mean(1).argmax()) != (GREEN, RED):
            yield "the objects that should be green or red are not"
    for name in OTHERS:
        if min(grid["CAMERA"], grid[name]) > 1 and distance(base, varied("CAMERA")) < distance(base, varied(name)):
            yield f"{name} changes more than CAMERA does"


def distance(first, second):
    """Mean absolute difference of two arrays."""
    return np.abs(first - second).mean()
