"""MPI3D-Complex as tensors, against a plain reading of its files; whoever wrote them, and whatever is wrong with them."""

import contextlib
import fcntl
import io
import json
import os
import resource
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import colors

import datasets
from datasets import MPI3D_FILE, EpochOrder, load_mpi3d, mpi3d_bias
from reading import captions as caption_reading
from reading import images as image_reading
from reading.captions import load_captions, tokenise
from reading.images import Images, checked_once, open_npz_images
from reading.mpi3d import broken_facts, check_scenes
from rendering_data.MPI3D.render_multimodal_mpi3d import caption_table, render
from rendering_data.MPI3D.render_standin_images import blocks
from running import memory
from running.command_line import InputError
from tests.scripts import contents, replace

RECORD = f".{MPI3D_FILE}.checked"


def save_npz(path, compressed=False, **arrays):
    path.unlink(missing_ok=True)
    (np.savez_compressed if compressed else np.savez)(path, **arrays)


def images_and_grid(folder):
    with np.load(folder / MPI3D_FILE, allow_pickle=False) as content:
        return content["images"], content["grid"]


# --------------------------------------------------------------------------------------------------------------
# tokens


@pytest.fixture(scope="module")
def nltk_tokens():
    from nltk.tokenize.destructive import NLTKWordTokenizer

    return NLTKWordTokenizer().tokenize


def test_tokens_of_every_caption_are_nltk_s(nltk_tokens):
    for count in range(1, 6):
        for caption in caption_table(datasets.MPI3D_SEMANTICS[:count], datasets.MPI3D_GRID):
            assert tokenise(caption) == nltk_tokens(caption)
    assert tokenise("An object shaped like a beer-cup, colored red.")[4:] == ["a", "beer-cup", ",", "colored", "red", "."]


QUOTED = (
    'A cow of "{}" color is visible, positioned at the mid-left of the image, under a "{}" spotlight shining from the west.',
    'A "{}" head is at the top-right of the image, illuminated by a "{}" spotlight from the center, against a background.',
    'At the top-left of the image, there is a "{}" object in the form of a hare, against a "{}".',
    '"{}" and {}\'s.',
)


def test_tokens_of_quoted_colour_names_are_nltk_s(nltk_tokens):
    names = [*colors.TABLEAU_COLORS, *colors.CSS4_COLORS, *colors.XKCD_COLORS]
    names += [name.split(":")[-1] for name in names]
    assert any("'" in name for name in names) and any("/" in name for name in names)
    for number, name in enumerate(names):
        caption = QUOTED[number % len(QUOTED)].format(name, names[-number])
        assert tokenise(caption) == nltk_tokens(caption)
    assert tokenise('A "robin\'s egg" cow.') == ["A", "``", "robin", "'s", "egg", "''", "cow", "."]


# --------------------------------------------------------------------------------------------------------------
# against a plain reading


@pytest.mark.parametrize("bias_type, bias_id", [("selection", 0), ("selection", 3), ("perturbation", 4)])
def test_pairs_are_those_of_a_plain_loop(mpi3d, bias_type, bias_id):
    pairs, bias = load_mpi3d(mpi3d, bias_type, bias_id)
    assert bias == mpi3d_bias(bias_type, bias_id)
    images, grid = images_and_grid(mpi3d)
    words = {number: word for word, number in pairs.vocabulary.items()}
    name = f"{bias_type}_{bias_id}"
    longest = 0
    for split in ("train", "test"):
        captions = (mpi3d / split / f"text_{name}.txt").read_text().splitlines()
        factors = pd.read_csv(mpi3d / split / "image_semantics.csv")
        text = pd.read_csv(mpi3d / split / f"text_semantics_{name}.csv")
        assert len(pairs.splits[split]) == len(captions)
        rows = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0))[:40]
        batch, tokens = pairs.images_of(split, rows), pairs.tokens_of(split, rows)
        assert batch.dtype == torch.uint8 and tokens.dtype == torch.int64 and tokens.shape == (40, pairs.length)
        for row, image, caption in zip(rows.tolist(), batch, tokens.tolist(), strict=True):
            place = 0
            for value, size in zip(factors.iloc[row], grid, strict=True):
                place = place * size + value
            assert (image.numpy() == images[place]).all()
            expected = [*tokenise(captions[row]), "{eos}"]
            assert [words[token] for token in caption] == expected + ["{pad}"] * (pairs.length - len(expected))
        longest = max(longest, *(len(tokenise(caption)) for caption in captions))
        for table, found in ((factors, pairs.splits[split].image_factors), (text, pairs.splits[split].text_factors)):
            assert list(found) == list(table) and all((found[key].numpy() == table[key]).all() for key in found)
    assert pairs.length == longest + 1


def test_the_settings_are_the_paper_s():
    assert mpi3d_bias("selection", 0).unbiased == ("OBJ_COLOR",)
    assert mpi3d_bias("selection", 3).selected == ("OBJ_COLOR", "OBJ_SHAPE", "OBJ_SIZE", "CAMERA")
    assert mpi3d_bias("perturbation", 0).perturbed == ()
    assert mpi3d_bias("perturbation", 2).perturbed == ("CAMERA", "BACKGROUND")
    assert mpi3d_bias("perturbation", 4).unbiased == ("OBJ_COLOR",)


def test_each_distinct_caption_is_encoded_once(mpi3d):
    pairs, _ = load_mpi3d(mpi3d, "selection", 0)
    rows, seen = torch.arange(len(pairs.splits["train"])), []

    def encoder(tokens):
        seen.append(len(tokens))
        return tokens.double() ** 2

    found = pairs.encode_captions("train", rows, encoder, 5)
    assert torch.equal(found, pairs.tokens_of("train", rows).double() ** 2)
    assert sum(seen) == 12 and max(seen) == 5
    images = pairs.encode_images("train", rows, lambda batch: batch[:, 0, 0].float(), 100)
    assert torch.equal(images, pairs.images_of("train", rows)[:, 0, 0].float())


@pytest.mark.parametrize("workers", [1, 3])
def test_reading_threads_change_nothing(mpi3d, workers):
    array, _ = open_npz_images(mpi3d / MPI3D_FILE)
    rows = torch.randint(len(array), (50,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(Images(array, workers=workers).take(rows), Images(array).take(rows))
    assert torch.equal(Images(array, workers=workers).take(rows[:2]), Images(array).take(rows[:2]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("reserve", [0, 2**50])
def test_a_gpu_has_the_same_batches_whether_the_images_fit_or_not(mpi3d, monkeypatch, reserve):
    monkeypatch.setattr(image_reading, "GPU_RESERVE", reserve)
    here, there = (load_mpi3d(mpi3d, "selection", 1, device)[0] for device in ("cpu", "cuda"))
    assert (there.images.resident is None) == (reserve > 0)
    rows = torch.arange(60)
    assert torch.equal(there.images_of("train", rows).cpu(), here.images_of("train", rows))
    assert torch.equal(there.tokens_of("train", rows).cpu(), here.tokens_of("train", rows))


# --------------------------------------------------------------------------------------------------------------
# captions that misstate factors more rarely, or leave them out at random


def caption_again(folder, **probabilities):
    """Captions of the same seed, with other probabilities."""
    grid = dict(zip(datasets.MPI3D_GRID, images_and_grid(folder)[1].tolist(), strict=True))
    render(folder, grid, train_ratio=0.75, seed=0, **probabilities)


@pytest.mark.parametrize("bias_type, bias_id", [("selection", 0), ("selection", 4), ("perturbation", 3)])
def test_omissions_change_the_captions_and_no_target_of_a_probe(mpi3d, bias_type, bias_id):
    plain, bias = load_mpi3d(mpi3d, bias_type, bias_id)
    assert bias == mpi3d_bias(bias_type, bias_id) and bias.omitted == 0
    caption_again(mpi3d, omission_prob=0.3)
    pairs, bias = load_mpi3d(mpi3d, bias_type, bias_id)
    table = pd.read_csv(mpi3d / f"train/omitted_{bias_type}_{bias_id}.csv")
    assert bias.omitted == pytest.approx(table.to_numpy().mean()) and 0.2 < bias.omitted < 0.4
    assert bias.unbiased == mpi3d_bias(bias_type, bias_id).unbiased
    for split, own in pairs.splits.items():
        assert torch.equal(own.rows, plain.splits[split].rows)
        for kind in ("image_factors", "text_factors"):
            found, expected = getattr(own, kind), getattr(plain.splits[split], kind)
            assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    words = {number: word for word, number in pairs.vocabulary.items()}
    lines = (mpi3d / f"train/text_{bias_type}_{bias_id}.txt").read_text().splitlines()
    for line, tokens in zip(lines, pairs.tokens_of("train", torch.arange(len(lines))).tolist(), strict=True):
        assert [words[token] for token in tokens][: len(tokenise(line))] == tokenise(line)
    assert "some-color" in pairs.vocabulary and "some-color" not in plain.vocabulary
    assert pairs.fingerprint != plain.fingerprint


def test_captions_that_misstate_rarely_are_loaded_and_those_that_never_do_are_told_from_them(mpi3d):
    caption_again(mpi3d, change_prob=0.2)
    pairs, _ = load_mpi3d(mpi3d, "perturbation", 2)
    train = pairs.splits["train"]
    assert 0.05 < (train.image_factors["BACKGROUND"] != train.text_factors["BACKGROUND"]).double().mean() < 0.25
    caption_again(mpi3d, change_prob=0)
    with pytest.raises(InputError, match="CAMERA is the image's in every row, and this setting perturbs it, at a rate above 0: "):
        load_mpi3d(mpi3d, "perturbation", 2)


def test_captions_that_leave_everything_out(mpi3d):
    caption_again(mpi3d, omission_prob=1)
    pairs, bias = load_mpi3d(mpi3d, "selection", 4)
    assert bias.omitted == 1 and len(pairs.splits["train"].captions.tokens) == 3


# --------------------------------------------------------------------------------------------------------------
# the order of the data


def order(size=23, seed=0):
    return EpochOrder(size, torch.Generator().manual_seed(seed))


def test_an_epoch_is_a_permutation_without_its_last_incomplete_batch():
    batches = order()
    epochs = [torch.cat([batches.next(5) for _ in range(4)]) for _ in range(3)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 20 and set(epoch.tolist()) <= set(range(23))
    assert not torch.equal(epochs[0], epochs[1]) and {*epochs[0].tolist()} != {*epochs[1].tolist()}
    assert torch.equal(epochs[0], torch.cat([part for b in [order()] for part in (b.next(5) for _ in range(4))]))
    assert not torch.equal(epochs[0][:5], order(seed=1).next(5))
    counts = torch.bincount(torch.cat([batches.next(5) for _ in range(4 * 500)]), minlength=23)
    assert counts.min() > 380 and counts.max() <= 500, "every pair comes in about 20 of 23 epochs"


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 9])
def test_the_order_goes_on_from_its_state(taken):
    batches = order()
    for _ in range(taken):
        batches.next(5)
    state = batches.get_state()
    expected = [batches.next(5).tolist() for _ in range(9)]
    other = order(seed=99)
    other.next(7)
    other.set_state(state)
    assert [other.next(5).tolist() for _ in range(9)] == expected
    assert state.dtype == torch.uint8, "as the states of generators, which a checkpoint holds"


def test_batches_may_grow_and_not_exceed_the_data():
    batches = order()
    assert [len(batches.next(size)) for size in (5, 9, 23)] == [5, 9, 23]
    with pytest.raises(ValueError, match="a batch of 24 pairs, and there are 23"):
        batches.next(24)


def test_an_epoch_of_whole_batches_has_every_pair_once():
    batches = EpochOrder(20, torch.Generator().manual_seed(0))
    for _ in range(3):
        assert sorted(torch.cat([batches.next(5) for _ in range(4)]).tolist()) == list(range(20))


# --------------------------------------------------------------------------------------------------------------
# images on disk


def test_a_stored_member_is_mapped_in_place(mpi3d):
    before = sorted(path.name for path in mpi3d.iterdir())
    array, grid = open_npz_images(mpi3d / MPI3D_FILE)
    expected, expected_grid = images_and_grid(mpi3d)
    assert isinstance(array, np.memmap) and array.filename == mpi3d / MPI3D_FILE
    assert (array == expected).all() and grid == tuple(expected_grid)
    assert sorted(path.name for path in mpi3d.iterdir()) == before


def test_a_compressed_file_is_unpacked_once_with_a_message(mpi3d, capsys):
    images, grid = images_and_grid(mpi3d)
    save_npz(mpi3d / MPI3D_FILE, compressed=True, images=images, grid=grid)
    array, _ = open_npz_images(mpi3d / MPI3D_FILE)
    (unpacked,) = mpi3d.glob("*.npy")
    assert (array == images).all() and array.filename == unpacked
    assert f"into {unpacked}" in capsys.readouterr().out
    stamp = unpacked.stat().st_mtime_ns
    assert (open_npz_images(mpi3d / MPI3D_FILE)[0] == images).all()
    assert capsys.readouterr().out == "" and unpacked.stat().st_mtime_ns == stamp
    assert {path.name for path in mpi3d.iterdir() if path.name.startswith(".")} == {RECORD, f".{unpacked.name}.checked"}
    # other images of the same name are not taken for these
    save_npz(mpi3d / MPI3D_FILE, compressed=True, images=255 - images, grid=grid)
    assert (open_npz_images(mpi3d / MPI3D_FILE)[0] == 255 - images).all()
    # and do not lie there for ever
    (later,) = mpi3d.glob("*.npy")
    assert later != unpacked and not (mpi3d / f".{unpacked.name}.checked").exists()


def test_of_jobs_that_start_together_one_unpacks_and_the_others_wait(mpi3d, monkeypatch):
    images, grid = images_and_grid(mpi3d)
    save_npz(mpi3d / MPI3D_FILE, compressed=True, images=images, grid=grid)
    copy, calls = shutil.copyfileobj, []

    def counted(*arguments):
        calls.append(arguments)
        time.sleep(0.3)
        copy(*arguments)

    monkeypatch.setattr(image_reading.shutil, "copyfileobj", counted)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: open_npz_images(mpi3d / MPI3D_FILE)[0], range(3)))
    assert len(calls) == 1 and all((array == images).all() for array in found)


@pytest.mark.parametrize("member", ["images", "grid"])
def test_a_header_with_one_bit_changed_is_one_line(tmp_path, member):
    """NumPy parses a header as Python, which fails in many ways."""
    save_npz(tmp_path / "whole.npz", images=np.zeros((2, 4, 4, 3), np.uint8), grid=np.array([1, 2]))
    with zipfile.ZipFile(tmp_path / "whole.npz") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    whole = content[f"{member}.npy"]
    for bit in range(8 * 128):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
            for name, data in {**content, f"{member}.npy": bytes(changed)}.items():
                archive.writestr(name, data)
        with contextlib.suppress(InputError):
            open_npz_images(tmp_path / "other.npz")


def test_a_checksum_is_computed_once_until_the_file_changes(mpi3d, monkeypatch):
    calls, check = [], datasets.check_stored_images
    monkeypatch.setattr(datasets, "check_stored_images", lambda path: calls.append(path) or check(path))
    datasets.mpi3d_images(mpi3d)
    calls.clear()
    datasets.mpi3d_images(mpi3d)
    assert not calls
    flipped(mpi3d)
    for number in (1, 2):
        with pytest.raises(InputError, match="CRC"):
            datasets.mpi3d_images(mpi3d)
        assert len(calls) == number, "what is damaged has not passed"
    flipped(mpi3d)
    datasets.mpi3d_images(mpi3d)
    datasets.mpi3d_images(mpi3d)
    assert len(calls) == 3
    (mpi3d / RECORD).unlink()
    (mpi3d / RECORD).mkdir()  # where no record can be written, as on a disk that is read alone
    datasets.mpi3d_images(mpi3d)
    datasets.mpi3d_images(mpi3d)
    assert len(calls) == 5


def test_a_changed_file_of_equal_size_and_time_is_checked_again_and_an_older_record_counts_for_none(mpi3d):
    path, checks = mpi3d / MPI3D_FILE, []
    replace(path, path.read_bytes())  # the fixture's is linked
    checked_once(path, lambda: checks.append(1))
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(5000)
        file.write(bytes(100))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    checked_once(path, lambda: checks.append(2))
    checked_once(path, lambda: checks.append(3))
    replace(mpi3d / RECORD, f"{status.st_size} {status.st_mtime_ns} {status.st_ino}\n")
    checked_once(path, lambda: checks.append(4))
    assert checks == [1, 2, 4]


def test_images_that_are_mapped_take_no_memory_from_the_training(monkeypatch, tmp_path):
    """Their pages are the system's to take back: a data set may be larger than what a script may take."""
    file, before = tmp_path / "images.npy", resource.getrlimit(resource.RLIMIT_DATA)
    with open(file, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (2**18, 64, 64, 3)})
        stream.truncate(stream.tell() + 2**18 * 64 * 64 * 3)  # 3 GiB that take no place
    monkeypatch.setattr(memory, "_group_limits", lambda: [2**29])
    try:
        memory.limit_memory()
        images = image_reading._map_npy(file)
        assert images[-1].sum() == 0
        with pytest.raises(RuntimeError, match="allocate memory"):
            torch.empty(2**31)  # more than the suite may have freed and kept
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_an_unpacked_file_is_checked_whenever_it_has_changed_and_not_else(mpi3d, monkeypatch):
    images, grid = images_and_grid(mpi3d)
    save_npz(mpi3d / MPI3D_FILE, compressed=True, images=images, grid=grid)
    datasets.mpi3d_images(mpi3d)
    (unpacked,) = mpi3d.glob("*.npy")
    with monkeypatch.context() as patch:
        patch.setattr(image_reading, "_check_crc", lambda *_: pytest.fail("read again"))
        datasets.mpi3d_images(mpi3d)
    content = bytearray(unpacked.read_bytes())
    content[5000:6000] = bytes(byte ^ 255 for byte in content[5000:6000])
    unpacked.write_bytes(content)
    for _ in range(2):
        with pytest.raises(InputError, match=f"{unpacked.name} is damaged: its checksum is another; remove it"):
            datasets.mpi3d_images(mpi3d)
    unpacked.unlink()
    assert (datasets.mpi3d_images(mpi3d)[0] == images).all()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("number", [0, 200, -1])
def test_an_image_of_one_colour_is_found_wherever_it_is(mpi3d, monkeypatch, capsys, compressed, number):
    images, grid = images_and_grid(mpi3d)
    images[number], images[5] = (7, 8, 9), (7, 8, 9)
    images[5, -1, -1, 2] = 10  # another colour
    save_npz(mpi3d / MPI3D_FILE, compressed, images=images, grid=grid)
    words = f"an image has one colour alone, number {range(384)[number]} of 384, and 0 others"
    with pytest.raises(InputError, match=words):
        datasets.mpi3d_images(mpi3d)
    monkeypatch.setenv("MPI3D_UNCHECKED", "1")
    assert (datasets.mpi3d_images(mpi3d)[0] == images).all() and words in capsys.readouterr().out


SIZES = (4, 4, 2, 3, 3, 3, 3)


@pytest.fixture(scope="module")
def scenes():
    """Stand-in images of a whole grid, (*SIZES, 32, 32, 3)."""
    return np.concatenate(list(blocks(SIZES, 32))).reshape(*SIZES, 32, 32, 3)


def broken(scenes):
    return list(
        broken_facts(np.ascontiguousarray(scenes).reshape(-1, 32, 32, 3), dict(zip(datasets.MPI3D_GRID, SIZES, strict=True)))
    )


DISORDER = {
    "colour and shape": (lambda s: s.swapaxes(0, 1), "OBJ_SHAPE changes the colour"),
    "size and camera": (lambda s: s.swapaxes(2, 3), "OBJ_SIZE changes more than CAMERA"),
    "camera and background": (lambda s: s.swapaxes(3, 4), "BACKGROUND changes more than CAMERA"),
    "column-major": (lambda s: s.transpose(6, 5, 4, 3, 2, 1, 0, 7, 8, 9), "CAMERA"),
    "values reversed": (lambda s: s[::-1], "green or red"),
    "channels reversed": (lambda s: s[..., ::-1], "green or red"),
    "rows and columns": (lambda s: s.swapaxes(7, 8), "the table does not lie below"),
    "channels first": (lambda s: s.transpose(*range(7), 9, 7, 8), "green or red"),
    "upside down": (lambda s: s[..., ::-1, :, :], "the table does not lie below"),
    "a quarter of the brightness": (lambda s: s // 4, "the pixels have a standard deviation of 7.9"),
    "inverted": (lambda s: 255 - s, "the pixels have a mean of 2"),
    "black": (lambda s: 0 * s, "the pixels have a mean of 0.0, expected 1 … 60"),
    "one for all": (lambda s: np.broadcast_to(s[0, 0, 0, 0, 0, 0, 0], s.shape), "green or red"),
    "pixels": (lambda s: np.random.default_rng(0).permutation(s.reshape(-1, 1024, 3), axis=1), "neighbouring pixels"),
    "images": (lambda s: np.random.default_rng(0).permutation(s.reshape(-1, 1024, 3)), "more than CAMERA"),
}


@pytest.mark.parametrize("disorder", DISORDER)
def test_images_in_another_order_are_told_from_the_data_set_s(scenes, disorder):
    change, fact = DISORDER[disorder]
    assert broken(scenes) == []
    assert fact in " ".join(broken(change(scenes)))


def test_what_looks_reordered_is_taken_where_a_user_says_so(scenes, monkeypatch, capsys):
    grid, images = dict(zip(datasets.MPI3D_GRID, SIZES, strict=True)), scenes[..., ::-1].reshape(-1, 32, 32, 3)
    with pytest.raises(InputError, match=r"file.npz .*green or red .*MPI3D_UNCHECKED=1"):
        check_scenes("file.npz", images, grid)
    monkeypatch.setenv("MPI3D_UNCHECKED", "1")
    check_scenes("file.npz", images, grid)
    assert "file.npz" in capsys.readouterr().out


def test_a_fine_axis_moves_in_small_steps():
    sizes = (1, 1, 1, 2, 1, 10, 10)
    images, grid = np.concatenate(list(blocks(sizes, 32))), dict(zip(datasets.MPI3D_GRID, sizes, strict=True))
    assert list(broken_facts(images, grid)) == []
    mixed = np.random.default_rng(0).permutation(images.reshape(2, 100, 32, 32, 3), axis=1).reshape(images.shape)
    assert any("a step along" in fact for fact in broken_facts(mixed, grid))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1, 1), (2, 3, 2, 2, 2, 2, 2), (4, 1, 2, 1, 2, 12, 3), (1, 1, 1, 1, 1, 10, 10)])
def test_stand_ins_of_any_grid_are_accepted(sizes):
    images = np.concatenate(list(blocks(sizes, 32)))
    assert list(broken_facts(images, dict(zip(datasets.MPI3D_GRID, sizes, strict=True)))) == []


def test_what_a_killed_unpacking_left_is_removed_by_the_next_and_what_is_being_written_is_not(mpi3d):
    images, grid = images_and_grid(mpi3d)
    save_npz(mpi3d / MPI3D_FILE, compressed=True, images=images, grid=grid)
    checksum = zipfile.ZipFile(mpi3d / MPI3D_FILE).getinfo("images.npy").CRC
    stem = f"{Path(MPI3D_FILE).stem}.{checksum:08x}.npy"
    killed, other = mpi3d / f".{stem}.0abc_def.npy", mpi3d / f".{stem}.12345678.npy"
    killed.write_bytes(b"half")
    with open(other, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        open_npz_images(mpi3d / MPI3D_FILE)
        assert not killed.exists() and other.exists() and (mpi3d / stem).exists()


def test_a_member_whose_path_leaves_the_folder_is_left_alone(mpi3d):
    with zipfile.ZipFile(mpi3d / MPI3D_FILE) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    replace(mpi3d / MPI3D_FILE, b"")
    before = lasting(mpi3d.parent)
    with zipfile.ZipFile(mpi3d / MPI3D_FILE, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {"../../evil.npy": members["images.npy"], "/tmp/evil.npy": b"", **members}.items():
            archive.writestr(name, content)
    load_mpi3d(mpi3d, "selection", 1)
    new = lasting(mpi3d.parent).keys() - before.keys()
    assert all(name.startswith("mpi3d/") for name in new) and not any("evil" in name for name in new)


def test_a_file_that_becomes_shorter_in_use_is_one_line(mpi3d):
    replace(mpi3d / MPI3D_FILE, (mpi3d / MPI3D_FILE).read_bytes())
    images = Images(open_npz_images(mpi3d / MPI3D_FILE)[0])
    os.truncate(mpi3d / MPI3D_FILE, 10_000)
    with pytest.raises(InputError, match="npz has become shorter while it is in use"):
        images.take(torch.arange(3))
    (mpi3d / MPI3D_FILE).unlink()
    images._check_length()  # what is removed stays readable to those who have it open


def test_an_archive_larger_than_the_disk_is_not_unpacked(mpi3d, monkeypatch):
    images, grid = images_and_grid(mpi3d)
    save_npz(mpi3d / MPI3D_FILE, compressed=True, images=images, grid=grid)
    monkeypatch.setattr(image_reading.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(InputError, match=r"unpacked into 0.00 GB once, and .* 0.00 GB free; copy the folder to a larger disk"):
        open_npz_images(mpi3d / MPI3D_FILE)


def test_a_compressed_file_on_a_full_disk_leaves_nothing(mpi3d, monkeypatch):
    images, grid = images_and_grid(mpi3d)
    save_npz(mpi3d / MPI3D_FILE, compressed=True, images=images, grid=grid)
    before = sorted(path.name for path in mpi3d.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_reading.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space"):
        open_npz_images(mpi3d / MPI3D_FILE)
    assert sorted(path.name for path in mpi3d.iterdir()) == before


def test_a_compressed_file_in_a_folder_that_cannot_be_written_says_what_to_do(mpi3d, monkeypatch):
    images, grid = images_and_grid(mpi3d)
    save_npz(mpi3d / MPI3D_FILE, compressed=True, images=images, grid=grid)

    def refused(*_):
        raise OSError(30, "Read-only file system", "hidden")

    monkeypatch.setattr(image_reading, "replaced", refused)
    with pytest.raises(InputError, match="mpi3d cannot be written, and the images are compressed"):
        open_npz_images(mpi3d / MPI3D_FILE)


def test_a_file_without_a_grid_is_the_real_one_if_it_has_its_number_of_images(mpi3d, monkeypatch):
    images, grid = images_and_grid(mpi3d)
    save_npz(mpi3d / MPI3D_FILE, images=images)
    with pytest.raises(InputError, match=f"{len(images)} images, expected 460800 of the grid 4 × 4 × 2 × 3 × 3 × 40 × 40"):
        load_mpi3d(mpi3d, "selection", 0)
    monkeypatch.setattr(datasets, "MPI3D_GRID", dict(zip(datasets.MPI3D_GRID, grid.tolist(), strict=True)))
    assert len(load_mpi3d(mpi3d, "selection", 0)[0].images) == len(images)


# --------------------------------------------------------------------------------------------------------------
# captions: the cache, and files of others


def every_token(pairs):
    return {split: pairs.tokens_of(split, torch.arange(len(pairs.splits[split]))) for split in pairs.splits}


def test_tokens_are_taken_from_the_cache_until_the_captions_change(mpi3d, monkeypatch):
    first, _ = load_mpi3d(mpi3d, "selection", 1)
    cache = mpi3d / "tokens_selection_1.npz"
    with monkeypatch.context() as patch:
        patch.setattr(caption_reading, "tokenise", lambda caption: pytest.fail("tokenised again"))
        again, _ = load_mpi3d(mpi3d, "selection", 1)
    assert again.vocabulary == first.vocabulary and again.fingerprint == first.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(every_token(first).values(), every_token(again).values(), strict=True))
    replace(mpi3d / "vocab_selection_1.json", json.dumps(dict.fromkeys(("{pad}", "{eos}", "{unk}"))).replace("null", "0"))
    with pytest.raises(InputError, match=r"vocab_selection_1.json is damaged"):
        load_mpi3d(mpi3d, "selection", 1)
    os.remove(mpi3d / "vocab_selection_1.json")
    replace(cache, b"damaged")
    assert load_mpi3d(mpi3d, "selection", 1)[0].fingerprint == first.fingerprint
    replace(mpi3d / "test/text_selection_1.txt", (mpi3d / "test/text_selection_1.txt").read_text().replace("olive", "olives"))
    changed, _ = load_mpi3d(mpi3d, "selection", 1)
    assert changed.fingerprint != first.fingerprint and (every_token(changed)["test"] == 2).any()


def test_whatever_is_wrong_with_a_cache_it_is_made_again(mpi3d):
    first, cache = load_mpi3d(mpi3d, "selection", 1)[0].fingerprint, mpi3d / "tokens_selection_1.npz"
    with np.load(cache) as content:
        sound = dict(content)
    deep = np.array("[" * 100_000 + "]" * 100_000)
    for wrong in (
        {"index_train": sound["index_train"] + 10**6},
        {"index_train": sound["index_train"].astype(float)},
        {"index_test": sound["index_test"][:0]},
        {"tokens_train": sound["tokens_train"][0]},
        {"tokens_test": sound["tokens_test"] + 200},
        {"vocabulary": np.array("{}")},
        {"vocabulary": deep},
        {"tokens_train": np.array([{}], dtype=object)},
    ):
        save_npz(cache, **sound | wrong)
        assert load_mpi3d(mpi3d, "selection", 1)[0].fingerprint == first
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    for content in (b"", buffer.getvalue(), cache.read_bytes()[:-50]):
        replace(cache, content)
        assert load_mpi3d(mpi3d, "selection", 1)[0].fingerprint == first
    as_fifo(cache)
    assert load_mpi3d(mpi3d, "selection", 1)[0].fingerprint == first


def test_a_folder_that_cannot_be_written_is_read(mpi3d, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(caption_reading, "write_bytes", refused)
    load_mpi3d(mpi3d, "selection", 1)
    assert not (mpi3d / "tokens_selection_1.npz").exists()


def test_the_vocabulary_is_that_of_the_training_captions_by_appearance(mpi3d):
    both_ways = json.loads((mpi3d / "vocab_selection_2.json").read_text())
    rendered, words = both_ways["w2i"], both_ways["i2w"]
    os.remove(mpi3d / "vocab_selection_2.json")
    pairs, _ = load_mpi3d(mpi3d, "selection", 2)
    lines = (mpi3d / "train/text_selection_2.txt").read_text().splitlines()
    expected = dict.fromkeys(["{pad}", "{eos}", "{unk}", *(word for line in lines for word in tokenise(line))])
    assert list(pairs.vocabulary.items()) == list(rendered.items()) == [(word, i) for i, word in enumerate(expected)]
    assert both_ways.keys() == {"w2i", "i2w"} and words == {str(i): word for i, word in enumerate(expected)}


def test_a_vocabulary_that_lacks_words_of_the_training_captions_is_told(mpi3d, capsys):
    """What an interrupted --overwrite leaves: captions of now and the vocabulary of before; and captions that were edited."""
    file = mpi3d / "train/text_selection_2.txt"
    load_mpi3d(mpi3d, "selection", 2)
    assert "lacks words" not in capsys.readouterr().out
    replace(file, file.read_text().replace("red", "scarlet"))
    share = np.mean(["scarlet" in line for line in file.read_text().splitlines()])
    assert 0.1 < share < 0.5
    for _ in range(2):  # the second time from the cache
        load_mpi3d(mpi3d, "selection", 2)
        assert f"vocab_selection_2.json lacks words of {share:.1%} of the training captions" in capsys.readouterr().out
    os.remove(mpi3d / "vocab_selection_2.json")
    assert "scarlet" in load_mpi3d(mpi3d, "selection", 2)[0].vocabulary and "lacks words" not in capsys.readouterr().out


def test_splits_may_be_parts_of_one_file(tmp_path):
    """The vocabulary is that of the training part alone, or of the parts that are named."""
    (tmp_path / "all.txt").write_text("a red cow.\na red cow.\na blue hen.\na red hen.\n")
    parts = {"train": (tmp_path / "all.txt", slice(0, 2)), "test": (tmp_path / "all.txt", slice(2, 4))}
    for _ in range(2):  # the second time from the cache
        captions, vocabulary = load_captions(parts, tmp_path / "none.json", tmp_path / "cache.npz")
        assert list(vocabulary) == ["{pad}", "{eos}", "{unk}", "a", "red", "cow", "."]
        assert captions["train"].tokens.tolist() == [[3, 4, 5, 6, 1]] and captions["train"].index.tolist() == [0, 0]
        assert captions["test"].take(torch.tensor([1, 0])).tolist() == [[3, 4, 2, 6, 1], [3, 2, 2, 6, 1]]
    for _ in range(2):
        captions, vocabulary = load_captions(parts, tmp_path / "none.json", tmp_path / "cache.npz", heard=parts)
        assert list(vocabulary) == ["{pad}", "{eos}", "{unk}", "a", "red", "cow", ".", "blue", "hen"]
        assert captions["test"].take(torch.tensor([1, 0])).tolist() == [[3, 4, 8, 6, 1], [3, 7, 8, 6, 1]]
    other = {**parts, "test": (tmp_path / "all.txt", slice(3, 4))}
    captions, _ = load_captions(other, tmp_path / "none.json", tmp_path / "cache.npz")
    assert len(captions["test"].index) == 1


@pytest.mark.parametrize("wrapped", [False, True])
def test_other_vocabularies(mpi3d, wrapped):
    plain, _ = load_mpi3d(mpi3d, "selection", 0)
    words = [*reversed([word for word in plain.vocabulary if word != "olive"]), "zebra"]
    numbered = [(word, number) for number, word in enumerate(words)]
    vocabulary = dict(reversed(numbered) if wrapped else numbered)
    replace(mpi3d / "vocab_selection_0.json", json.dumps({"w2i": vocabulary, "i2w": {}} if wrapped else vocabulary))
    pairs, _ = load_mpi3d(mpi3d, "selection", 0)
    assert pairs.vocabulary == vocabulary
    again, _ = load_mpi3d(mpi3d, "selection", 0)  # from the cache
    assert again.fingerprint == pairs.fingerprint != plain.fingerprint
    renumbered = torch.tensor([vocabulary.get(word, vocabulary["{unk}"]) for word in plain.vocabulary])
    for split, tokens in every_token(plain).items():
        assert torch.equal(every_token(pairs)[split], renumbered[tokens])


def test_more_than_256_words_are_told_apart(mpi3d):
    lines = (mpi3d / "train/text_selection_0.txt").read_text().splitlines()
    replace(mpi3d / "train/text_selection_0.txt", "".join(f"{line} word{i}\n" for i, line in enumerate(lines)))
    os.remove(mpi3d / "vocab_selection_0.json")
    pairs, _ = load_mpi3d(mpi3d, "selection", 0)
    assert len(pairs.vocabulary) > 256 and pairs.tokens_of("train", torch.tensor([280])).max() == pairs.vocabulary["word280"]


def as_crlf(text):
    return text.replace("\n", "\r\n")


@pytest.mark.parametrize(
    "change", [as_crlf, str.rstrip, lambda text: as_crlf(text).rstrip(), lambda text: "\ufeff" + text],
    ids=["CRLF", "no final newline", "both", "byte order mark"],
)  # fmt: skip
def test_captions_and_tables_of_other_editors(mpi3d, change):
    plain, _ = load_mpi3d(mpi3d, "perturbation", 2)
    for split in ("train", "test"):
        for name in ("text_perturbation_2.txt", "text_semantics_perturbation_2.csv", "image_semantics.csv"):
            replace(mpi3d / split / name, change((mpi3d / split / name).read_text()))
    pairs, _ = load_mpi3d(mpi3d, "perturbation", 2)
    assert pairs.fingerprint == plain.fingerprint


def test_the_images_of_alike_captions_make_other_pairs(mpi3d):
    before, _ = load_mpi3d(mpi3d, "selection", 4)
    table = pd.read_csv(mpi3d / "train/image_semantics.csv")
    alike = table.duplicated(list(table)[:5], keep=False)
    first = table.index[alike][0]
    second = table.index[(table.iloc[:, :5] == table.iloc[first, :5]).all(axis=1)][1]
    table.iloc[[first, second]] = table.iloc[[second, first]].to_numpy()
    replace(mpi3d / "train/image_semantics.csv", table.to_csv(index=False))
    captions = (mpi3d / "train/text_selection_4.txt").read_text().splitlines()
    after, _ = load_mpi3d(mpi3d, "selection", 4)
    assert after.fingerprint != before.fingerprint, captions[first]


def test_captions_in_another_order_make_other_pairs(mpi3d):
    before, _ = load_mpi3d(mpi3d, "selection", 0)
    lines = (mpi3d / "train/text_selection_0.txt").read_text().splitlines()
    values = pd.read_csv(mpi3d / "train/text_semantics_selection_0.csv").apply(tuple, axis=1)
    later = [i for i, line in enumerate(lines) if line in lines[:i]]  # whose captions have appeared before
    first, second = next((i, j) for i in later for j in later if values[i] == values[j] and lines[i] != lines[j]
                         and {lines[i], lines[j]} <= {*lines[: min(i, j)]})  # fmt: skip
    lines[first], lines[second] = lines[second], lines[first]
    replace(mpi3d / "train/text_selection_0.txt", "\n".join(lines) + "\n")
    after, _ = load_mpi3d(mpi3d, "selection", 0)
    assert torch.equal(after.splits["train"].captions.tokens, before.splits["train"].captions.tokens)
    assert after.fingerprint != before.fingerprint


def test_another_word_in_the_same_place_makes_other_pairs(mpi3d):
    before, _ = load_mpi3d(mpi3d, "selection", 0)
    (mpi3d / "vocab_selection_0.json").unlink()
    for split in ("train", "test"):
        file = mpi3d / split / "text_selection_0.txt"
        replace(file, file.read_text().replace("olive", "khaki"))
    after, _ = load_mpi3d(mpi3d, "selection", 0)
    assert torch.equal(after.splits["train"].captions.tokens, before.splits["train"].captions.tokens)
    assert after.fingerprint != before.fingerprint


# --------------------------------------------------------------------------------------------------------------
# what is wrong with the files, in one line


def lines_of(path):
    return path.read_text().splitlines(keepends=True)


def without_line(path):
    replace(path, "".join(lines_of(path)[:-1]))


def with_images(folder, **arrays):
    images, grid = images_and_grid(folder)
    save_npz(folder / MPI3D_FILE, **{"images": images, "grid": grid, **arrays})


def truncated(folder, compressed=False):
    if compressed:
        images, grid = images_and_grid(folder)
        save_npz(folder / MPI3D_FILE, compressed=True, images=images, grid=grid)
    replace(folder / MPI3D_FILE, (folder / MPI3D_FILE).read_bytes()[:-100_000])


def damaged_inside(folder):
    images, grid = images_and_grid(folder)
    save_npz(folder / MPI3D_FILE, compressed=True, images=images, grid=grid)
    content = bytearray((folder / MPI3D_FILE).read_bytes())
    content[5000:6000] = bytes(1000)
    replace(folder / MPI3D_FILE, bytes(content))


def shorter_member(folder):
    """A header that promises more images than there are."""
    images, _ = images_and_grid(folder)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, images)
    (folder / MPI3D_FILE).unlink()
    with zipfile.ZipFile(folder / MPI3D_FILE, "w") as archive:
        archive.writestr("images.npy", buffer.getvalue()[:-64])


def with_shape(folder, shape, size):
    """An archive whose header and directory promise an array of this shape, and `size` bytes, and which is short."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    start = np.lib.format.magic(1, 0) + len(header).to_bytes(2, "little") + header
    replace(folder / MPI3D_FILE, b"")
    with zipfile.ZipFile(folder / MPI3D_FILE, "w") as archive:
        archive.writestr("images.npy", start + bytes(min(size, 10_000)))
        archive.getinfo("images.npy").file_size = archive.getinfo("images.npy").compress_size = len(start) + size


def flipped(folder):
    """Another bit amid the pixels of an archive that is not compressed."""
    content = bytearray((folder / MPI3D_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    replace(folder / MPI3D_FILE, bytes(content))


def as_fifo(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def pickled(folder):
    with_images(folder, images=np.array([{"run": "me"}], dtype=object))


def swapped(folder, name, other):
    """The captions of another setting, as if somebody had mixed up two files."""
    for split in ("train", "test"):
        replace(folder / split / f"text_{name}.txt", (folder / split / f"text_{other}.txt").read_bytes())


def swapped_with_table(folder, name, other):
    swapped(folder, name, other)
    for split in ("train", "test"):
        replace(folder / split / f"text_semantics_{name}.csv", (folder / split / f"text_semantics_{other}.csv").read_bytes())


def shuffled(folder):
    path = folder / "train/text_selection_1.txt"
    replace(path, "".join(lines_of(path)[::-1]))


def edited(file, old, new):
    def edit(folder):
        text = (folder / file).read_text()
        assert old in text
        replace(folder / file, text.replace(old, new, 1))

    return edit


def shared(folder):
    """Every file of the test split holds the first rows of the training."""
    for path in (folder / "test").iterdir():
        rows = len(lines_of(path))
        replace(path, "".join(lines_of(folder / "train" / path.name)[:rows]))


def recompressed(folder, compression, damage):
    """The archive by another method, then `damage` of its bytes, a bytearray, in place."""
    with zipfile.ZipFile(folder / MPI3D_FILE) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    content = bytearray(buffer.getvalue())
    damage(content)
    replace(folder / MPI3D_FILE, bytes(content))


def zeroed(content):
    content[5000:6000] = bytes(1000)


def encrypted(content):
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(header) + flags] |= 1


def beheaded(content):
    del content[:1000]


def extra_column(folder):
    table = pd.read_csv(folder / "test/image_semantics.csv")
    replace(folder / "test/image_semantics.csv", table.assign(EXTRA=0).to_csv(index=False))


WRONG = {
    "no folder": (lambda f: f.rename(f.with_name("moved")), "mpi3d is no folder"),
    "no npz": (lambda f: (f / MPI3D_FILE).unlink(), "get it from https://.*render_standin_images.py"),
    "truncated": (truncated, "npz is truncated or damaged"),
    "truncated, compressed": (lambda f: truncated(f, True), "npz is truncated or damaged"),
    "damaged inside": (damaged_inside, "npz is truncated or damaged"),
    "damaged bzip2": (lambda f: recompressed(f, zipfile.ZIP_BZIP2, zeroed), "npz is truncated or damaged"),
    "damaged lzma": (lambda f: recompressed(f, zipfile.ZIP_LZMA, zeroed), "npz is truncated or damaged"),
    "encrypted": (lambda f: recompressed(f, zipfile.ZIP_STORED, encrypted), "npz is truncated or damaged"),
    "beheaded": (lambda f: recompressed(f, zipfile.ZIP_STORED, beheaded), "npz is truncated or damaged"),
    "empty npz": (lambda f: replace(f / MPI3D_FILE, b""), "npz is truncated or damaged"),
    "short member": (shorter_member, "npz is damaged: `images` of shape"),
    "no images": (lambda f: save_npz(f / MPI3D_FILE, pictures=np.zeros(3)), "holds pictures.npy, expected"),
    "dtype": (lambda f: with_images(f, images=np.zeros((384, 64, 64, 3), np.float32)), "is float32, expected uint8"),
    "shape": (lambda f: with_images(f, images=np.zeros((384, 64, 64), np.uint8)), r"has shape \(384, 64, 64\)"),
    "count": (lambda f: with_images(f, images=np.zeros((383, 8, 8, 3), np.uint8)), "holds 383 images, expected 384"),
    "grid": (lambda f: with_images(f, grid=np.array([4, 4, 2, 2, 3, 2])), "holds 384 images, expected"),
    "grid of floats": (lambda f: with_images(f, grid=np.ones(7)), "`grid` must be the sizes"),
    "grid of a gigabyte": (lambda f: with_images(f, grid=np.ones(2**13, np.int64)), "`grid` must be the sizes"),
    "a shape of truths": (lambda f: with_shape(f, "(True, 8, 8, 3)", 192), r"has shape \(True, 8, 8, 3\)"),
    "a huge shape": (lambda f: with_shape(f, f"({2**62}, 64, 64, 3)", 9), "npz is damaged: `images` of shape"),
    "a shape that lies": (lambda f: with_shape(f, f"({10**9}, 64, 64, 3)", 12288 * 10**9), "npz is truncated or damaged"),
    "one colour": (lambda f: with_images(f, images=np.zeros((384, 64, 64, 3), np.uint8)), "an image has one colour alone"),
    "a flipped byte": (flipped, "npz is truncated or damaged .*CRC"),
    "a FIFO": (lambda f: as_fifo(f / MPI3D_FILE), "npz is no regular file"),
    "captions of a FIFO": (lambda f: as_fifo(f / "test/text_selection_1.txt"), "text_selection_1.txt is no regular file"),
    "vocabulary of a FIFO": (lambda f: as_fifo(f / "vocab_selection_1.json"), "vocab_selection_1.json is no regular file"),
    "a long line": (lambda f: replace(f / "train/text_selection_1.txt", "word " * 2_000_000), "a line of more than 65,536 bytes"),
    "pickled": (pickled, "is a pickled array, which is not opened"),
    "no captions": (lambda f: (f / "test/text_selection_1.txt").unlink(), "render_multimodal_mpi3d.py"),
    "no table": (lambda f: (f / "test/text_semantics_selection_1.csv").unlink(), "selection_1.csv is missing"),
    "no image table": (lambda f: (f / "train/image_semantics.csv").unlink(), "image_semantics.csv is missing"),
    "a caption less": (lambda f: without_line(f / "train/text_selection_1.txt"), "disagree in their number"),
    "a row less": (lambda f: without_line(f / "test/image_semantics.csv"), "disagree in their number"),
    "a text row less": (lambda f: without_line(f / "test/text_semantics_selection_1.csv"), "disagree in their"),
    "other grid": (
        lambda f: with_images(f, images=images_and_grid(f)[0].repeat(2, axis=0), grid=np.array([4, 4, 2, 2, 3, 2, 2])),
        "train and test have 384 rows and there are 768 images",
    ),
    "fewer said": (lambda f: swapped(f, "selection_1", "selection_0"), "line .* reads as line .* OBJ_SHAPE differ"),
    "more said": (lambda f: swapped(f, "selection_0", "selection_1"), "the captions tell OBJ_SHAPE", "selection_0"),
    "much more said": (lambda f: swapped(f, "selection_0", "selection_4"), "the captions tell OBJ_SHAPE", "selection_0"),
    "all said": (lambda f: swapped(f, "selection_2", "perturbation_0"), "the captions tell CAMERA", "selection_2"),
    "other perturbation": (lambda f: swapped(f, "perturbation_4", "perturbation_2"), "reads as line", "perturbation_4"),
    "other perturbation and table": (
        lambda f: swapped_with_table(f, "perturbation_2", "perturbation_4"),
        "OBJ_SHAPE differs from the image's in row", "perturbation_2",
    ),
    "fewer perturbed": (
        lambda f: swapped_with_table(f, "perturbation_4", "perturbation_2"),
        "OBJ_SHAPE is the image's in every row", "perturbation_4",
    ),
    "other order": (shuffled, "reads as line"),
    "empty caption": (edited("train/text_selection_1.txt", "\n", "\n\n"), "the caption in line 2 is empty"),
    "blank caption": (edited("train/text_selection_1.txt", "\n", "\n  \n"), "the caption in line 2 is empty"),
    "no text": (lambda f: replace(f / "train/text_selection_1.txt", b"\xff\xfe\x00"), "not a text file in UTF-8"),
    "nothing": (lambda f: replace(f / "train/text_selection_1.txt", ""), "holds no caption"),
    "missing column": (edited("train/image_semantics.csv", "V_AXIS", "AXIS"), "image_semantics.csv is damaged: .*V_AXIS"),
    "extra column": (extra_column, "image_semantics.csv is damaged"),
    "values without a column": (
        lambda f: replace(f / "train/image_semantics.csv", (f / "train/image_semantics.csv").read_text().replace("\n", ",0\n")
                          .replace("V_AXIS,0", "V_AXIS")), "train/image_semantics.csv is damaged",
    ),
    "splits that share images": (shared, "train and test have image .* 2 times"),
    "deep vocabulary": (lambda f: replace(f / "vocab_selection_1.json", "[" * 200_000), "vocab_selection_1.json is damaged"),
    "larger grid": (
        lambda f: with_images(f, grid=np.array([8, 2, 2, 2, 3, 2, 1])), "`grid` has 8 values of OBJ_COLOR, and there are 4"
    ),
    "columns of another setting": (lambda f: swapped_with_table(f, "selection_1", "selection_2"), "is damaged"),
    "off the grid": (edited("train/image_semantics.csv", "\n", "\n4,0,0,0,0,0,0\n"), "OBJ_COLOR is 4, expected .* 3"),
    "negative": (edited("train/text_semantics_selection_1.csv", "\n", "\n0,-1\n"), "OBJ_SHAPE is -1, expected"),
    "no integer": (edited("train/text_semantics_selection_1.csv", "\n", "\n0,0.5\n"), "OBJ_SHAPE is 0.5, expected"),
    "a word": (edited("train/text_semantics_selection_1.csv", "\n", "\n0,red\n"), "OBJ_SHAPE is red, expected"),
    "a gap": (edited("train/text_semantics_selection_1.csv", "\n", "\n0,\n"), "without gaps"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_named_and_nothing_is_written(mpi3d, case):
    damage, message, name = (*WRONG[case], "selection_1")[:3]
    damage(mpi3d)
    before = lasting(mpi3d)
    bias_type, bias_id = name.split("_")
    with pytest.raises(InputError, match=message):
        load_mpi3d(mpi3d, bias_type, int(bias_id))
    assert lasting(mpi3d) == before


def lasting(folder):
    """Files and their bytes, but for what is kept for the next start."""
    return {name: content for name, content in contents(folder).items() if not name.startswith("tokens_") and name != RECORD}


def upside_down(path):
    header, *rows = lines_of(path)
    replace(path, "".join([header, *reversed(rows)]))


def without_omissions(folder):
    for split in ("train", "test"):
        (folder / split / "omitted_selection_1.csv").unlink()


def earlier_captions(folder):
    """Captions from before there were omissions."""
    omissions = {path: path.read_bytes() for path in folder.glob("*/omitted_*.csv")}
    caption_again(folder)
    for path, content in omissions.items():
        path.write_bytes(content)


def of_another(name, setting="selection_1"):
    """Damage: the omissions of a setting are those of another file."""

    def damage(folder):
        for split in ("train", "test"):
            replace(folder / split / f"omitted_{setting}.csv", (folder / split / name).read_bytes())

    return damage


WRONG_OMISSIONS = {
    "a row less": (lambda f: without_line(f / "train/omitted_selection_1.csv"),
                   "train/omitted_selection_1.csv has 287 rows and there are 288 captions; make both again"),
    "no rows": (lambda f: replace(f / "test/omitted_selection_1.csv", "OBJ_COLOR,OBJ_SHAPE\n"),
                "test/omitted_selection_1.csv is damaged"),
    "another value": (edited("train/omitted_selection_1.csv", "\n", "\n2,0\n"),
                      "omitted_selection_1.csv, line 2: OBJ_COLOR is 2, expected an integer in 0 … 1"),
    "a word": (edited("train/omitted_selection_1.csv", "\n", "\n0,yes\n"), "line 2: OBJ_SHAPE is yes"),
    "a gap": (edited("train/omitted_selection_1.csv", "\n", "\n0,\n"), "omitted_selection_1.csv is damaged"),
    "fewer columns": (of_another("omitted_selection_0.csv"), "omitted_selection_1.csv is damaged: expected .* OBJ_SHAPE"),
    "more columns": (of_another("omitted_selection_4.csv"), "omitted_selection_1.csv is damaged"),
    "values": (of_another("text_semantics_selection_1.csv"), "omitted_selection_1.csv, line .* expected an integer in 0 … 1"),
    "a FIFO": (lambda f: as_fifo(f / "train/omitted_selection_1.csv"), "omitted_selection_1.csv is no regular file"),
    "lost": (without_omissions, "text_selection_1.txt: line .* reads as line .* differ"),
    "upside down": (lambda f: upside_down(f / "train/omitted_selection_1.csv"), "reads as line .* differ"),
    "earlier captions": (earlier_captions, "text_selection_1.txt: line .* reads as line .* differ"),
    "of another setting": (of_another("omitted_perturbation_0.csv", "perturbation_1"),
                           "text_perturbation_1.txt: line .* reads as line .* differ", "perturbation_1"),
    "fewer said": (lambda f: swapped(f, "selection_1", "selection_0"), "line .* reads as line .* differ"),
    "more said": (lambda f: swapped(f, "selection_0", "selection_1"), "differ|the captions tell OBJ_SHAPE", "selection_0"),
    "other perturbation": (lambda f: swapped(f, "perturbation_4", "perturbation_2"), "reads as line", "perturbation_4"),
    "other order": (shuffled, "reads as line"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_OMISSIONS)
def test_wrong_omissions_are_named_in_one_line(mpi3d, case):
    damage, message, name = (*WRONG_OMISSIONS[case], "selection_1")[:3]
    caption_again(mpi3d, omission_prob=0.3)
    damage(mpi3d)
    bias_type, bias_id = name.split("_")
    with pytest.raises(InputError, match=message) as caught:
        load_mpi3d(mpi3d, bias_type, int(bias_id))
    assert "\n" not in str(caught.value)


def test_pixels_of_two_levels_are_told(scenes):
    facts = broken(np.where(scenes > 60, np.uint8(255), np.uint8(0)))
    assert any("the pixels have a standard deviation of" in fact for fact in facts), facts
