"""Captions and stand-in images of MPI3D-Complex: what they say, how often, and that one seed gives the same bytes."""

import itertools
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, chisquare

import datasets
from datasets import BIAS_IDS, BIAS_TYPES, MPI3D_FILE
from rendering_data.MPI3D import render_multimodal_mpi3d as captions
from rendering_data.MPI3D import render_standin_images as standin
from rendering_data.MPI3D import show_pairs
from tests.scripts import contents, exit_code

SIZES = dict(zip(datasets.MPI3D_GRID, (4, 4, 2, 3, 3, 8, 8), strict=True))
COUNT = 18_432
SETTINGS = list(itertools.product(datasets.BIAS_TYPES, datasets.BIAS_IDS))
NAMES = [f"{bias_type}_{bias_id}" for bias_type, bias_id in SETTINGS]

SELECTED = {"selection_0": 1, "selection_1": 2, "selection_2": 3, "selection_3": 4}  # all five elsewhere
PERTURBED = {
    "perturbation_1": {"BACKGROUND"},
    "perturbation_2": {"CAMERA", "BACKGROUND"},
    "perturbation_3": {"OBJ_SIZE", "CAMERA", "BACKGROUND"},
    "perturbation_4": {"OBJ_SHAPE", "OBJ_SIZE", "CAMERA", "BACKGROUND"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    assert exit_code(captions.main, "--output-dir", folder, "--seed", 5, "--grid", *SIZES.values()) == 0
    return folder


@pytest.fixture(scope="module")
def tables(folder):
    """tables[split][name]: DataFrame of a CSV; "image" and the ten settings."""
    return {
        split: {"image": pd.read_csv(folder / split / "image_semantics.csv")}
        | {name: pd.read_csv(folder / split / f"text_semantics_{name}.csv") for name in NAMES}
        for split in ("train", "test")
    }


def test_train_and_test_share_no_image_and_have_them_all(tables):
    train, test = ([tuple(row) for row in tables[split]["image"].itertuples(index=False)] for split in ("train", "test"))
    assert len(train) == round(0.9 * COUNT) and not set(train) & set(test)
    assert sorted(train + test) == list(itertools.product(*map(range, SIZES.values())))


def test_both_halves_of_test_hold_all_values(tables):
    """The first half fits the probes: rows in the order of the grid would leave it without half of the colours."""
    image = tables["test"]["image"]
    for half in (image[: len(image) // 2], image[len(image) // 2 :]):
        for name, size in SIZES.items():
            assert chisquare(np.bincount(half[name], minlength=size)).pvalue > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_values_are_replaced_as_often_as_they_should_be_and_nothing_else(tables, name):
    image, text = (pd.concat([tables[split][table] for split in tables]) for table in ("image", name))
    assert list(text.columns) == list(SIZES)[: SELECTED.get(name, 5)]
    for factor in text.columns:
        if factor not in PERTURBED.get(name, ()):
            assert (image[factor].to_numpy() == text[factor].to_numpy()).all()
            continue
        n = SIZES[factor]
        counts = pd.crosstab(image[factor].to_numpy(), text[factor].to_numpy()).to_numpy()
        expected = (0.9 / n + 0.1 * np.eye(n)) * counts.sum(axis=1, keepdims=True)
        assert chisquare(counts.ravel(), expected.ravel(), ddof=n - 1).pvalue > 1e-4
    perturbed = [factor for factor in text.columns if factor in PERTURBED.get(name, ())]
    changed = [(image[factor].to_numpy() != text[factor].to_numpy()).astype(float) for factor in perturbed]
    for one, other in itertools.combinations(changed, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.03, "factors are replaced independently"


WORDS = {
    "OBJ_COLOR": ["yellow", "green", "olive", "red"],
    "OBJ_SHAPE": ["coffee-cup", "tennis-ball", "croissant", "beer-cup"],
    "OBJ_SIZE": ["small size", "large size"],
    "CAMERA": ["top view", "center view", "bottom view"],
    "BACKGROUND": ["in a purple background", "in a sea-green background", "in a salmon background"],
}


def whole(word):
    """Pattern of a word that is no part of another one: "red" is no part of "colored", "green" none of "sea-green"."""
    return rf"(?<![\w-]){word}(?![\w-])"


@pytest.mark.parametrize("name", NAMES)
def test_every_caption_says_what_its_row_says(folder, tables, name):
    for split in tables:
        lines = (folder / split / f"text_{name}.txt").read_text().splitlines()
        rows = tables[split][name].drop_duplicates()
        assert len(lines) == len(tables[split][name])
        by_row = pd.Series(lines).groupby([tables[split][name][factor] for factor in rows.columns])
        for values, spoken in by_row:
            values = dict(zip(rows.columns, values, strict=True))
            for line in spoken.unique():
                for factor, words in WORDS.items():
                    said = [number for number, word in enumerate(words) if re.search(whole(word), line)]
                    assert said == ([values[factor]] if factor in values else []), line


@pytest.mark.parametrize("name", NAMES)
def test_templates_are_equally_frequent(folder, name):
    lines = pd.Series((folder / "train" / f"text_{name}.txt").read_text().splitlines())
    for words in WORDS.values():
        lines = lines.str.replace("|".join(map(whole, words)), "*", regex=True)
    counts = lines.value_counts()
    assert len(counts) == 3 and chisquare(counts).pvalue > 1e-4


def test_templates_to_the_letter(folder):
    row = {"OBJ_COLOR": 2, "OBJ_SHAPE": 1, "OBJ_SIZE": 0, "CAMERA": 2, "BACKGROUND": 1}
    full = (
        "A small size tennis-ball in olive, viewed from bottom view, in a sea-green background.",
        "From bottom view, you see a olive, small size tennis-ball, in a sea-green background.",
        "A small size tennis-ball, olive, placed in a sea-green background, observed from bottom view.",
    )
    expected = {
        "selection_0": ("An object colored olive.", "It has a olive appearance.", "Something with olive."),
        "selection_1": (
            "A tennis-ball that is olive.",
            "The olive tennis-ball.",
            "An object shaped like a tennis-ball, colored olive.",
        ),
        "selection_2": (
            "A small size tennis-ball in olive.",
            "olive, small size, tennis-ball.",
            "The object is small size, shaped as a tennis-ball, and colored olive.",
        ),
        "selection_3": (
            "A small size tennis-ball in olive, seen from bottom view.",
            "Viewed from bottom view, a olive, small size tennis-ball.",
            "A small size tennis-ball with olive, perspective: bottom view.",
        ),
        "selection_4": full,
        "perturbation_0": full,
        "perturbation_4": full,
    }
    for name, wanted in expected.items():
        table = pd.read_csv(folder / "train" / f"text_semantics_{name}.csv")
        lines = np.array((folder / "train" / f"text_{name}.txt").read_text().splitlines())
        chosen = (table == [row[factor] for factor in table.columns]).all(axis=1)
        assert set(lines[chosen]) == set(wanted)


def test_one_seed_gives_the_same_bytes_and_another_one_others(tmp_path):
    grid = ("--grid", 2, 2, 2, 2, 2, 3, 3)
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert exit_code(captions.main, "--output-dir", tmp_path / folder, "--seed", seed, *grid) == 0
    a, b, c = (contents(tmp_path / folder) for folder in "abc")
    assert a == b and len(a) == 2 * 21 + 10
    assert all(a[name] != c[name] for name in a if not name.startswith("vocab"))
    assert exit_code(captions.main, "--output-dir", tmp_path / "d", "--train-ratio", 0.5, *grid) == 0
    assert len(pd.read_csv(tmp_path / "d/train/image_semantics.csv")) == 144


def test_the_bytes_of_a_seed_stay_what_they_are(tmp_path):
    """A change of them would change every data set that a seed stands for."""
    assert exit_code(captions.main, "--output-dir", tmp_path, "--seed", 0, "--grid", 4, 4, 2, 3, 3, 1, 1) == 0
    assert (tmp_path / "test/image_semantics.csv").read_text().splitlines()[:3] == FIRST_ROWS
    assert (tmp_path / "test/text_perturbation_4.txt").read_text().splitlines()[:5] == FIRST_CAPTIONS


FIRST_ROWS = ["OBJ_COLOR,OBJ_SHAPE,OBJ_SIZE,CAMERA,BACKGROUND,H_AXIS,V_AXIS", "0,3,0,2,2,0,0", "1,0,1,1,2,0,0"]
FIRST_CAPTIONS = [
    "A small size beer-cup in yellow, viewed from center view, in a salmon background.",
    "A small size coffee-cup, green, placed in a sea-green background, observed from bottom view.",
    "From top view, you see a green, large size croissant, in a salmon background.",
    "A small size tennis-ball, green, placed in a purple background, observed from center view.",
    "A large size tennis-ball in red, viewed from top view, in a sea-green background.",
]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--grid 4 4 2 3 3 40 41", "--grid has 41 values of V_AXIS, and there are 40"),
        ("--grid 4 4 2 3 3 40", "expected 7 arguments"),
        ("--grid 0 4 2 3 3 4 4", "--grid"),
        ("--grid 2 1 1 1 1 1 1 --train-ratio 0.99", "leaves a split without images"),
        ("--train-ratio 1.5", "--train-ratio"),
        ("--change-prob -0.1", "--change-prob: -0.1 is out of range, expected a number of at least 0 and at most 1"),
        ("--omission-prob 1.1", "--omission-prob: 1.1 is out of range"),
        ("--seed -1", "--seed"),
    ],
)
def test_wrong_flags_of_the_captions(tmp_path, capsys, flags, words):
    assert exit_code(captions.main, "--output-dir", tmp_path / "x", *flags.split()) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1 and not (tmp_path / "x").exists()


def test_captions_are_replaced_only_when_told_to(tmp_path, capsys):
    grid = ("--grid", 2, 2, 2, 2, 2, 2, 2)
    assert exit_code(captions.main, "--output-dir", tmp_path, *grid) == 0
    before = contents(tmp_path)
    assert exit_code(captions.main, "--output-dir", tmp_path, "--seed", 1, *grid) == 2
    assert "--overwrite" in capsys.readouterr().err and contents(tmp_path) == before
    assert exit_code(captions.main, "--output-dir", tmp_path, "--seed", 1, *grid, "--overwrite") == 0
    assert contents(tmp_path) != before


@pytest.mark.parametrize("rate", [0, 0.3, 1])
def test_values_are_replaced_with_the_probability_that_is_given(tmp_path, rate):
    flags = ("--output-dir", tmp_path, "--seed", 5, "--grid", *SIZES.values(), "--change-prob", rate)
    assert exit_code(captions.main, *flags) == 0
    image = pd.read_csv(tmp_path / "train/image_semantics.csv")
    for name, perturbed in PERTURBED.items():
        text = pd.read_csv(tmp_path / f"train/text_semantics_{name}.csv")
        for factor in text:
            expected = rate * (1 - 1 / SIZES[factor]) if factor in perturbed else 0
            differ = int((image[factor] != text[factor]).sum())
            assert binomtest(differ, len(text), expected).pvalue > 1e-4, (name, factor)


# --------------------------------------------------------------------------------------------------------------
# omissions

SMALL = ("--grid", 4, 4, 2, 3, 3, 1, 1)
NEUTRAL = {
    "OBJ_COLOR": "some-color",
    "OBJ_SHAPE": "thing",
    "OBJ_SIZE": "some size",
    "CAMERA": "some view",
    "BACKGROUND": "in some background",
}


@pytest.fixture(scope="module", params=[0.3, 0.8, 1])
def omitting(tmp_path_factory, request):
    """(rate, folder of the same seed as `folder`)."""
    place = tmp_path_factory.mktemp("omitting")
    flags = ("--output-dir", place, "--seed", 5, "--grid", *SIZES.values(), "--omission-prob", request.param)
    assert exit_code(captions.main, *flags) == 0
    return request.param, place


def omitted_of(place, name):
    return pd.concat([pd.read_csv(place / split / f"omitted_{name}.csv") for split in ("train", "test")])


@pytest.mark.parametrize("name", NAMES)
def test_each_factor_is_omitted_as_often_as_it_should_be_and_by_itself(omitting, tables, name):
    rate, place = omitting
    omitted, told = omitted_of(place, name), pd.concat([tables[split][name] for split in tables])
    assert list(omitted) == list(told) and len(omitted) == len(told)
    for factor in omitted:
        assert omitted[factor].isin([0, 1]).all()
        assert binomtest(int(omitted[factor].sum()), COUNT, rate).pvalue > 1e-4
        counts = np.bincount(told[factor][omitted[factor] == 1], minlength=SIZES[factor])
        all_counts = np.bincount(told[factor], minlength=SIZES[factor])
        assert chisquare(counts, all_counts * counts.sum() / COUNT).pvalue > 1e-4, "whatever the value"
    if rate < 1:
        for one, other in itertools.combinations(omitted, 2):
            assert abs(np.corrcoef(omitted[one], omitted[other])[0, 1]) < 0.03


def test_each_setting_has_omissions_of_its_own(omitting):
    rate, place = omitting
    colours = [omitted_of(place, name).OBJ_COLOR.to_numpy() for name in NAMES]
    for one, other in itertools.combinations(colours, 2):
        assert rate == 1 or abs(np.corrcoef(one, other)[0, 1]) < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_a_caption_misses_the_words_of_what_it_omits_and_has_all_others(folder, omitting, name):
    """One seed gives the same captions but for what they omit: a neutral word stands in its place."""
    _, place = omitting
    omitted = pd.read_csv(place / "test" / f"omitted_{name}.csv")
    without, lines = ((path / "test" / f"text_{name}.txt").read_text().splitlines() for path in (folder, place))
    assert len(lines) == len(omitted) == len(without)
    for row, line, plain in zip(omitted.to_dict("records"), lines, without, strict=True):
        for factor, left_out in row.items():
            if left_out:
                plain, count = re.subn("|".join(map(whole, WORDS[factor])), NEUTRAL[factor], plain)
                assert count == 1
        assert line == plain


def test_omissions_leave_the_values_and_what_a_lower_rate_omits(tmp_path):
    for rate in (0, 0.3, 0.6):
        assert exit_code(captions.main, "--output-dir", tmp_path / str(rate), *SMALL, "--omission-prob", rate) == 0
    none, low, high = (contents(tmp_path / str(rate)) for rate in (0, 0.3, 0.6))
    values = [name for name in none if "semantics" in name]
    assert len(values) == 22 and all(none[name] == low[name] == high[name] for name in values)
    for name in NAMES:
        assert (omitted_of(tmp_path / "0.6", name) >= omitted_of(tmp_path / "0.3", name)).all(axis=None)


def test_words_of_omissions_are_no_words_of_values():
    words = {word for values in WORDS.values() for value in values for word in re.findall(r"[\w-]+", value)}
    shared = {"in", "background", "size", "view"}  # what all values of a factor are called
    neutral = [set(re.findall(r"[\w-]+", phrase)) - shared for phrase in captions.OMITTED.values()]
    assert all(neutral) and not set.union(*neutral) & words


def test_a_rendering_without_omissions_removes_those_of_an_earlier_one(tmp_path):
    assert exit_code(captions.main, "--output-dir", tmp_path / "a", *SMALL, "--omission-prob", 0.5) == 0
    assert len(contents(tmp_path / "a")) == 2 * 31 + 10
    assert exit_code(captions.main, "--output-dir", tmp_path / "a", *SMALL, "--overwrite") == 0
    assert exit_code(captions.main, "--output-dir", tmp_path / "b", *SMALL) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# --------------------------------------------------------------------------------------------------------------
# stand-in images


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(folder, images as an array of the shape of the grid, then 64 × 64 × 3)."""
    folder = tmp_path_factory.mktemp("standin")
    assert exit_code(standin.main, "--output-dir", folder, "--grid", 4, 4, 2, 3, 3, 2, 2) == 0
    with np.load(folder / datasets.MPI3D_FILE, allow_pickle=False) as content:
        assert content["images"].dtype == np.uint8 and content["grid"].tolist() == [4, 4, 2, 3, 3, 2, 2]
        return folder, content["images"].reshape(4, 4, 2, 3, 3, 2, 2, 64, 64, 3)


def test_every_factor_can_be_seen_in_every_image(drawn):
    """Two images that differ in one factor differ in at least 15 pixels by at least 25 of 255."""
    _, images = drawn
    for axis in range(7):
        moved = np.moveaxis(images, axis, 0).astype(np.int16)
        for one, other in itertools.combinations(range(len(moved)), 2):
            changed = np.abs(moved[one] - moved[other]).max(axis=-1) >= 25
            assert changed.sum(axis=(-2, -1)).min() >= 15, list(datasets.MPI3D_GRID)[axis]


def test_the_rim_has_the_background_s_colour_and_the_object_its_own(drawn):
    _, images = drawn
    for factor_axis, colors in ((4, standin.RIM_COLORS), (0, standin.OBJECT_COLORS)):
        for value, color in enumerate(colors):
            chosen = np.moveaxis(images, factor_axis, 0)[value].reshape(-1, 64 * 64, 3).astype(np.float32)
            norm = np.linalg.norm(chosen, axis=2)
            alike = (norm > 70) & (chosen @ (np.float32(color) / np.linalg.norm(color)) > 0.995 * norm)
            assert (alike.sum(axis=1) >= 10).mean() > 0.95


def test_a_large_object_covers_more_than_a_small_one(drawn):
    _, images = drawn
    dark = images.astype(int).max(axis=-1) < 60
    covered = (~dark).sum(axis=(-2, -1)).mean(axis=(0, 1, 3, 4, 5, 6))
    assert covered[1] > covered[0] + 40


def test_a_position_is_the_same_in_a_finer_grid(drawn, tmp_path):
    """The ends of the joints' ranges do not depend on how many positions there are."""
    _, images = drawn
    fine = np.concatenate(list(standin.blocks((1, 2, 1, 2, 1, 3, 3)))).reshape(1, 2, 1, 2, 1, 3, 3, 64, 64, 3)
    assert (fine[0, 1, 0, 1, 0, 2, 2] == images[0, 1, 0, 1, 0, 1, 1]).all()


def test_smaller_images_are_the_same_scenes(drawn, tmp_path):
    _, images = drawn
    assert exit_code(standin.main, "--output-dir", tmp_path, "--grid", 4, 4, 2, 3, 3, 2, 2, "--size", 32) == 0
    small = np.load(tmp_path / datasets.MPI3D_FILE)["images"]
    means = images.reshape(-1, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    assert small.shape == means.shape
    # the clipping of highlights and the gradient of light, a pixel wide, are what differs
    assert np.abs(small - means).mean() < 0.6 and np.quantile(np.abs(small - means), 0.99) <= 2


def test_drawing_again_gives_the_same_bytes_and_replaces_nothing_untold(drawn, tmp_path, capsys):
    folder, _ = drawn
    path = folder / datasets.MPI3D_FILE
    before = path.read_bytes()
    assert exit_code(standin.main, "--output-dir", folder) == 2 and path.read_bytes() == before
    assert "a downloaded file too" in capsys.readouterr().err
    assert exit_code(standin.main, "--output-dir", tmp_path, "--grid", 4, 4, 2, 3, 3, 2, 2) == 0
    assert (tmp_path / datasets.MPI3D_FILE).read_bytes() == before
    assert "not the photographs" in capsys.readouterr().out


def test_captions_take_the_grid_of_the_images_in_the_folder(drawn, tmp_path, capsys):
    folder, _ = drawn
    (tmp_path / datasets.MPI3D_FILE).hardlink_to(folder / datasets.MPI3D_FILE)
    assert exit_code(captions.main, "--output-dir", tmp_path, "--grid", 4, 4, 2, 3, 3, 2, 3) == 2
    assert "have the grid 4 4 2 3 3 2 2" in capsys.readouterr().err and not (tmp_path / "train").exists()
    assert exit_code(captions.main, "--output-dir", tmp_path) == 0
    rows = [len(pd.read_csv(tmp_path / split / "image_semantics.csv")) for split in ("train", "test")]
    assert rows == [1037, 115]


def test_scripts_run_from_anywhere_and_help_says_that_these_are_no_photographs(tmp_path):
    done = subprocess.run([sys.executable, standin.__file__, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "DRAWINGS, NOT PHOTOGRAPHS" in done.stdout


def test_pairs_are_shown_with_their_own_captions(mpi3d, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(show_pairs, "plot_captioned_images", lambda *shown: drawn.update(images=shown[0], captions=shown[1]))
    assert show_pairs.main(["--datapath", str(mpi3d), "--output", str(tmp_path / "pairs.png"), "--count", "3"]) == 0
    rows = pd.read_csv(mpi3d / "test/image_semantics.csv")[:3]
    with np.load(mpi3d / MPI3D_FILE) as content:
        places = np.ravel_multi_index(tuple(rows.to_numpy().T), tuple(content["grid"]))
        assert np.array_equal(drawn["images"], content["images"][places])
    for bias_type, bias_id in itertools.product(BIAS_TYPES, BIAS_IDS):
        lines = (mpi3d / f"test/text_{bias_type}_{bias_id}.txt").read_text().splitlines()[:3]
        assert drawn["captions"].pop(f"{bias_type} {bias_id}") == lines
    assert not drawn["captions"]


def test_colours_shapes_and_cameras_are_in_the_order_of_the_data_set():
    """yellow, green, olive, red; coffee-cup, tennis-ball, croissant, beer-cup; top, center, bottom; purple, sea-green, salmon."""
    yellow, green, olive, red = np.array(standin.OBJECT_COLORS)
    assert min(yellow[:2]) > 1.5 * max(olive) and green.argmax() == 1 and red.argmax() == 0 and olive[2] < min(olive[:2])
    assert [color.index(max(color)) for color in standin.RIM_COLORS] == [2, 1, 0]
    assert [shape.__name__ for shape in standin.SHAPES] == ["coffee_cup", "tennis_ball", "croissant", "beer_cup"]
    tables = [standin.draw_scene(elevation)[0].mean() for elevation in standin.ELEVATIONS]
    assert tables[0] > tables[1] > tables[2], "seen from above, the table is rounder"
