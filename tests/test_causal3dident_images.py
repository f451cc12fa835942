"""Causal3DIdent's images, rendered for real: each factor changes its pixels and no others; runs stop, go on and repeat.

The scenes are tiny, of the stand-in shapes. With the environment variable CAUSAL3DIDENT_ASSETS, the folder assets of a clone
of Multimodal3DIdent, those of its shapes that are there are rendered as well.
"""

import csv
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image

from reading.causal3dident import CAUSAL_IMAGE, read_latents
from rendering_data.Causal3DIdent import generate_images
from running.command_line import InputError
from tests.scripts import outcome

ROOT = Path(__file__).parents[1]
BLENDER = ROOT / ".venv-blender/bin/python"
SCRIPT = ROOT / "rendering_data/Causal3DIdent/generate_images.py"
SIZE = 48
renders = pytest.mark.skipif(not BLENDER.exists(), reason="no .venv-blender: make blender installs it, with Python 3.11")

# A green cone on red ground under a red light from the right; then the same but for one factor.
BASE = {
    "object_shape": 1,
    "object_xpos": 1,
    "object_ypos": 1,
    "object_zpos": 0,
    "object_alpharot": 0.3,
    "object_betarot": 0.3,
    "object_gammarot": 0.3,
    "spotlight_pos": 0.5,
    "object_color": 0.4,
    "spotlight_color": 0.5,
    "background_color": 0.5,
}
CHANGES = {
    "base": {},
    "left": {"object_xpos": 0},
    "right": {"object_xpos": 2},
    "top": {"object_ypos": 0},
    "bottom": {"object_ypos": 2},
    "alpha": {"object_alpharot": 0.8},
    "beta": {"object_betarot": 0.8},
    "gamma": {"object_gammarot": 0.8},
    "light from behind": {"spotlight_pos": 0.1},
    "blue object": {"object_color": 2 / 3},
    "yellow light": {"spotlight_color": 0.8},
    "yellow ground": {"background_color": 0.8},
    **{f"shape {k}": {"object_shape": k} for k in (0, 2, 3, 4, 5, 6)},
}


def write_latents(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "latents_image.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, BASE)
        writer.writeheader()
        writer.writerows(rows)


def command(folder, *flags):
    return [str(BLENDER), str(SCRIPT), "--output-folder", str(folder), "--size", str(SIZE), "--samples", "8", *map(str, flags)]


def render(folder, *flags):
    """Standard output of a run that ends well."""
    result = subprocess.run(command(folder, *flags), capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    return result.stdout


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB")).astype(float)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """(folder, {name of CHANGES: (H, W, 3) pixels}): first a run that is stopped, then the rest in two batches."""
    folder = tmp_path_factory.mktemp("causal") / "data"
    write_latents(folder, [BASE | change for change in CHANGES.values()])
    process = subprocess.Popen(command(folder, "--workers", 1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not list((folder / "images").glob("[0-9]*.png")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    stopped = {"code": process.returncode, "out": out, "err": err, "files": sorted(p.name for p in folder.glob("images/*"))}
    early = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("images/*")}
    logs = [render(folder, "--n-batches", 2, "--batch-index", k, "--workers", k + 1) for k in range(2)]
    files = sorted((folder / "images").iterdir())
    images = {name: pixels(file) for name, file in zip(CHANGES, files, strict=True)}
    return {"folder": folder, "images": images, "stopped": stopped, "early": early, "logs": logs}


def changed(images, name, level=12):
    """(H, W) bool: the pixels of which a channel differs from the base image by more than `level` of 255."""
    return (np.abs(images[name] - images["base"]) > level).any(axis=2)


def object_mask(image):
    """(H, W) bool: the pixels of a green object on red ground under red light."""
    return (image[..., 1] > image[..., 0] + 8) & (image[..., 1] > 30)


def grown(mask, pixels=2):
    """(H, W) bool: `mask` and what is at most `pixels` away from it in each direction."""
    steps = range(-pixels, pixels + 1)
    return np.any([np.roll(mask, (dy, dx), (0, 1)) for dy in steps for dx in steps], axis=0)


def centre(mask):
    """(x, y) of the mean of a mask's pixels, as shares of the image."""
    y, x = np.nonzero(mask)
    return x.mean() / mask.shape[1], y.mean() / mask.shape[0]


@renders
def test_all_images_are_there_and_say_what_they_are(rendered):
    folder = rendered["folder"]
    assert sorted(p.name for p in folder.glob("images/*")) == [f"{k:02d}.png" for k in range(len(CHANGES))]
    with Image.open(folder / "images/00.png") as image:
        assert image.size == (SIZE, SIZE) and image.mode == "RGB"
    assert json.loads((folder / "images.json").read_text())["shapes"] == "stand-ins"
    assert all("stand-in shapes" in log for log in rendered["logs"])
    assert f"image {len(CHANGES) // 2}/{len(CHANGES) // 2}" in rendered["logs"][1]
    assert "images/s" in rendered["logs"][1] and "left" in rendered["logs"][1]


@renders
def test_a_stopped_run_leaves_whole_images_and_goes_on(rendered):
    stopped, early = rendered["stopped"], rendered["early"]
    assert stopped["code"] == 130 and stopped["err"] == "error: interrupted\n" and "the same command continues" in stopped["out"]
    assert 0 < len(stopped["files"]) < len(CHANGES)
    assert all(name.endswith(".png") and not name.startswith(".") for name in stopped["files"])
    for path, (content, written) in early.items():
        assert path.read_bytes() == content and path.stat().st_mtime_ns == written


@renders
def test_an_image_depends_on_its_latents_and_the_seed_alone(rendered):
    """The last but one, rendered again by itself, gets the same bytes; a complete folder is left alone."""
    folder = rendered["folder"]
    path = sorted((folder / "images").iterdir())[-2]
    content = path.read_bytes()
    path.unlink()
    assert "1 images of" in render(folder)
    assert path.read_bytes() == content
    assert "are there already" in render(folder)


@renders
def test_the_object_moves_with_its_position(rendered):
    images = rendered["images"]
    x, y = zip(*(centre(object_mask(images[name])) for name in ("left", "base", "right", "top", "bottom")), strict=True)
    assert x[0] < 0.4 < x[1] < 0.6 < x[2]
    assert y[3] < y[1] - 0.08 and y[1] + 0.12 < y[4]
    assert abs(y[0] - y[1]) < 0.05 and abs(y[2] - y[1]) < 0.05


@renders
def test_shapes_and_rotations_change_the_object_and_its_shadow_alone(rendered):
    images = rendered["images"]
    lit = changed(images, "yellow light", 4)
    reach = np.zeros_like(lit)  # the object, its shadows, and the pool of light that the height of the ground moves
    rows, columns = np.nonzero(lit | object_mask(images["base"]))
    reach[rows.min() - 6 : rows.max() + 7, max(columns.min() - 6, 0) : columns.max() + 7] = True
    assert 0.1 < reach.mean() < 0.7
    masks = {name: object_mask(images[name]) for name in images if name.startswith("shape") or name in ("alpha", "beta", "gamma")}
    for name, mask in masks.items():
        assert mask.sum() > 20, name
        assert (mask ^ object_mask(images["base"])).sum() > 15, name
        assert not (changed(images, name) & ~reach).any(), name
    for first in masks:
        for second in masks:
            assert first >= second or (masks[first] ^ masks[second]).sum() > 15, (first, second)


@renders
def test_the_object_colour_changes_the_object_alone(rendered):
    images = rendered["images"]
    difference, inside = changed(images, "blue object", 25), object_mask(images["base"])
    assert difference[inside].mean() > 0.9
    assert difference[~grown(inside)].mean() < 0.002  # but for noise at the edge of the shadow
    blue = images["blue object"][inside].mean(axis=0)
    assert blue[2] > 2 * blue[0] and blue[2] > 2 * blue[1]


@renders
def test_the_spotlight_colour_leaves_the_unlit_background_alone(rendered):
    images = rendered["images"]
    difference = changed(images, "yellow light", 8)
    assert 0.05 < difference.mean() < 0.35
    assert not difference[: SIZE // 3].any() and not difference[-2:].any()
    assert not difference[:, :3].any() and not difference[:, -SIZE // 5 :].any()
    pool = difference & ~object_mask(images["base"])
    gain = (images["yellow light"] - images["base"])[pool].mean(axis=0)
    assert gain[1] > 15 and abs(gain[0]) < 8  # yellow is red and green


@renders
def test_the_spotlight_position_moves_the_pool_of_light_and_the_shadow_alone(rendered):
    images = rendered["images"]
    pools = [changed(images, "yellow light", 4)]
    difference = changed(images, "light from behind", 8)
    assert difference.sum() > 30
    before = centre(pools[0] & ~object_mask(images["base"]))
    brighter = (images["light from behind"] - images["base"])[..., 0] > 10
    assert centre(brighter)[1] > before[1]  # a light behind the object throws its pool to the front
    assert not difference[: SIZE // 6].any() and not difference[:, : SIZE // 10].any()


@renders
def test_the_background_colour_changes_the_ground_alone(rendered):
    images = rendered["images"]
    difference, outside = changed(images, "yellow ground", 16), ~object_mask(images["base"])
    dark = images["base"].max(axis=2) < 40  # in shadow
    assert difference[outside & ~dark].mean() > 0.95
    interior = ~grown(outside, 1)  # the object's rim mixes with the ground
    assert interior.sum() > 20 and not difference[interior].any()
    corner = images["yellow ground"][:6, :6].mean(axis=(0, 1))
    assert abs(corner[0] - corner[1]) < 25 and corner[1] > corner[2] + 15


@renders
def test_pictures_put_together_lamp_by_lamp_are_those_of_all_lamps_at_once(tmp_path):
    """Of shadows, pool and ground nothing is cut off, doubled or left out: no place differs from the plain rendering's."""
    rows = [
        BASE | {"object_xpos": 0, "object_ypos": 2, "object_shape": 4, "spotlight_pos": 0.1},
        BASE | {"object_xpos": 2, "object_ypos": 0, "background_color": 0.1, "spotlight_color": 0.1},
        BASE | {"object_ypos": 2, "object_shape": 5, "spotlight_pos": 0.9, "background_color": 0.9},
    ]
    for name in ("fast", "plain"):
        write_latents(tmp_path / name, rows)
        render(tmp_path / name, "--samples", 256, *(["--plain"] if name == "plain" else []))
    for k in range(len(rows)):
        difference = pixels(tmp_path / f"fast/images/{k}.png") - pixels(tmp_path / f"plain/images/{k}.png")
        places = np.lib.stride_tricks.sliding_window_view(difference, (4, 4), axis=(0, 1)).mean(axis=(3, 4))
        assert np.abs(places).max() < 5, k
        assert np.abs(difference).mean() < 1, k


@renders
@pytest.mark.skipif(shutil.which("blender") is None, reason="no Blender installed")
def test_an_installed_blender_renders_the_same(tmp_path):
    write_latents(tmp_path / "own", [BASE])
    write_latents(tmp_path / "package", [BASE])
    line = ["blender", "--background", "--python", str(SCRIPT), "--", "--output-folder", str(tmp_path / "own")]
    result = subprocess.run([*line, "--size", str(SIZE), "--samples", "64"], capture_output=True, text=True, timeout=300)
    if "too old" in result.stderr:
        assert result.returncode == 2
        pytest.skip(result.stderr.splitlines()[-1])
    assert result.returncode == 0, result.stderr
    render(tmp_path / "package", "--samples", 64)
    assert np.abs(pixels(tmp_path / "own/images/0.png") - pixels(tmp_path / "package/images/0.png")).max() <= 2


@renders
def test_braces_in_a_folder_s_name_are_no_variables_and_nothing_is_left_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    write_latents(Path("{x}"), [BASE])
    render(Path("{x}"), "--samples", "2")
    write_latents(Path("{x}/{y}"), [BASE])
    render(Path("{x}/{y}"), "--samples", "2", "--plain")
    assert os.listdir("{x}/images") == os.listdir("{x}/{y}/images") == ["0.png"] and os.listdir("temporary") == []


@renders
def test_hues_below_0_are_wrapped_by_the_protocol_paper_alone(tmp_path):
    """The ground's hue −0.15: red with less green than blue; wrapped, with as much blue as red, almost."""
    corners = {}
    for protocol in ("code", "paper"):
        write_latents(tmp_path / protocol, [BASE | {"background_color": 0.2}])
        render(tmp_path / protocol, "--protocol", protocol)
        assert json.loads((tmp_path / protocol / "images.json").read_text())["protocol"] == protocol
        corners[protocol] = pixels(tmp_path / protocol / "images/0.png")[:6, :6].mean(axis=(0, 1))
    assert corners["code"][2] < 0.75 * corners["code"][0]
    assert corners["paper"][2] > 0.9 * corners["paper"][0]


@renders
@pytest.mark.skipif(not os.environ.get("CAUSAL3DIDENT_ASSETS"), reason="CAUSAL3DIDENT_ASSETS names no folder of assets")
def test_the_real_shapes_are_rendered(tmp_path):
    assets = Path(os.environ["CAUSAL3DIDENT_ASSETS"])
    there = [k for k in range(7) if (assets / generate_images.shape_file(k)).exists()]
    write_latents(tmp_path, [BASE | {"object_shape": k} for k in there])
    assert "stand-in" not in render(tmp_path, "--assets", assets)
    masks = [object_mask(pixels(file)) for file in sorted((tmp_path / "images").iterdir())]
    assert len(masks) == len(there) and all(mask.sum() > 20 for mask in masks)
    assert all((a ^ b).sum() > 15 for k, a in enumerate(masks) for b in masks[:k])


@renders
@pytest.mark.parametrize("content", [b"", b"no scene", "another scene"])
def test_a_base_scene_that_is_none_is_named(tmp_path, content):
    write_latents(tmp_path, [BASE])
    for name in ("scenes/base_scene_equal_xyz", "materials/Rubber", "shapes/ShapeHare"):
        file = tmp_path / f"assets/{name}.blend"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"" if isinstance(content, str) else content)
    if isinstance(content, str):  # a scene, but without the ground
        save = "import bpy, sys; bpy.ops.wm.save_as_mainfile(filepath=sys.argv[1])"
        scene = tmp_path / "assets/scenes/base_scene_equal_xyz.blend"
        subprocess.run([BLENDER, "-c", save, scene], check=True, capture_output=True)
    ended = subprocess.run(command(tmp_path, "--assets", tmp_path / "assets"), capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert "base_scene_equal_xyz.blend" in ended.stderr and "fresh clone of Multimodal3DIdent" in ended.stderr


class Point(tuple):
    """Stands for mathutils.Vector: what is subtracted from knows its direction."""

    def __rsub__(self, other):
        direction = tuple(a - b for a, b in zip(other, self, strict=True))
        return SimpleNamespace(to_track_quat=lambda *axes: SimpleNamespace(to_euler=lambda: (direction, axes)))


@pytest.mark.parametrize(("protocol", "ground_rgb", "light_rgb"), [
    ("code", (1, -0.14, 0.4), (1, -0.28, 0.2)), ("paper", (1, 0.4, 0.94), (1, 0.2, 0.68))])  # fmt: skip
def test_latents_are_set_as_specified(scenes, monkeypatch, protocol, ground_rgb, light_rgb):
    monkeypatch.setattr(scenes, "Euler", tuple)
    monkeypatch.setattr(scenes, "Vector", Point)
    shape, other = (SimpleNamespace(location=place) for place in (scenes.PARKED, (1, 2, 3)))
    ground, spot = SimpleNamespace(location=SimpleNamespace(z=0)), SimpleNamespace(data=SimpleNamespace())
    latents = BASE | {"object_xpos": 2, "object_ypos": 0, "object_alpharot": 0.25, "object_betarot": 0.5, "object_gammarot": 1.0,
                      "spotlight_pos": 0.75, "object_color": 1 / 3, "background_color": 0.2, "spotlight_color": 0.3}  # fmt: skip
    scenes.set_latents({1: (shape, 3.0), 2: (other, 4.0)}, ground, spot, latents, protocol)
    assert shape.location == (-3, 3, 0) and other.location == scenes.PARKED and ground.location.z == -3
    assert shape.rotation_euler == pytest.approx((-math.pi / 4, 0, math.pi / 2))
    assert shape.color == pytest.approx((0, 1, 0, 1))
    assert spot.location == pytest.approx((8**0.5, 8**0.5, 9))
    direction, axes = spot.rotation_euler
    assert direction == pytest.approx((-3 - 8**0.5, 3 - 8**0.5, -9)) and axes == ("-Z", "Y")
    assert ground.color == pytest.approx((*ground_rgb, 1)) and spot.data.color == pytest.approx(light_rgb)


def test_the_scene_is_built_as_specified(scenes, monkeypatch):
    shape = MagicMock(scale=[1.0, 2.0, 1.0], bound_box=[(0, 0, 0), (1, 1, 2.5)])
    monkeypatch.setattr(scenes, "load_base_scene", lambda *_: MagicMock())
    monkeypatch.setattr(scenes, "append", lambda *_: shape)
    settings = {"size": 128, "samples": 128, "plain": False, "denoise": True, "threads": 1, "device": "cpu",
                "assets": {"scene": "", "material": ""}, "shapes": [(4, "ShapeArmadillo.blend")]}  # fmt: skip
    shapes, _, spot = scenes.build_scene(settings)
    assert shape.scale == [1.5, 3, 1.5] and shape.rotation_mode == "XYZ" and shapes == {4: (shape, 3.75)}
    light = spot.data
    assert (light.energy, light.spot_blend, light.shadow_soft_size) == (3000, 0.1, 0.5)
    assert light.spot_size == pytest.approx(math.radians(35))
    (corners, _, faces), _ = scenes.bpy.data.meshes.new.return_value.from_pydata.call_args
    assert sorted(corners) == [(x, y, 0) for x in (-750, 750) for y in (-750, 750)] and len(faces) == 1
    cycles, render = scenes.bpy.context.scene.cycles, scenes.bpy.context.scene.render
    kinds = ("max", "diffuse", "glossy", "transmission", "volume", "transparent_max")
    assert [getattr(cycles, f"{kind}_bounces") for kind in kinds] == [0] * 6
    assert cycles.samples == render.resolution_x == render.resolution_y == 128


# --------------------------------------------------------------------------------------------------------------
# bad input, found before Blender starts


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """run(*flags) → (exit code, stderr) of generate_images.py on tmp_path, where no Blender is started."""
    monkeypatch.setattr(generate_images, "renderer_command", lambda: pytest.fail("Blender was to be started"))
    write_latents(tmp_path, [BASE] * 3)

    def call(*flags):
        code, _, err = outcome(capsys, generate_images.main, "--output-folder", tmp_path, *flags)
        return code, err

    return call


def test_a_python_without_blender_says_which_command_installs_it(tmp_path, run, monkeypatch, capsys):
    monkeypatch.undo()
    code, err = run()
    assert code == 2 and "make blender" in err and err.count("\n") == 1
    assert not (tmp_path / "images.json").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{name: value for name, value in BASE.items() if name != "spotlight_color"}], "spotlight_color is missing"),
        ([BASE, BASE | {"object_shape": 7}], "line 3: object_shape is 7, expected an integer in 0 … 6"),
        ([BASE | {"object_xpos": 0.5}], "object_xpos is 0.5"),
        ([BASE | {"background_color": "nan"}], "background_color is nan, expected a number in [0, 1]"),
        ([BASE | {"object_alpharot": -0.1}], "object_alpharot is -0.1"),
        ([], "has no rows"),
    ],
)
def test_damaged_latents_are_named(tmp_path, run, rows, words):
    write_latents(tmp_path, rows)
    code, err = run()
    assert code == 2 and words in err and "latents_image.csv" in err and err.count("\n") == 1
    assert not (tmp_path / "images").exists()


def test_missing_columns_and_a_missing_file_are_named(tmp_path, run):
    path = tmp_path / "latents_image.csv"
    path.write_text(path.read_text().replace("object_color", "color"))
    code, err = run()
    assert code == 2 and "has no column object_color" in err and err.count("\n") == 1
    path.unlink()
    code, err = run()
    assert code == 2 and "latents_image.csv is missing" in err and "generate_latents.py" in err


def test_missing_assets_are_named(tmp_path, run):
    (tmp_path / "assets/shapes").mkdir(parents=True)
    code, err = run("--assets", tmp_path / "assets")
    assert code == 2 and err.count("\n") == 1
    for name in ("scenes/base_scene_equal_xyz.blend", "materials/Rubber.blend", "shapes/ShapeHare.blend"):
        assert name in err
    assert "ShapeCow" not in err  # no image shows one


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--n-batches 3 --batch-index 3", "--batch-index 3 is out of range"),
        ("--samples 0", "0 is too small"),
        ("--size 4", "4 is too small"),
        ("--device metal", "invalid choice"),
        ("--workers 0", "0 is too small"),
    ],
)
def test_wrong_flags_are_one_line(run, flags, words):
    code, err = run(*flags.split())
    assert code == 2 and words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "1.png is damaged"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "1.png is damaged"),
        (None, "1.png has 20 × 20 pixels, not 48 × 48"),
    ],
)
def test_an_image_that_does_not_belong_there_is_named_and_kept(tmp_path, run, begun, content, words):
    begun("--size", 48)
    path = tmp_path / "images/1.png"
    Image.new("RGB", (20, 20)).save(path) if content is None else path.write_bytes(content)
    before = path.read_bytes()
    code, err = run("--size", 48)
    assert code == 2 and words in err and err.count("\n") == 1
    assert path.read_bytes() == before


@pytest.fixture
def begun(tmp_path, run, monkeypatch):
    """begun(*flags): a run that wrote images.json and whose processes ended at once."""

    def call(*flags):
        monkeypatch.setattr(generate_images, "renderer_command", lambda: [sys.executable, "-c", "exit('no such GPU')"])
        code, err = run("--workers", 1, *flags)
        assert code == 2 and "Blender did not start" in err and "no such GPU" in err and "make blender" in err
        assert err.count("\n") == 1 and (tmp_path / "images.json").exists()

    return call


def test_settings_may_change_until_there_is_an_image(tmp_path, begun):
    for size in (48, 16):
        begun("--size", size)
        assert json.loads((tmp_path / "images.json").read_text())["size"] == size


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("1.jpg",), "holds 1.jpg, and the images of these latents are 0.png … 2.png"),
        (("01.png",), "holds 01.png, and"),
        (("3.png",), "holds 3.png, and"),
        (("1.png",), "which says what they were rendered from, is missing"),
    ],
)
def test_images_of_unknown_origin_are_refused_and_kept(tmp_path, run, monkeypatch, names, words):
    monkeypatch.setattr(generate_images, "renderer_command", lambda: [])
    (tmp_path / "images").mkdir()
    for name in names:
        Image.new("RGB", (128, 128)).save(tmp_path / "images" / name)
    code, err = run()
    assert code == 2 and words in err and err.count("\n") == 1
    assert {path.name for path in (tmp_path / "images").iterdir()} == set(names)
    assert not (tmp_path / "images.json").exists()


def test_what_killed_runs_left_is_removed_a_day_later(tmp_path, begun):
    (tmp_path / "images").mkdir()
    for name, age in (("old", 2 * 24 * 3600), ("new", 60)):
        (tmp_path / f"images/.{name}.png.0.part").touch()
        os.utime(tmp_path / f"images/.{name}.png.0.part", (time.time() - age,) * 2)
    begun()
    assert [path.name for path in (tmp_path / "images").iterdir()] == [".new.png.0.part"]


def test_latents_of_other_editors_are_read(tmp_path):
    path = tmp_path / "latents_image.csv"
    write_latents(tmp_path, [BASE] * 3)
    plain = read_latents(path, CAUSAL_IMAGE)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", b"\n") + b"\n")
    read = read_latents(path, CAUSAL_IMAGE)
    assert list(read) == list(plain) and all(np.array_equal(read[name], plain[name]) for name in plain)


def test_images_of_other_latents_or_settings_are_not_mixed(tmp_path, run, begun):
    begun()
    for k in range(3):
        Image.new("RGB", (128, 128)).save(tmp_path / f"images/{k}.png")
    assert run()[0] == 0  # complete: nothing to render
    code, err = run("--samples", 16)
    assert code == 2 and "other samples" in err and "images.json" in err and err.count("\n") == 1
    code, err = run("--protocol", "paper")
    assert code == 2 and "other protocol" in err
    write_latents(tmp_path, [BASE | {"object_xpos": 0}] * 3)
    code, err = run()
    assert code == 2 and "other latents" in err
    (tmp_path / "images.json").write_text("{")
    code, err = run()
    assert code == 2 and "images.json is damaged" in err


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, run, monkeypatch):
    monkeypatch.setattr(generate_images, "renderer_command", lambda: [])
    (tmp_path / "images").write_text("mine")
    code, err = run()
    assert code == 2 and str(tmp_path / "images") in err and err.count("\n") == 1
    assert (tmp_path / "images").read_text() == "mine"


@pytest.fixture
def scenes(monkeypatch):
    """The module scenes beside a Blender that does nothing."""
    for name in ("bpy", "bmesh", "mathutils"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    yield importlib.import_module("rendering_data.Causal3DIdent.scenes")
    del sys.modules["rendering_data.Causal3DIdent.scenes"]


def test_hues_of_the_protocols(scenes):
    assert scenes.hue(0.2, "code") == pytest.approx(-0.15)
    assert scenes.hue(0.2, "paper") == pytest.approx(0.85)
    assert scenes.hue(0.9, "code") == scenes.hue(0.9, "paper") == pytest.approx(0.2)


def test_batches_are_disjoint_and_cover_everything():
    parts = [generate_images.batch_indices(10, 3, k) for k in range(3)]
    assert [i for part in parts for i in part] == list(range(10))
    assert [len(part) for part in parts] == [3, 3, 4]


def test_inside_blender_the_processes_are_blenders(monkeypatch):
    blender = SimpleNamespace(app=SimpleNamespace(binary_path="/opt/blender/blender"))
    monkeypatch.setitem(sys.modules, "bpy", blender)
    line = generate_images.renderer_command()
    assert line[:2] == ["/opt/blender/blender", "--background"]
    assert line[line.index("--python") + 1] == generate_images.__file__ and line[-2:] == ["--", "--work"]


def test_a_blender_without_a_denoiser_renders_what_needs_none(scenes):
    class Cycles(SimpleNamespace):
        def __setattr__(self, name, value):
            if name == "denoiser":
                raise TypeError('enum "OPENIMAGEDENOISE" not found in ()')
            super().__setattr__(name, value)

    scenes.bpy.context.scene.cycles = Cycles()
    settings = {"size": 64, "samples": 64, "plain": False, "denoise": True, "threads": 1, "device": "cpu"}
    scenes.set_up_cycles(settings)
    assert scenes.bpy.context.scene.cycles.samples == 64
    for change in ({"samples": 63}, {"plain": True}):
        with pytest.raises(InputError, match="built without OpenImageDenoise"):
            scenes.set_up_cycles(settings | change)


def test_handlers_of_blender_s_own_need_not_be_put_back(begun, monkeypatch):
    """Blender handles Ctrl-C itself, of which Python knows nothing: signal.signal returns None."""

    def set_handler(number, handler):
        if not callable(handler) and handler not in (signal.SIG_IGN, signal.SIG_DFL):
            raise TypeError("signal handler must be signal.SIG_IGN, signal.SIG_DFL, or a callable object")

    monkeypatch.setattr(signal, "signal", set_handler)
    begun()


def test_a_process_that_dies_ends_the_run_with_its_last_words(tmp_path, run, monkeypatch):
    code = "import sys; sys.stdin.readline(); print('ready'); sys.stdin.readline(); sys.exit('out of memory')"
    monkeypatch.setattr(generate_images, "renderer_command", lambda: [sys.executable, "-u", "-c", code])
    code, err = run("--workers", 2)
    assert code == 2 and "out of memory" in err and "continues" in err and err.count("\n") == 1
    assert [path.name for path in (tmp_path / "images").iterdir()] == []


def test_renderers_are_told_the_defaults_and_a_seed_for_each_image_and_flag(run, monkeypatch):
    told = []

    class Renderers:
        def __init__(self, settings, count):
            self.settings = settings

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def render(self, images):
            told.append((self.settings, images))
            return iter(())

    monkeypatch.setattr(generate_images, "renderer_command", lambda: [])
    monkeypatch.setattr(generate_images, "Renderers", Renderers)
    for seed in (0, 1, 0):
        assert run("--seed", seed)[0] == 0
    settings = told[0][0]
    assert (settings["samples"], settings["size"], settings["protocol"]) == (128, 128, "code") and settings["denoise"]
    seeds = [[image["seed"] for image in images] for _, images in told]
    assert seeds[0] == seeds[2] and len({*seeds[0], *seeds[1]}) == 6
