"""Causal3DIdent's latents and captions: distributions, causal links, what is stated wrongly, templates, bad input."""

import colorsys
import functools
import hashlib
import itertools
import json
import operator
import os
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import CSS4_COLORS, TABLEAU_COLORS, XKCD_COLORS, to_rgb
from scipy import stats

from rendering_data.Causal3DIdent import generate_latents, generate_text
from tests.scripts import contents, outcome

N = 20_000
NOISE = 5 / N**0.5  # a correlation of independent factors is larger once in a million times
# of a caption's table, by the factor that they state
COLUMNS = [("object_shape",), ("object_xpos",), ("object_ypos",), ("spotlight_pos",),
           *((f"{name}_name", f"{name}_index") for name in ("object_color", "splotlight_color", "background_color"))]  # fmt: skip
SETTINGS = [f"{bias_type}_{bias_id}" for bias_type in ("selections", "perturbations") for bias_id in range(7)]
PALETTES = {"object_color": TABLEAU_COLORS, "spotlight_color": CSS4_COLORS, "background_color": XKCD_COLORS}
PERTURBED = ["background_color", "spotlight_color", "object_color", "spotlight_pos", "object_ypos", "object_xpos"]


@pytest.fixture(scope="module")
def tables():
    return generate_latents.sample_tables(N, 0, "code")


@pytest.fixture(scope="module")
def image(tables):
    return tables["latents_image.csv"]


@pytest.fixture
def run(capsys):
    """run(main, *flags) → (exit code, stdout, stderr)."""
    return functools.partial(outcome, capsys)


@pytest.fixture
def data(tmp_path, run):
    """A data set of 300 samples with latents and captions."""
    folder = tmp_path / "data"
    assert run(generate_latents.main, "--output-folder", folder, "--n-points", 300, "--seed", 1)[0] == 0
    assert run(generate_text.main, "--output-folder", folder)[0] == 0
    return folder


def plain_nearest(hue, palette):
    """Name of the nearest colour, one distance after another."""
    wanted = colorsys.hsv_to_rgb(hue, 1, 1)
    squared = {name: sum((a - b) ** 2 for a, b in zip(to_rgb(palette[name]), wanted, strict=True)) for name in palette}
    return min(sorted(palette), key=squared.get)


# --------------------------------------------------------------------------------------------------------------
# latents of the images


def test_root_factors_are_uniform(image):
    for name, count in (("object_shape", 7), ("object_xpos", 3), ("object_ypos", 3)):
        assert stats.chisquare(np.bincount(image[name], minlength=count)).pvalue > 1e-4
        assert image[name].nunique() == count
    for name in ("object_alpharot", "object_betarot", "object_gammarot", "spotlight_pos"):
        assert stats.kstest(image[name], "uniform").pvalue > 1e-4
    assert (image.object_zpos == 0).all()


def test_what_is_left_of_an_effect_once_its_causes_are_known_is_uniform_and_independent_of_the_rest(image):
    left = {
        "object_color": 3 * image.object_color - (image.object_xpos + image.object_ypos) / 2,
        "spotlight_color": 2 * image.spotlight_color - image.spotlight_pos,
        "background_color": 3 * image.background_color - image.spotlight_pos - image.spotlight_color,
    }
    for effect, noise in left.items():
        assert stats.kstest(noise, "uniform").pvalue > 1e-4
        descendants = {effect} | ({"background_color"} if effect == "spotlight_color" else set())
        rest = image.drop(columns=[*descendants, "object_zpos"])
        assert rest.corrwith(noise).abs().max() < NOISE


def test_effects_correlate_with_their_causes_and_with_nothing_else(image):
    variance = {"pos": 1 / 12, "U": 1 / 12, "grid": 2 / 3}
    spotlight_color = (variance["pos"] + variance["U"]) / 4
    background = (1.5**2 * variance["pos"] + 0.5**2 * variance["U"] + variance["U"]) / 9
    linked = {
        ("object_color", "object_xpos"): (2 / 3 / 6) / (variance["grid"] * (1 / 3 + 1 / 12) / 9) ** 0.5,
        ("spotlight_color", "spotlight_pos"): (variance["pos"] / 2) / (variance["pos"] * spotlight_color) ** 0.5,
        ("background_color", "spotlight_pos"): (variance["pos"] * 1.5 / 3) / (variance["pos"] * background) ** 0.5,
        ("background_color", "spotlight_color"): ((variance["pos"] * 0.75 + variance["U"] * 0.25) / 3)
        / (spotlight_color * background) ** 0.5,
    }
    linked["object_color", "object_ypos"] = linked["object_color", "object_xpos"]
    correlations = image.drop(columns="object_zpos").corr()
    for pair, expected in linked.items():
        assert correlations.loc[pair] == pytest.approx(expected, abs=0.02)
        correlations.loc[pair] = correlations.loc[pair[::-1]] = 0
    assert (correlations - np.eye(len(correlations))).abs().max(axis=None) < NOISE


def test_the_nearest_colour_is_the_one_that_a_plain_search_finds():
    hues = np.concatenate((np.random.default_rng(0).random(150), [0, 1 / 6, 0.5, 5 / 6, 1]))
    for palette in PALETTES.values():
        found = np.array(sorted(palette))[generate_latents.nearest_colors(hues, palette)]
        assert found.tolist() == [plain_nearest(hue, palette) for hue in hues]


def test_of_two_names_of_one_colour_the_first_is_taken():
    assert sorted(CSS4_COLORS)[generate_latents.nearest_colors(np.array([0.5]), CSS4_COLORS)[0]] == "aqua"


# --------------------------------------------------------------------------------------------------------------
# latents of the captions


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_caption_states_wrongly_what_the_setting_perturbs_and_nothing_else(tables, image, setting):
    text, bias_id = tables[f"latents_text_{setting}.csv"], int(setting[-1])
    stated = COLUMNS if setting.startswith("perturbations") else COLUMNS[: bias_id + 1]
    assert list(text) == [*itertools.chain(*stated), "text_phrasing"]
    perturbed = set(PERTURBED[:bias_id]) if setting.startswith("perturbations") else set()
    assert (text.object_shape == image.object_shape).all()
    for name, count in (("object_xpos", 3), ("object_ypos", 3), ("spotlight_pos", None)):
        if (name,) not in stated:
            continue
        if name not in perturbed:
            assert (text[name] == image[name]).all()
        elif count:
            assert stats.chisquare(np.bincount(text[name] * 3 + image[name], minlength=9)).pvalue > 1e-4
        else:
            assert stats.kstest(text[name], "uniform").pvalue > 1e-4
            assert abs(text[name].corr(image[name])) < NOISE
    text = text.rename(columns=lambda name: name.replace("splotlight", "spotlight"))
    for factor, palette in PALETTES.items():
        if f"{factor}_index" not in text:
            continue
        names = np.array(sorted(palette))
        assert (names[text[f"{factor}_index"]] == text[f"{factor}_name"]).all()
        if factor in perturbed:
            hue = 2 * np.pi * np.array([colorsys.rgb_to_hsv(*to_rgb(palette[name]))[0] for name in names])
            named = hue[text[f"{factor}_index"]]
            for other in ("object_color", "spotlight_color", "background_color", "spotlight_pos"):
                assert abs(np.corrcoef(np.cos(named), image[other])[0, 1]) < NOISE
                assert abs(np.corrcoef(np.sin(named), image[other])[0, 1]) < NOISE
            uniform = generate_latents.nearest_colors((np.arange(N) + 0.5) / N, palette)
            seen, expected = (np.bincount(each, minlength=len(names)) for each in (text[f"{factor}_index"], uniform))
            common = expected > 100
            assert stats.chisquare(seen[common], expected[common] * seen[common].sum() / expected[common].sum()).pvalue > 1e-4
            assert set(np.unique(text[f"{factor}_index"])) <= set(np.unique(uniform))
        elif not (setting == "perturbations_0" and factor == "background_color"):
            rows = slice(0, 100)
            assert text[f"{factor}_name"][rows].tolist() == [plain_nearest(hue, palette) for hue in image[factor][rows]]
    assert stats.chisquare(np.bincount(text.text_phrasing, minlength=5)).pvalue > 1e-4
    assert text.text_phrasing.nunique() == 5


def test_the_protocols_differ_in_the_background_of_perturbations_0_alone():
    code, paper = (generate_latents.sample_tables(200, 5, protocol) for protocol in ("code", "paper"))
    image = code["latents_image.csv"]
    for tables, named_from in ((code, "object_color"), (paper, "background_color")):
        names = tables["latents_text_perturbations_0.csv"].background_color_name
        assert names.tolist() == [plain_nearest(hue, XKCD_COLORS) for hue in image[named_from]]
    background = ["background_color_name", "background_color_index"]
    for name in code:
        drop = background if name == "latents_text_perturbations_0.csv" else []
        pd.testing.assert_frame_equal(code[name].drop(columns=drop), paper[name].drop(columns=drop))


# --------------------------------------------------------------------------------------------------------------
# captions, read by a parser that knows no template


def parsed(caption):
    """What a caption says: dict of shape, x, y, spotlight and the quoted colours in the order object, spotlight, background."""
    said = {}
    said["object_shape"] = re.search(r"\b(teapot|hare|dragon|cow|armadillo|horse|head|thing)\b", caption)[1]
    if place := re.search(r"(?:(top|mid|bottom|some)-)?(left|center|right|part) of the (?:image|picture)", caption):
        said["object_xpos"] = place[2]
        if place[1]:
            said["object_ypos"] = place[1]
    light = re.search(r"\b(northwest|northeast|southwest|southeast|center|place)(?: ?,|\.)", caption)
    if light and re.search("light|illumination", caption):
        said["spotlight_pos"] = light[1]
    factors = ("object_color", "spotlight_color", "background_color")
    return said | dict(zip(factors, re.findall(r'"([^"]+)"', caption), strict=False))


@pytest.mark.parametrize("setting", SETTINGS)
def test_captions_say_what_the_latents_say(data, setting):
    captions = (data / f"text/{setting}/text_raw.txt").read_text().split("\n")
    assert captions.pop() == ""
    table = pd.read_csv(data / f"latents_text_{setting}.csv")
    table = table.rename(columns=lambda name: name.replace("splotlight", "spotlight"))
    order = ["object_shape", "object_xpos", "object_ypos", "spotlight_pos", *PALETTES]
    spoken_of = order[: int(setting[-1]) + 1] if setting.startswith("selections") else order
    assert len(captions) == len(table) == 300
    fifths = ["northwest", "northeast", "center", "southwest", "southeast"]
    for caption, row in zip(captions, table.itertuples(), strict=True):
        words = {
            "object_shape": lambda row: ["teapot", "hare", "dragon", "cow", "armadillo", "horse", "head"][row.object_shape],
            "object_xpos": lambda row: ["left", "center", "right"][row.object_xpos],
            "object_ypos": lambda row: ["top", "mid", "bottom"][row.object_ypos],
            "spotlight_pos": lambda row: fifths[min(int(row.spotlight_pos // 0.2), 4)],
            **{factor: operator.attrgetter(f"{factor}_name") for factor in PALETTES},
        }
        assert parsed(caption) == {factor: words[factor](row) for factor in spoken_of}
    beginnings = (
        "A ",
        "A ",
        "The ",
        "At the " if len(spoken_of) > 1 else "The picture",
        "At the " if len(spoken_of) > 1 else "There",
    )
    assert all(caption.startswith(beginnings[phrasing]) for caption, phrasing in zip(captions, table.text_phrasing, strict=True))


@pytest.mark.parametrize(
    ("n_factors", "phrasing", "caption"),
    [
        (1, 4, "There is an object in the form of a cow."),
        (2, 2, "The right of the image shows a cow."),
        (3, 3, "At the top-right of the picture is a cow."),
        (4, 2, "The top-right of the image shows a cow, highlighted by a light source positioned at the southeast."),
        (5, 0, 'A cow of "tab:red" color is visible, positioned at the top-right of the image, with a spotlight shining '
               "from the southeast."),
        (6, 4, 'At the top-right of the image, there is a "tab:red" object in the form of a cow, with illumination from a '
               '"blue" spotlight at the southeast.'),
        (7, 0, 'A cow of "tab:red" color is visible, positioned at the top-right of the image, under a "blue" spotlight '
               'shining from the southeast, with a "xkcd:teal" background.'),
        (7, 3, 'At the top-right of the picture is a cow in "tab:red" color, bathed in a "blue" spotlight coming from the '
               'southeast, with a "xkcd:teal" background.'),
    ],
)  # fmt: skip
def test_a_caption_is_the_template_word_for_word(n_factors, phrasing, caption):
    latents = {"object_shape": 3, "object_xpos": 2, "object_ypos": 0, "spotlight_pos": 1.0, "text_phrasing": phrasing}
    names = {"object_color_name": "tab:red", "spotlight_color_name": "blue", "background_color_name": "xkcd:teal"}
    assert generate_text.captions({name: np.array([value]) for name, value in (latents | names).items()}, n_factors) == [caption]


@pytest.mark.parametrize("index", [False, True])
def test_either_spelling_wider_tables_and_an_index_are_read(data, run, index):
    before = contents(data / "text")
    for path in data.glob("latents_text_*.csv"):
        wider = pd.read_csv(data / "latents_text_perturbations_0.csv").rename(columns=lambda name: name.replace("splot", "spot"))
        own = pd.read_csv(path).rename(columns=lambda name: name.replace("splot", "spot"))
        own.combine_first(wider).to_csv(path, index=index)
    assert run(generate_text.main, "--output-folder", data)[0] == 0
    assert contents(data / "text") == before
    path = data / "latents_text_selections_6.csv"
    pd.read_csv(path).assign(splotlight_color_name="red").to_csv(path, index=False)
    code, err = run(generate_text.main, "--output-folder", data)[::2]
    assert code == 2 and "has the column spotlight_color_name in two spellings" in err and err.count("\n") == 1


# --------------------------------------------------------------------------------------------------------------
# omissions


@pytest.fixture
def omitting(tmp_path, run):
    """The data set `data`, whose captions omit three of ten factors."""
    folder = tmp_path / "omitting"
    flags = ("--output-folder", folder, "--n-points", 300, "--seed", 1, "--omission-prob", 0.3)
    assert run(generate_latents.main, *flags)[0] == 0 and run(generate_text.main, "--output-folder", folder)[0] == 0
    return folder


def test_each_factor_is_omitted_as_often_as_it_should_be_and_by_itself(tables, image):
    found = generate_latents.sample_tables(N, 0, "code", 0.3)
    assert set(found) - set(tables) == {f"omitted_text_{setting}.csv" for setting in SETTINGS}
    first = []
    for setting in SETTINGS:
        omitted = found[f"omitted_text_{setting}.csv"]
        count = int(setting[-1]) + 1 if setting.startswith("selections") else 7
        assert list(omitted) == ["object_shape", "object_xpos", "object_ypos", "spotlight_pos", *PALETTES][:count]
        for factor in omitted:
            assert omitted[factor].isin([0, 1]).all()
            assert stats.binomtest(int(omitted[factor].sum()), N, 0.3).pvalue > 1e-4
        assert (omitted.corr() - np.eye(count)).abs().max(axis=None) < NOISE
        assert image.drop(columns="object_zpos").corrwith(omitted.object_shape).abs().max() < NOISE
        first.append(omitted.object_shape.rename(setting))
    assert (pd.concat(first, axis=1).corr() - np.eye(14)).abs().max(axis=None) < NOISE


def test_one_seed_gives_the_same_latents_and_more_omissions_at_a_higher_rate():
    none, low, high, every = (generate_latents.sample_tables(300, 0, "code", rate) for rate in (0, 0.2, 0.7, 1))
    for name, table in none.items():
        for other in (low, high, every):
            pd.testing.assert_frame_equal(table, other[name])
    for name in low.keys() - none.keys():
        assert (high[name] >= low[name]).all(axis=None) and (every[name] == 1).all(axis=None)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_caption_misses_the_words_of_what_it_omits_and_has_all_others(data, omitting, setting):
    without, lines = ((path / f"text/{setting}/text_raw.txt").read_text().splitlines() for path in (data, omitting))
    omitted = pd.read_csv(omitting / f"omitted_text_{setting}.csv")
    assert len(without) == len(lines) == len(omitted)
    for plain, line, row in zip(without, lines, omitted.to_dict("records"), strict=True):
        neutral = {"object_shape": "thing", "object_xpos": "part", "object_ypos": "some", "spotlight_pos": "place"}
        expected = {factor: neutral.get(factor, "unspecified") if row[factor] else word for factor, word in parsed(plain).items()}
        assert parsed(line) == expected
        pieces = zip(*(re.findall(r'"[^"]+"|\w+|\S', caption) for caption in (plain, line)), strict=True)
        assert sum(one != other for one, other in pieces) == sum(row.values()), "all else is the same"


def test_words_of_omissions_are_no_words_of_values():
    values = [*itertools.chain(*generate_text.WORDS.values()), *itertools.chain(*PALETTES.values())]
    assert not set(generate_text.OMITTED.values()) & {word for value in values for word in re.findall(r"\w+", value)}


def test_omissions_are_added_and_removed_only_when_told_to(data, run):
    (data / "images").mkdir()
    before, flags = contents(data), ("--output-folder", data, "--n-points", 300, "--seed", 1)
    code, _, err = run(generate_latents.main, *flags, "--omission-prob", 0.3)
    assert code == 2 and f"{data} holds latents without omissions already; " in err and err.count("\n") == 1
    assert contents(data) == before
    code, out, _ = run(generate_latents.main, *flags, "--omission-prob", 0.3, "--overwrite")
    assert code == 0 and out.endswith("\ntext/ there come from the earlier latents: make them anew\n"), "the images do not"
    omitting = contents(data)
    assert {name: omitting[name] for name in before if name != "latents.json"} == {
        name: content for name, content in before.items() if name != "latents.json"
    }
    assert len(omitting) == len(before) + 14
    assert run(generate_latents.main, *flags, "--omission-prob", 0.3)[0] == 0  # the same bytes
    code, _, err = run(generate_latents.main, *flags, "--omission-prob", 0.4)
    assert code == 2 and "omitted_text_selections_0.csv holds other latents already" in err and err.count("\n") == 1
    code, _, err = run(generate_latents.main, *flags)
    assert code == 2 and f"{data} holds latents with omissions already; " in err and err.count("\n") == 1
    assert contents(data) == omitting
    assert run(generate_latents.main, *flags, "--overwrite")[0] == 0
    assert contents(data) == before


def test_latents_and_omissions_are_replaced_all_or_none(omitting, run, monkeypatch):
    before, write = contents(omitting), type(omitting).write_bytes

    def full(path, content):
        if "perturbations_6" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(type(omitting), "write_bytes", full)
    for flags in ((), ("--omission-prob", 0.5)):
        assert run(generate_latents.main, "--output-folder", omitting, "--n-points", 200, "--overwrite", *flags)[0] != 0
        assert contents(omitting) == before


OMITTED = "omitted_text_perturbations_4.csv"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.head(299), f"{OMITTED} has 299 rows and there are 300 captions"),
        (lambda table: table.drop(columns="object_color"), f"{OMITTED} is damaged: expected rows without gaps and the columns"),
        (lambda table: table[table.columns[::-1]], f"{OMITTED} is damaged"),
        (lambda table: table.assign(object_xpos=2), f"{OMITTED}, line 2: object_xpos is 2, expected an integer in 0 … 1"),
        (lambda table: table.assign(object_xpos=0.5), f"{OMITTED}, line 2: object_xpos is 0.5, expected an integer in 0 … 1"),
    ],
)
def test_damaged_omissions_are_named_and_no_caption_is_lost(omitting, run, change, words):
    before, path = contents(omitting / "text"), omitting / OMITTED
    change(pd.read_csv(path)).to_csv(path, index=False)
    code, _, err = run(generate_text.main, "--output-folder", omitting)
    assert code == 2 and words in err and err.count("\n") == 1
    assert contents(omitting / "text") == before


def test_all_templates_to_the_letter():
    """By their digest, which is that of the table in the specification."""
    lines = [template for n_factors in range(1, 8) for template in generate_text.TEMPLATES[n_factors]]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert len(lines) == 35 and digest == "7e5504ce08b11c3e4e0af5d5f7db9972967099773e7453aabaa660461f76bc8a"


# --------------------------------------------------------------------------------------------------------------
# seeds, files, bad input


def test_one_seed_gives_the_same_bytes_and_another_seed_others(data, tmp_path, run):
    flags = ("--n-points", 300, "--output-folder")
    assert run(generate_latents.main, *flags, tmp_path / "again", "--seed", 1)[0] == 0
    assert run(generate_text.main, "--output-folder", tmp_path / "again")[0] == 0
    assert contents(tmp_path / "again") == contents(data)
    assert len(contents(data)) == 30
    assert run(generate_latents.main, *flags, tmp_path / "other", "--seed", 2)[0] == 0
    other = contents(tmp_path / "other")
    assert all(content != contents(data)[name] for name, content in other.items())


def test_the_captions_of_a_seed_stay_what_they_are(tmp_path, run):
    """A change of them would change every data set that a seed stands for."""
    assert run(generate_latents.main, "--output-folder", tmp_path, "--n-points", 3, "--seed", 0)[0] == 0
    assert run(generate_text.main, "--output-folder", tmp_path)[0] == 0
    for setting, expected in FIRST_CAPTIONS.items():
        assert (tmp_path / f"text/{setting}/text_raw.txt").read_text().splitlines() == expected


FIRST_CAPTIONS = {
    "selections_3": [
        "A horse is visible, positioned at the top-left of the image, with a spotlight shining from the northwest.",
        "At the top-right of the picture is a head, standing out under a light coming from the center.",
        "The bottom-right of the image shows a teapot, highlighted by a light source positioned at the southwest.",
    ],
    "perturbations_6": [
        'A "tab:cyan" horse is at the bottom-center of the image, illuminated by a "lawngreen" spotlight from the northeast, '
        'against a "xkcd:turquoise green" background.',
        'At the mid-left of the image, there is a "tab:cyan" object in the form of a head, standing out under a "deeppink" '
        'spotlight from the northeast, against a "xkcd:azure" background.',
        'At the mid-center of the image, there is a "tab:green" object in the form of a teapot, standing out under a "red" '
        'spotlight from the southeast, against a "xkcd:blue/purple" background.',
    ],
}


def test_other_latents_are_replaced_only_when_told_to(data, run):
    before, flags = contents(data), ("--output-folder", data, "--n-points", 200)
    assert run(generate_latents.main, "--output-folder", data, "--n-points", 300, "--seed", 1)[0] == 0  # the same bytes
    code, _, err = run(generate_latents.main, *flags)
    assert code == 2 and "latents_image.csv holds other latents" in err and "--overwrite" in err and err.count("\n") == 1
    assert contents(data) == before
    code, out, _ = run(generate_latents.main, *flags, "--overwrite")
    assert code == 0 and out.endswith("text/ there come from the earlier latents: make them anew\n")
    assert "earlier latents" not in run(generate_latents.main, *flags, "--overwrite")[1]
    assert len(pd.read_csv(data / "latents_image.csv")) == 200


def test_latents_say_what_they_come_from_or_nothing(data, run, monkeypatch):
    origin = {"n_points": 300, "seed": 1, "protocol": "code", "omission_prob": 0.0}
    assert json.loads((data / "latents.json").read_text()) == origin
    flags, real = ("--output-folder", data, "--n-points", 300, "--seed", 1, "--protocol", "paper"), os.replace

    def failing(source, target, *rest):
        if "perturbations_0" in str(target):
            raise OSError(5, "Input/output error")
        return real(source, target, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        assert run(generate_latents.main, *flags, "--overwrite")[0] == 2 and not (data / "latents.json").exists()
    assert run(generate_latents.main, *flags, "--overwrite")[0] == 0
    assert json.loads((data / "latents.json").read_text()) == origin | {"protocol": "paper"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--n-points 0", "0 is too small"),
        ("--n-points many", "invalid integer value"),
        ("--n-points 10 --seed -1", "-1 is too small"),
        ("--n-points 10 --protocol draft", "invalid choice"),
        ("--n-points 10 --omission-prob 1.5", "--omission-prob: 1.5 is out of range"),
        ("", "--n-points"),
    ],
)
def test_wrong_flags_are_one_line(run, tmp_path, flags, words):
    code, _, err = run(generate_latents.main, "--output-folder", tmp_path / "d", *flags.split())
    assert code == 2 and words in err and err.count("\n") == 1
    assert not (tmp_path / "d").exists()


def test_a_file_where_the_folder_should_be_is_one_line(run, tmp_path):
    (tmp_path / "d").write_text("mine")
    for main, flags in ((generate_latents.main, ("--n-points", 10)), (generate_text.main, ())):
        code, _, err = run(main, "--output-folder", tmp_path / "d", *flags)
        assert code == 2 and str(tmp_path / "d") in err and err.count("\n") == 1
    assert (tmp_path / "d").read_text() == "mine"


def with_value(column, value):
    """The change of a table that sets one cell, in line 9 of the file."""

    def change(table):
        values = table[column].astype(object)
        values.iloc[7] = value
        return table.assign(**{column: values})

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.drop(columns="text_phrasing"), "no column text_phrasing"),
        (lambda table: table.head(0), "no rows"),
        (lambda table: table.head(299), "299 rows"),
        (with_value("object_shape", 7), "line 9: object_shape is 7, expected an integer in 0 … 6"),
        (with_value("object_xpos", 1.5), "object_xpos is 1.5"),
        (with_value("text_phrasing", -1), "text_phrasing is -1"),
        (with_value("spotlight_pos", 1.01), "line 9: spotlight_pos is 1.01, expected a number in [0, 1]"),
        (with_value("spotlight_pos", np.nan), "line 9: spotlight_pos is missing"),
        (with_value("spotlight_pos", "north"), "spotlight_pos is north"),
        (with_value("background_color_name", np.nan), "line 9: background_color_name is missing"),
    ],
)
def test_damaged_latents_are_named_and_no_caption_is_lost(data, run, change, words):
    before, path = contents(data / "text"), data / "latents_text_perturbations_4.csv"
    change(pd.read_csv(path)).to_csv(path, index=False)
    code, _, err = run(generate_text.main, "--output-folder", data)
    assert code == 2 and words in err and "perturbations_4" in err and err.count("\n") == 1
    assert contents(data / "text") == before


def test_missing_latents_are_named(data, run, tmp_path):
    (data / "latents_text_selections_2.csv").unlink()
    code, _, err = run(generate_text.main, "--output-folder", data)
    assert code == 2 and "latents_text_selections_2.csv is missing" in err and err.count("\n") == 1
    code, _, err = run(generate_text.main, "--output-folder", tmp_path / "nothing")
    assert code == 2 and "generate_latents.py" in err and err.count("\n") == 1
