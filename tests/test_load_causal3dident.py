"""Causal3DIdent as tensors, against a plain reading of its files; its images decoded once; whatever is wrong with it."""

import concurrent.futures
import errno
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import datasets
from datasets import Bias, causal_bias, load_causal3dident
from reading import images as image_reading
from reading.captions import tokenise
from reading.causal3dident import CAUSAL_PALETTES, CAUSAL_TEXT, causal_text_factor
from reading.causal3dident import CAUSAL_SEMANTICS as SELECTED
from reading.images import decode_image, open_image_folder
from rendering_data.Causal3DIdent import contact_sheet, generate_latents, generate_text
from rendering_data.Causal3DIdent.generate_latents import PALETTES, PERTURBED
from rendering_data.Causal3DIdent.generate_text import TEMPLATES
from running.command_line import InputError
from tests.scripts import Killed, outcome, replace

ROOT = Path(datasets.__file__).parent


def as_jpg(folder):
    """Every other image as .jpg."""
    for path in sorted((folder / "images").iterdir())[::2]:
        with Image.open(path) as image:
            image.save(path.with_suffix(".jpg"))
        path.unlink()


@pytest.mark.parametrize(
    "bias_type, bias_id, change", [("selections", 0, None), ("selections", 5, as_jpg), ("perturbations", 4, None)]
)
def test_pairs_are_those_of_a_plain_loop_over_the_files(causal3dident, bias_type, bias_id, change):
    if change:
        change(causal3dident)
    pairs, _ = load_causal3dident(causal3dident, bias_type, bias_id)
    files = sorted((causal3dident / "images").iterdir(), key=lambda path: path.stem)
    captions = (causal3dident / f"text/{bias_type}_{bias_id}/text_raw.txt").read_text().splitlines()
    # as text: pandas 2 cuts off digits of numbers
    image = pd.read_csv(causal3dident / "latents_image.csv", dtype=str).drop(columns="object_zpos")
    text = pd.read_csv(causal3dident / f"latents_text_{bias_type}_{bias_id}.csv", dtype=str)
    words = {number: word for word, number in pairs.vocabulary.items()}
    assert list(pairs.splits) == ["train", "fit", "test"]
    for split, start, stop in (("train", 0, 160), ("fit", 160, 180), ("test", 180, 200)):
        rows = torch.arange(stop - start)
        assert len(pairs.splits[split]) == stop - start
        found = zip(pairs.images_of(split, rows), pairs.tokens_of(split, rows).tolist(), strict=True)
        for number, (pixels, tokens) in enumerate(found, start):
            with Image.open(files[number]) as expected:
                assert np.array_equal(pixels, np.asarray(expected))
            caption = [*tokenise(captions[number]), "{eos}"]
            assert [words[token] for token in tokens] == caption + ["{pad}"] * (pairs.length - len(caption))
        for table, factors in ((image, pairs.splits[split].image_factors), (text, pairs.splits[split].text_factors)):
            for name, values in factors.items():
                column = table[name.replace("spotlight_color_", "splotlight_color_")]
                assert values.tolist() == [float(cell) for cell in column[start:stop]], name
                assert values.dtype == (torch.int64 if column.str.isdecimal().all() else torch.float64)
        assert set(pairs.splits[split].image_factors) == set(image)
    # the vocabulary knows the words of all captions, {unk} is none
    spoken = dict.fromkeys(word for line in captions for word in tokenise(line))
    assert list(words.values()) == ["{pad}", "{eos}", "{unk}", *spoken]


def test_the_settings_and_the_text_s_factors_are_those_of_who_writes_them():
    for k in range(7):
        assert causal_bias("selections", k) == Bias(SELECTED[: k + 1], ())
        bias = causal_bias("perturbations", k)
        assert bias.selected == SELECTED and set(bias.perturbed) == set(PERTURBED[:k])
    sizes = {name: len(palette) for name, palette in PALETTES.items()}
    assert sizes == CAUSAL_PALETTES and {len(templates) for templates in TEMPLATES.values()} == {5}
    assert CAUSAL_TEXT == {
        "object_shape": 7,
        "object_xpos": 3,
        "object_ypos": 3,
        "spotlight_pos": None,
        "object_color_index": 10,
        "spotlight_color_index": 148,
        "background_color_index": 949,
        "text_phrasing": 5,
    }
    assert [causal_text_factor(name) for name in SELECTED] == list(CAUSAL_TEXT)[:-1]


@pytest.mark.parametrize("k", [3, 6])
def test_a_selection_s_text_factors_are_what_its_captions_state(causal3dident, k):
    pairs, _ = load_causal3dident(causal3dident, "selections", k)
    expected = [*SELECTED[:4], "object_color_index", "spotlight_color_index", "background_color_index"][: k + 1]
    assert list(pairs.splits["fit"].text_factors) == [*expected, "text_phrasing"]


def test_the_other_spelling_is_read_alike(causal3dident):
    before, _ = load_causal3dident(causal3dident, "perturbations", 2)
    path = causal3dident / "latents_text_perturbations_2.csv"
    assert path.read_text().count("splotlight_color_index") == 1
    replace(path, path.read_text().replace("splotlight_color_", "spotlight_color_"))
    after, _ = load_causal3dident(causal3dident, "perturbations", 2)
    for name, values in before.splits["train"].text_factors.items():
        assert torch.equal(after.splits["train"].text_factors[name], values)


# --------------------------------------------------------------------------------------------------------------
# captions that leave factors out at random


def omit(folder):
    """Have the captions of a folder leave out three of ten factors."""
    flags = ["--output-folder", str(folder)]
    generate_latents.main([*flags, "--n-points", "200", "--seed", "0", "--omission-prob", "0.3", "--overwrite"])
    generate_text.main(flags)


@pytest.mark.parametrize("bias_type, bias_id", [("selections", 1), ("selections", 5), ("perturbations", 4)])
def test_omissions_change_the_captions_and_no_target_of_a_probe(causal3dident, bias_type, bias_id):
    plain, bias = load_causal3dident(causal3dident, bias_type, bias_id)
    assert bias == causal_bias(bias_type, bias_id) and bias.omitted == 0
    omit(causal3dident)
    pairs, bias = load_causal3dident(causal3dident, bias_type, bias_id)
    table = pd.read_csv(causal3dident / f"omitted_text_{bias_type}_{bias_id}.csv")
    assert bias.omitted == pytest.approx(table[:160].to_numpy().mean()) and 0.2 < bias.omitted < 0.4
    assert bias.unbiased == causal_bias(bias_type, bias_id).unbiased
    for split, own in pairs.splits.items():
        for kind in ("image_factors", "text_factors"):
            found, expected = getattr(own, kind), getattr(plain.splits[split], kind)
            assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert "thing" in pairs.vocabulary and "thing" not in plain.vocabulary
    assert pairs.fingerprint != plain.fingerprint


# --------------------------------------------------------------------------------------------------------------
# images are decoded once


def maps(folder):
    return sorted(path.name for path in folder.glob("*.npy"))


def first_pixels(folder):
    return load_causal3dident(folder, "selections", 0)[0].images_of("train", torch.arange(3)).numpy()


def test_images_are_decoded_once_for_all_settings_with_a_message(causal3dident, monkeypatch, capsys):
    expected = first_pixels(causal3dident)
    (name,) = maps(causal3dident)
    assert f"decoding 200 images once, 0.00 GB, into {causal3dident / name}" in capsys.readouterr().out
    monkeypatch.setattr(image_reading, "decode_image", lambda path: pytest.fail("decoded again"))
    for bias_type in ("selections", "perturbations"):
        pairs, _ = load_causal3dident(causal3dident, bias_type, 3)
        assert np.array_equal(pairs.images_of("train", torch.arange(3)), expected)
    assert capsys.readouterr().out == "" and maps(causal3dident) == [name]


def test_images_decoded_before_a_change_are_removed_when_that_is_possible(causal3dident, monkeypatch):
    """Also by a later job, where the one that decoded them anew was killed, or could not remove a file."""
    expected = first_pixels(causal3dident)
    (name,) = maps(causal3dident)
    older = causal3dident / "images.0123456789abcdef.npy"
    older.write_bytes(b"gigabytes")
    record = causal3dident / f".{older.name}.checked"
    record.touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error", str(path))))
        assert np.array_equal(first_pixels(causal3dident), expected) and older.exists()
    assert np.array_equal(first_pixels(causal3dident), expected) and maps(causal3dident) == [name] and not record.exists()


def test_of_jobs_that_start_together_one_decodes_and_the_others_wait(causal3dident, monkeypatch):
    decode, calls = image_reading._decode_images, []

    def counted(*arguments):
        calls.append(arguments)
        time.sleep(0.3)
        return decode(*arguments)

    monkeypatch.setattr(image_reading, "_decode_images", counted)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        images = list(pool.map(image_reading.open_image_folder, 3 * [causal3dident / "images"]))
    assert len(calls) == 1 and all(np.array_equal(image, images[0]) for image in images)


def test_damaged_exif_beside_a_sound_picture_prints_nothing(tmp_path):
    """Two lines of warnings by Pillow each, in a process that lets them through."""
    exif = Image.Exif()
    exif[0x010E] = "a name"  # big-endian, of 7 bytes with its zero
    file = tmp_path / "0.jpg"
    Image.new("RGB", (8, 8)).save(file, exif=exif)
    content = file.read_bytes()
    assert content.count(b"\x01\x0e\x00\x02\x00\x00\x00\x07") == 1
    file.write_bytes(content.replace(b"\x01\x0e\x00\x02\x00\x00\x00\x07", b"\x01\x0e\x00\x02\x00\x00\x77\x07"))
    plain = "import sys; from PIL import Image, ImageOps; ImageOps.exif_transpose(Image.open(sys.argv[1]))"
    ours = "import sys; from reading.images import decode_image; print(decode_image(sys.argv[1]).shape)"
    told = [
        subprocess.run([sys.executable, "-c", code, file], cwd=ROOT, capture_output=True, text=True) for code in (plain, ours)
    ]
    assert "UserWarning" in told[0].stderr and (told[1].stdout, told[1].stderr) == ("(8, 8, 3)\n", "")


def test_other_pixels_make_other_pairs(causal3dident):
    """A run that is resumed beside images that were rendered anew must notice."""
    before = load_causal3dident(causal3dident, "selections", 0)[0]
    assert load_causal3dident(causal3dident, "selections", 0)[0].fingerprint == before.fingerprint
    buffer = io.BytesIO()
    Image.fromarray(255 - first_pixels(causal3dident)[0]).save(buffer, "png")
    replace(causal3dident / "images/000.png", buffer.getvalue())
    assert load_causal3dident(causal3dident, "selections", 0)[0].fingerprint != before.fingerprint


@pytest.mark.parametrize("change", ["pixels", "name", "time"])
def test_images_that_changed_are_decoded_again_and_the_older_map_removed(causal3dident, change):
    before, path = first_pixels(causal3dident), causal3dident / "images/001.png"
    (name,) = maps(causal3dident)
    buffer = io.BytesIO()
    Image.fromarray(255 - before[1]).save(buffer, "png")
    if change == "name":
        path.unlink()
        replace(path.with_name("0001.png"), buffer.getvalue())
    else:
        replace(path, buffer.getvalue())
    after = first_pixels(causal3dident)
    assert np.array_equal(after[1], 255 - before[1]) and np.array_equal(after[::2], before[::2])
    assert len(maps(causal3dident)) == 1 and maps(causal3dident) != [name]


MAP_DAMAGE = {
    "shorter": lambda content: content[:-1],
    "empty": lambda content: b"",
    "another": lambda content: b"x" * 300,
    "without a checksum": lambda content: content[:-4],
    "zeroed": lambda content: content[:-64] + bytes(64),
    "the header": lambda content: content[:128].replace(b")", b"(") + content[128:],
    "a pixel": lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
}


@pytest.mark.parametrize("damage", MAP_DAMAGE)
def test_a_damaged_map_is_made_again(causal3dident, capsys, damage):
    before = open_image_folder(causal3dident / "images").copy()
    (name,) = maps(causal3dident)
    replace(causal3dident / name, MAP_DAMAGE[damage]((causal3dident / name).read_bytes()))
    capsys.readouterr()
    assert np.array_equal(open_image_folder(causal3dident / "images"), before)
    assert capsys.readouterr().out.count("\n") == 1 and maps(causal3dident) == [name]


def test_a_map_is_read_for_its_checksum_once(causal3dident, monkeypatch):
    first_pixels(causal3dident)
    monkeypatch.setattr(image_reading, "_check_crc", lambda *_: pytest.fail("read again"))
    first_pixels(causal3dident)


def test_a_map_in_a_folder_that_cannot_be_written_is_checked_at_each_start(causal3dident, monkeypatch):
    before = first_pixels(causal3dident)
    (name,) = maps(causal3dident)
    (causal3dident / f".{name}.checked").unlink()

    def refused(path):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(image_reading, "replaced", refused)
    monkeypatch.setattr(image_reading, "write_bytes", lambda path, _: refused(path))
    assert np.array_equal(first_pixels(causal3dident), before)
    replace(causal3dident / name, MAP_DAMAGE["zeroed"]((causal3dident / name).read_bytes()))
    with pytest.raises(InputError, match="cannot be written, and the images are decoded"):
        first_pixels(causal3dident)


@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device"), InputError("damaged")])
def test_a_map_is_there_as_a_whole_or_not_at_all(causal3dident, monkeypatch, error):
    before, real = sorted(causal3dident.iterdir()), image_reading.decode_image

    def decoded(path):
        if path.name == "150.png":
            raise error
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(image_reading, "decode_image", decoded)
        patch.setattr(image_reading, "DECODED_AT_ONCE", 64)
        with pytest.raises(type(error)):
            load_causal3dident(causal3dident, "selections", 0)
    lock = causal3dident / ".images.lock"  # an empty file that stays
    assert sorted(causal3dident.iterdir()) == sorted([*before, lock]) and lock.stat().st_size == 0
    assert first_pixels(causal3dident).shape == (3, 24, 24, 3)


def test_progress_tells_images_a_second_and_the_time_left(causal3dident, monkeypatch, capsys):
    monkeypatch.setattr(image_reading, "DECODED_AT_ONCE", 64)
    monkeypatch.setattr(image_reading, "PROGRESS_SECONDS", 0)
    first_pixels(causal3dident)
    lines = [line for line in capsys.readouterr().out.splitlines() if "images/s" in line]
    assert [line.split()[1] for line in lines] == ["64/200", "128/200", "192/200", "200/200"]
    assert lines[-1].endswith("0 s left")


GREY = np.arange(0, 240, 10, dtype=np.uint16).reshape(4, 6)


def saved(path, pixels, mode=None, **options):
    Image.fromarray(pixels, mode).save(path, **options)
    return path


def test_grey_of_16_bits_is_scaled_and_not_cut_off(tmp_path):
    pixels = decode_image(saved(tmp_path / "0.png", GREY * 257))
    assert pixels.dtype == np.uint8 and np.array_equal(pixels, np.repeat(GREY[..., None], 3, axis=2))


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    for name in ("0.png", "1.jpg"):
        upright = decode_image(saved(tmp_path / name, GREY.astype(np.uint8), exif=exif))
        assert upright.shape == (6, 4, 3) and abs(upright[:, ::-1, 0].T.astype(int) - GREY).max() < 20


def test_palettes_and_opaque_pictures_are_read_as_they_look_and_transparent_ones_refused(tmp_path):
    colour = np.stack([GREY, 2 * GREY % 256, 255 - GREY], axis=2).astype(np.uint8)
    Image.fromarray(colour).quantize(64).save(tmp_path / "0.png")
    assert np.abs(decode_image(tmp_path / "0.png").astype(int) - colour).max() < 10
    opaque = np.dstack([colour, np.full(GREY.shape, 255, np.uint8)])
    assert np.array_equal(decode_image(saved(tmp_path / "1.png", opaque)), colour)
    opaque[2, 3, 3] = 254
    saved(tmp_path / "2.png", opaque)
    Image.fromarray(colour).quantize(64).save(tmp_path / "3.png", transparency=0)
    saved(tmp_path / "4.png", GREY.astype(np.uint8), transparency=50)
    saved(tmp_path / "5.png", GREY * 257, transparency=50 * 257)
    assert decode_image(saved(tmp_path / "6.png", GREY * 257, transparency=50 * 257 + 1)).max() == GREY.max()
    for name in ("2.png", "3.png", "4.png", "5.png"):
        with pytest.raises(InputError, match=f"{name} has transparent pixels"):
            decode_image(tmp_path / name)


def bomb(path):
    """A picture of 20,000 × 20,000 pixels of one colour, in a few kilobytes."""
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(20_000 * 2501), 9)), (b"IEND", b"")]
    parts = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    replace(path, b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def float_tiff(path):
    path.unlink()
    saved(path, GREY.astype(np.float32) / 255, format="TIFF")


def fifo(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("make, words", [(bomb, "decompression bomb"), (float_tiff, "no PNG or JPEG"), (fifo, "no regular file")])
def test_what_is_no_picture_of_the_data_set_is_one_line(causal3dident, capsys, make, words):
    make(causal3dident / "images/007.png")
    with pytest.raises(InputError, match=rf"images/007.png is .*{words}"):
        load_causal3dident(causal3dident, "selections", 1)
    flags = ("--output-folder", causal3dident, "--count", 200, "--settings", "selections_1")
    code, _, err = outcome(capsys, contact_sheet.main, *flags)
    assert code == 2 and err.count("\n") == 1 and words in err


def test_an_image_of_equal_size_and_time_is_noticed(causal3dident):
    before, path = first_pixels(causal3dident), causal3dident / "images/001.png"
    status, content = path.stat(), path.read_bytes()
    for level in range(10):  # other pixels in as many bytes
        buffer = io.BytesIO()
        Image.fromarray(255 - before[1]).save(buffer, "png", compress_level=level)
        if len(buffer.getvalue()) <= len(content):
            break
    changed = buffer.getvalue().ljust(len(content), b"\0")
    replace(path, changed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (len(content), status.st_mtime_ns)
    assert np.array_equal(first_pixels(causal3dident)[1], 255 - before[1])


# --------------------------------------------------------------------------------------------------------------
# bad input


def edited(name, change):
    """Damage that applies change(DataFrame) to a CSV file."""

    def damage(folder):
        table = change(pd.read_csv(folder / name))
        replace(folder / name, table.to_csv(index=False))

    return damage


def with_value(name, column, value, row=5):
    def change(table):
        table[column] = table[column].astype(object)
        table.loc[row, column] = value
        return table

    return edited(name, change)


def cut_image(folder):
    path = folder / "images/120.png"
    replace(path, path.read_bytes()[:700])


def of_another_size(folder):
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20)).save(buffer, "png")
    replace(folder / "images/033.png", buffer.getvalue())


def without_images(folder):
    for path in (folder / "images").iterdir():
        path.unlink()


def swapped_captions(folder):
    """The captions of another setting, repeating themselves often enough."""
    replace(folder / "text/selections_1/text_raw.txt", (folder / "text/selections_0/text_raw.txt").read_bytes())


def swapped_setting(folder):
    """Captions and latents of another setting, in a table that has all columns, as earlier versions wrote it."""
    swapped_captions(folder)
    table, xpos = pd.read_csv(folder / "latents_text_selections_0.csv"), pd.read_csv(folder / IMAGE).object_xpos
    replace(folder / TEXT, table.assign(object_xpos=xpos).to_csv(index=False))


def unlink(name):
    return lambda folder: (folder / name).unlink()


IMAGE, TEXT = "latents_image.csv", "latents_text_selections_1.csv"
CAPTIONS = "text/selections_1/text_raw.txt"


@pytest.mark.parametrize(
    "damage, words",
    [
        (unlink(IMAGE), f"{IMAGE} is missing"),
        (unlink(TEXT), f"{TEXT} is missing"),
        (unlink(CAPTIONS), "generate_text.py --output-folder"),
        (lambda folder: replace(folder / IMAGE, b"\xff\xfe\x00"), f"{IMAGE} is damaged"),
        (edited(IMAGE, lambda table: table.drop(columns="object_color")), f"{IMAGE} has no column object_color;"),
        (edited(TEXT, lambda table: table.drop(columns=["object_xpos", "text_phrasing"])),
         f"{TEXT} has no column object_xpos, text_phrasing;"),
        (edited(TEXT, lambda table: table.assign(splotlight_color_index=0, spotlight_color_index=0)),
         f"{TEXT} has the column spotlight_color_index in two spellings"),
        (lambda folder: (folder / "images.json").write_text('{"latents": "others"}'), "rendered from other latents"),
        (edited(IMAGE, lambda table: table[:0]), "has no rows"),
        (edited(IMAGE, lambda table: table[:9]), "9 rows, expected at least 10"),
        (with_value(IMAGE, "object_color", None), "line 7: object_color is missing, expected a number in [0, 1]"),
        (with_value(IMAGE, "spotlight_pos", 1.01), "line 7: spotlight_pos is 1.01, expected a number in [0, 1]"),
        (with_value(IMAGE, "object_shape", 7), "line 7: object_shape is 7, expected an integer in 0 … 6"),
        (with_value(IMAGE, "object_alpharot", "x"), "line 7: object_alpharot is x, expected a number"),
        (with_value(TEXT, "object_xpos", 0.5), "line 7: object_xpos is 0.5, expected an integer in 0 … 2"),
        (with_value(TEXT, "text_phrasing", -1), "line 7: text_phrasing is -1, expected an integer in 0 … 4"),
        (edited(TEXT, lambda table: table[:-1]), f"{IMAGE} 200, {TEXT} 199, {CAPTIONS} 200, images/ 200"),
        (lambda folder: replace(folder / CAPTIONS, "A hare.\n" * 199), f"{CAPTIONS} 199, images/ 200"),
        (unlink("images/199.png"), f"{CAPTIONS} 200, images/ 199"),
        (unlink("images/000.png"), "none of number 0"),
        (unlink("images/077.png"), "an image number 199 and none of number 77"),
        (lambda folder: (folder / "images/77.jpg").touch(), "two images of one number"),
        (without_images, "holds no images"),
        (lambda folder: (folder / "images").rename(folder / "pictures"), "images is missing"),
        (cut_image, "images/120.png is damaged"),
        (lambda folder: replace(folder / "images/007.png", b"no image"), "images/007.png is damaged"),
        (of_another_size, "images/033.png has 20 × 24 pixels and 000.png 24 × 24"),
        (swapped_captions, "reads as line"),
        (lambda folder: replace(folder / IMAGE, ",".join(map(str, range(10**6)))), "a line of more than 65,536 bytes"),
        (lambda folder: replace(folder / TEXT, "a" * 10**7 + "\n"), "a line of more than 65,536 bytes"),
        (lambda folder: fifo(folder / IMAGE), f"{IMAGE} is no regular file"),
        (swapped_setting, "reads as line"),
        (with_value(TEXT, "object_shape", 3, 190), "the image's in row"),
    ],
)  # fmt: skip
def test_bad_data_is_named_and_leaves_no_map(causal3dident, damage, words):
    if "the image's" in words:  # a shape that is not 3
        assert pd.read_csv(causal3dident / IMAGE).object_shape[190] != 3
    damage(causal3dident)
    with pytest.raises(InputError) as caught:
        load_causal3dident(causal3dident, "selections", 1)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not maps(causal3dident) and not list(causal3dident.glob(".images.*.npy"))


OMITTED = "omitted_text_selections_1.csv"


def omissions_of(name):
    """Damage: the omissions of selections 1 are those of another file."""
    return lambda folder: replace(folder / OMITTED, (folder / name).read_bytes())


@pytest.mark.parametrize(
    "damage, words",
    [
        (edited(OMITTED, lambda table: table[:-1]), f"{OMITTED} has 199 rows and there are 200 captions"),
        (edited(OMITTED, lambda table: table[:0]), f"{OMITTED} is damaged"),
        (edited(OMITTED, lambda table: table.drop(columns="object_xpos")), f"{OMITTED} is damaged"),
        (with_value(OMITTED, "object_xpos", 2), f"{OMITTED}, line 7: object_xpos is 2, expected"),
        (with_value(OMITTED, "object_xpos", None), f"{OMITTED} is damaged"),
        (omissions_of("omitted_text_selections_0.csv"), f"{OMITTED} is damaged: expected rows without gaps and the columns"),
        (omissions_of("omitted_text_selections_3.csv"), f"{OMITTED} is damaged"),
        (lambda folder: fifo(folder / OMITTED), f"{OMITTED} is no regular file"),
        (unlink(OMITTED), "text_raw.txt: line"),
        (edited(OMITTED, lambda table: table[::-1]), "text_raw.txt: line"),
        (swapped_captions, "text_raw.txt: line"),
    ],
)  # fmt: skip
def test_wrong_omissions_are_named_in_one_line(causal3dident, damage, words):
    omit(causal3dident)
    damage(causal3dident)
    with pytest.raises(InputError) as caught:
        load_causal3dident(causal3dident, "selections", 1)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not maps(causal3dident)


def test_a_perturbed_factor_that_is_always_the_image_s_is_of_another_setting(causal3dident):
    for kind in ("latents_text_{}.csv", "text/{}/text_raw.txt"):
        names = [causal3dident / kind.format(f"perturbations_{k}") for k in (5, 4)]
        replace(names[0], names[1].read_bytes())
    with pytest.raises(InputError, match="object_ypos is the image's in every row"):
        load_causal3dident(causal3dident, "perturbations", 5)


def test_a_folder_that_cannot_be_written_says_that_images_are_decoded_once(causal3dident, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied", "hidden")

    monkeypatch.setattr(image_reading, "replaced", refused)
    with pytest.raises(InputError, match="cannot be written, and the images are decoded into a file there, once"):
        load_causal3dident(causal3dident, "selections", 1)


def test_images_json_of_the_latents_is_accepted(causal3dident):
    digest = hashlib.sha256((causal3dident / IMAGE).read_bytes()).hexdigest()
    (causal3dident / "images.json").write_text(json.dumps({"latents": digest}))
    assert len(load_causal3dident(causal3dident, "selections", 1)[0].images) == 200


def test_pairs_know_the_protocols_that_they_were_made_by(causal3dident):
    assert load_causal3dident(causal3dident, "perturbations", 0)[0].made_by == {"captions": "code"}
    digest = hashlib.sha256((causal3dident / IMAGE).read_bytes()).hexdigest()
    (causal3dident / "images.json").write_text(json.dumps({"latents": digest, "protocol": "code"}))
    replace(causal3dident / "latents.json", json.dumps({"protocol": "paper"}))
    both = load_causal3dident(causal3dident, "perturbations", 0)[0]
    assert both.made_by == both.with_training_words().made_by == {"captions": "paper", "images": "code"}
    assert load_causal3dident(causal3dident, "perturbations", 1)[0].made_by == {"images": "code"}  # captions alike in both
    replace(causal3dident / "latents.json", "{")
    with pytest.raises(InputError, match=r"latents\.json is damaged"):
        load_causal3dident(causal3dident, "perturbations", 0)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(InputError, match=r"nowhere is no folder, expected that of Causal3DIdent"):
        load_causal3dident(tmp_path / "nowhere", "selections", 0)


@pytest.mark.parametrize("words", [0, 300])
def test_pairs_with_the_training_words_are_those_of_earlier_versions(causal3dident, monkeypatch, words):
    """With few words and, in wider integers, with more; rows after the training's have words of their own."""
    path = causal3dident / "text/selections_1/text_raw.txt"
    captions = path.read_text().splitlines()
    captions = [f"{line} t{number % max(words // 3, 1)}" for number, line in enumerate(captions)]
    captions[150:] = [f"{line} w{number}" for number, line in enumerate(captions[150:])]
    captions[0] += "".join(f" x{number}" for number in range(words // 3))
    replace(path, "\n".join(captions) + "\n")
    monkeypatch.setattr(datasets, "check_captions", lambda *_, **__: None)
    pairs, _ = load_causal3dident(causal3dident, "selections", 1)
    fewer = pairs.with_training_words()
    real = datasets.load_captions
    monkeypatch.setattr(datasets, "load_captions", lambda *files, heard: real(*files))
    earlier, _ = load_causal3dident(causal3dident, "selections", 1)
    assert earlier.vocabulary == fewer.vocabulary and len(pairs.vocabulary) == len(earlier.vocabulary) + 40
    assert fewer.fingerprint == earlier.fingerprint != pairs.fingerprint
    rows = torch.arange(20)
    assert (fewer.tokens_of("test", rows) == 2).sum() == 20 and not (pairs.tokens_of("test", rows) == 2).any()
    assert torch.equal(fewer.images_of("test", rows), pairs.images_of("test", rows))
