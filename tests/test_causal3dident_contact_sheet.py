"""The contact sheet of Causal3DIdent: which images it shows, what it draws, bad input."""

import functools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rendering_data.Causal3DIdent import contact_sheet
from tests.scripts import outcome

CAPTION = 'A hare of "tab:olive" color is visible, positioned at the mid-left of the image, with a spotlight.'


@pytest.fixture
def run(capsys):
    """run(*flags) → (exit code, stdout, stderr) of contact_sheet.py."""
    return functools.partial(outcome, capsys, contact_sheet.main)


@pytest.fixture
def data(tmp_path):
    """A data set of four red images, three of which are rendered."""
    pd.DataFrame({"object_shape": [1, 1, 0, 2]}).to_csv(tmp_path / "latents_image.csv", index=False)
    for setting in ("selections_6", "perturbations_6"):
        (tmp_path / "text" / setting).mkdir(parents=True)
        (tmp_path / "text" / setting / "text_raw.txt").write_text(f"{CAPTION}\n" * 4)
    (tmp_path / "images").mkdir()
    for k in range(3):
        Image.new("RGB", (16, 16), (200, 0, 0)).save(tmp_path / f"images/{k}.png")
    return tmp_path


def test_every_shape_is_shown_before_one_is_shown_twice():
    files = [Path(f"{k:02d}.png") for k in range(8)]
    chosen = contact_sheet.chosen_images(files, [3, 3, 3, 1, 3, 5, 1, 3], 4)
    assert [int(file.stem) for file in chosen] == [3, 0, 1, 5]


def test_images_and_captions_are_drawn(data, run):
    code, out, err = run("--output-folder", data, "--settings", "selections_6", "perturbations_6", "--columns", 10**20)
    assert code == 0 and "3 images" in out, err
    picture = np.asarray(Image.open(data / "contact_sheet.png").convert("RGB"))
    red = (picture[..., 0] > 150) & (picture[..., 1] < 50)
    assert 0.2 < red.mean() < 0.7
    assert (picture.max(axis=2) < 100).sum() > 200  # the letters


def test_what_is_missing_or_damaged_is_named_and_the_picture_kept(data, run):
    assert run("--output-folder", data)[0] == 0
    before = (data / "contact_sheet.png").read_bytes()
    for output, words in (("sheet.xyz", "sheet.xyz does not end in"), ("no/sheet.png", "no is no folder")):
        code, _, err = run("--output-folder", data, "--output", data / output)
        assert code == 2 and words in err and err.count("\n") == 1
    (data / "images/1.png").write_bytes(b"not an image")
    code, _, err = run("--output-folder", data)
    assert code == 2 and "1.png is damaged" in err and err.count("\n") == 1
    code, _, err = run("--output-folder", data, "--settings", "selections_2")
    assert code == 2 and "selections_2/text_raw.txt is missing" in err and err.count("\n") == 1
    (data / "images.json").write_text('{"latents": "others"}')
    code, _, err = run("--output-folder", data)
    assert code == 2 and "rendered from other latents" in err and err.count("\n") == 1
    (data / "images.json").unlink()
    (data / "text/selections_6/text_raw.txt").write_text(CAPTION)
    code, _, err = run("--output-folder", data)
    assert code == 2 and "1 captions for 4 images" in err and err.count("\n") == 1
    for path in (data / "images").iterdir():
        path.unlink()
    code, _, err = run("--output-folder", data)
    assert code == 2 and "holds no images" in err and err.count("\n") == 1
    assert (data / "contact_sheet.png").read_bytes() == before


def test_each_image_has_its_own_caption(data, run, monkeypatch):
    for setting in ("selections_6", "perturbations_6"):
        (data / "text" / setting / "text_raw.txt").write_text("".join(f"{setting[0]} {k}\n" for k in range(4)))
    (data / "images/0.png").unlink()  # as when the first batch is not rendered yet
    for k in (1, 2, 3):
        Image.new("RGB", (16, 16), (50 * k, 0, 0)).save(data / f"images/{k}.png")
    drawn = []
    monkeypatch.setattr(contact_sheet, "draw", lambda images, captions, *_: drawn.extend(zip(images, captions, strict=True)))
    assert run("--output-folder", data, "--settings", "selections_6", "perturbations_6")[0] == 0
    assert [int(image[0, 0, 0]) // 50 for image, _ in drawn] == [2, 1, 3], "the shapes 0, 1, 2"
    for image, caption in drawn:
        number = int(image[0, 0, 0]) // 50
        assert caption == f"selections 6: s {number}\nperturbations 6: p {number}"
