"""The audit against captions whose biases are known: those of all 24 settings that this repository writes."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from scipy.stats import chi2_contingency

import audit_captions
from audit_captions import associations, audit, conclusion, interval, named_values, read_captions, read_factors, words_of
from datasets import BIAS_IDS, BIAS_TYPES, mpi3d_bias, mpi3d_grid
from reading.causal3dident import CAUSAL_SEMANTICS, CAUSAL_SETTINGS, spotlight_fifths
from running.command_line import InputError
from tests.scripts import contents, outcome

ROOT = Path(audit_captions.__file__).parent


def script(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MPI3D = script("rendering_data/MPI3D/render_multimodal_mpi3d.py")
LATENTS = script("rendering_data/Causal3DIdent/generate_latents.py")
TEXT = script("rendering_data/Causal3DIdent/generate_text.py")


def check(report, expected):
    """Verdicts, and rates within 0.02; expected: dict factor → (verdict, rate or None)."""
    report = report.set_index("factor")
    assert dict(report.verdict) == {factor: verdict for factor, (verdict, _) in expected.items()}
    for factor, (verdict, rate) in expected.items():
        if verdict == "left out":
            assert np.isnan(report.contradicts[factor])
        elif rate is not None:
            assert abs(report.contradicts[factor] - rate) < 0.02
            assert report.low[factor] <= report.contradicts[factor] <= report.high[factor]
        if verdict == "told":
            assert report.from_captions[factor] > 0.9


@pytest.fixture(scope="module")
def mpi3d(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mpi3d")
    MPI3D.render(folder, mpi3d_grid((4, 4, 2, 3, 3, 4, 4), "--grid"), 0.5, 0)
    return folder / "train"


@pytest.mark.parametrize(
    ("bias_type", "bias_id", "values"),
    [(*setting, "words") for setting in itertools.product(BIAS_TYPES, BIAS_IDS)] + [("selection", 4, "numbers")],
)
def test_all_settings_of_mpi3d(mpi3d, bias_type, bias_id, values):
    image = pd.read_csv(mpi3d / "image_semantics.csv")
    stated = pd.read_csv(mpi3d / f"text_semantics_{bias_type}_{bias_id}.csv")
    bias, expected = mpi3d_bias(bias_type, bias_id), {}
    for factor in image:
        verdict = "misstated" if factor in bias.perturbed else "told" if factor in stated else "left out"
        expected[factor] = verdict, (stated[factor] != image[factor]).mean() if factor in stated else None
    words = {factor: np.array(MPI3D.WORDS[factor])[image[factor]] for factor in MPI3D.WORDS} if values == "words" else {}
    captions = (mpi3d / f"text_{bias_type}_{bias_id}.txt").read_text().splitlines()
    check(audit(image.astype(float).assign(**words), captions), expected)


@pytest.fixture(scope="module")
def causal():
    return LATENTS.sample_tables(2_000, 0, "code")


def named(values, factor):
    """What captions call the values of a factor of Causal3DIdent's images."""
    if factor in LATENTS.PALETTES:
        palette = LATENTS.PALETTES[factor]
        return np.array(sorted(palette))[LATENTS.nearest_colors(values, palette)]
    if letter := {"object_shape": "S", "object_xpos": "X", "object_ypos": "Y", "spotlight_pos": "P"}.get(factor):
        return np.array(TEXT.WORDS[letter])[spotlight_fifths(values) if letter == "P" else values]
    return values


@pytest.mark.parametrize(
    ("setting", "values"), [(setting, "words") for setting in CAUSAL_SETTINGS] + [("selections_3", "numbers")]
)
def test_all_settings_of_causal3dident(causal, setting, values):
    image = causal["latents_image.csv"].drop(columns="object_zpos")
    text = causal[f"latents_text_{setting}.csv"].rename(columns=lambda name: name.replace("splotlight", "spotlight"))
    bias_type, bias_id = setting.split("_")
    told = CAUSAL_SEMANTICS[: int(bias_id) + 1] if bias_type == "selections" else CAUSAL_SEMANTICS
    # of perturbations 0 the runs name the background from another hue
    drawn_anew = LATENTS.PERTURBED[: max(int(bias_id), 1)] if bias_type == "perturbations" else ()
    words = pd.DataFrame({factor: named(image[factor].to_numpy(), factor) for factor in image})
    expected = dict.fromkeys(image, ("left out", None))
    for factor in told:
        said = text[f"{factor}_name"] if factor in LATENTS.PALETTES else named(text[factor].to_numpy(), factor)
        rate = (said != words[factor]).mean() if values == "words" else None
        expected[factor] = "misstated" if factor in drawn_anew else "told", rate
    captions = TEXT.captions({name: text[name].to_numpy() for name in text}, len(told))
    report = audit(words if values == "words" else image.astype(float), captions)
    check(report, expected)
    if setting == "selections_3":
        blurred = conclusion(report).split("something of ")[1]
        assert "object_color" in blurred and "spotlight_color" in blurred, "what the captions leave out depends on what they tell"
        assert "rot" not in blurred


# of selection 4 the word "green" serves two factors, which the audit tells apart by their names alone
@pytest.mark.parametrize(("name", "values"), [("selection_4", "words"), ("selection_2", "numbers")])
def test_captions_that_omit_factors_speak_of_each_as_often_as_they_tell_it(tmp_path, name, values):
    MPI3D.render(tmp_path, mpi3d_grid((4, 4, 2, 3, 3, 4, 4), "--grid"), 0.5, 0, omission_prob=0.3)
    image = pd.read_csv(tmp_path / "train/image_semantics.csv")
    omitted = pd.read_csv(tmp_path / f"train/omitted_{name}.csv")
    words = {factor: np.array(MPI3D.WORDS[factor])[image[factor]] for factor in MPI3D.WORDS} if values == "words" else {}
    captions = (tmp_path / f"train/text_{name}.txt").read_text().splitlines()
    report = audit(image.astype(float).assign(**words), captions).set_index("factor")
    for factor in image:
        assert report.says[factor] == pytest.approx(1 - omitted[factor].mean() if factor in omitted else 0, abs=1e-3)
        assert report.verdict[factor] == ("told" if factor in omitted else "left out")
        assert factor not in omitted or (abs(report.says[factor] - 0.7) < 0.04 and report.contradicts[factor] == 0)
    assert "Told in part only: OBJ_COLOR (" in conclusion(report.reset_index())


def test_a_measured_number_that_is_stated_wrongly_in_a_third_of_the_captions():
    rng = np.random.default_rng(0)
    size = rng.random(5_000)
    stated = np.where(rng.random(5_000) < 0.3, rng.random(5_000), size)
    words = np.array(["tiny", "small", "medium", "large", "huge"])[(5 * stated).astype(int)]
    report = audit(pd.DataFrame({"size": size, "weight": rng.random(5_000)}), [f"a {word} thing" for word in words])
    truth = ((5 * stated).astype(int) != (5 * size).astype(int)).mean()
    assert list(report.verdict) == ["misstated", "left out"]
    assert abs(report.contradicts[0] - truth) < 0.06, "a word's limits are found to a twentieth of the values"


def test_captions_that_speak_of_a_factor_in_part():
    rng = np.random.default_rng(0)
    colour = np.array(["red", "green"])[rng.integers(0, 2, 1_000)]
    captions = [f"a {word} ball" if number % 5 < 3 else "a ball" for number, word in enumerate(colour)]
    report = audit(pd.DataFrame({"colour": colour}), captions)
    assert report.says[0] == 0.6
    assert "Told in part only: colour (60%)" in conclusion(report)


def test_a_gap_in_the_annotation_is_no_contradiction():
    colour = np.array(["red", "green", None], dtype=object)[np.arange(900) % 3]
    captions = [f"a {word or 'red'} ball" for word in colour]
    report = audit(pd.DataFrame({"colour": colour}), captions)
    assert (report.rows[0], report.verdict[0], report.contradicts[0]) == (600, "told", 0)


def test_values_are_compared_by_their_words_whatever_their_case_and_marks():
    colour = np.array(["Red", "red", "dark-green", "Dark green"])[np.arange(1_000) % 4]
    captions = [f"A {value.upper().replace('-', ' ')} ball." for value in colour]
    report = audit(pd.DataFrame({"colour": colour}), captions)
    assert (report.says[0], report.contradicts[0], report.verdict[0]) == (1, 0, "told")


def test_a_column_without_values_is_no_factor(tmp_path):
    (tmp_path / "factors.csv").write_text("colour,size\nred,\nblue,NA\nred,\n")
    assert list(read_factors(tmp_path / "factors.csv")) == ["colour"]
    with pytest.raises(InputError, match="size has no values"):
        read_factors(tmp_path / "factors.csv", ["size"])


def test_a_factor_that_never_varies_is_left_out_of_numbers_and_told_in_words():
    factors = pd.DataFrame({"colour": ["red"] * 300, "size": [2.0] * 300})
    report = audit(factors, ["a red ball", "one red cup", "red"] * 100)
    assert list(report.verdict) == ["told", "left out"] and (report.from_captions == 0).all()


def test_a_name_that_two_factors_share_belongs_where_its_neighbours_say():
    factors = pd.DataFrame({"object": ["red", "blue", "red"], "light": ["red", "green", "green"]})
    captions = ["a red ball under red light", "a blue ball under green light", "a red ball under green light"]
    stated = named_values([words_of(caption) for caption in captions], factors)
    assert stated == {"object": ["red", "blue", "red"], "light": ["red", "green", "green"]}


def test_the_longest_name_wins():
    factors = pd.DataFrame({"colour": ["blue", "light blue"], "shape": ["cup", "coffee-cup"]})
    stated = named_values([words_of("A light blue coffee-cup."), words_of("a blue cup")], factors)
    assert stated == {"colour": ["light blue", "blue"], "shape": ["coffee-cup", "cup"]}


def test_associations_are_those_of_scipy():
    from scipy.sparse import csr_matrix

    rng = np.random.default_rng(0)
    classes, words = rng.integers(-1, 4, 500), rng.integers(0, 2, (500, 3))
    statistic, information, freedom = associations(csr_matrix(words.astype(np.float32)), classes)
    for word in range(3):
        table = pd.crosstab(words[classes >= 0, word], classes[classes >= 0])
        expected = chi2_contingency(table, correction=False)
        assert (statistic[word], freedom) == (pytest.approx(expected.statistic), expected.dof)
        likelihoods = chi2_contingency(table, correction=False, lambda_="log-likelihood").statistic
        assert information[word] == pytest.approx(likelihoods / 2 / table.to_numpy().sum())


def test_the_interval_is_that_of_scipy():
    from scipy.stats import binomtest

    for count, total in ((0, 50), (3, 50), (50, 50)):
        limits = binomtest(count, total).proportion_ci(method="wilson")
        assert interval(count, total) == pytest.approx([count / total, limits.low, limits.high], abs=1e-4)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_and_captions_as_they_come(tmp_path, encoding, separator):
    rows = [["id", "couleur", "taille"], ["7", "vert foncé", "1.5"], ["8", "", "2"], ["9", "rouge", "NA"]]
    (tmp_path / "factors.csv").write_bytes("\r\n".join(map(separator.join, rows)).encode(encoding))
    (tmp_path / "captions.txt").write_bytes("Un objet\nvert foncé.\n\nUn objet.\n\n\nUn objet\nrouge.\n".encode(encoding))
    factors = read_factors(tmp_path / "factors.csv")
    assert list(factors) == ["couleur", "taille"], "a column that numbers the rows is no factor"
    assert factors.couleur.fillna("gap").tolist() == ["vert foncé", "gap", "rouge"]
    assert factors.taille.fillna(-1).tolist() == [1.5, 2, -1]
    assert read_captions(tmp_path / "captions.txt", 3) == ["Un objet vert foncé.", "Un objet.", "Un objet rouge."]
    assert list(read_factors(tmp_path / "factors.csv", ["id"])) == ["id"], "unless it is asked for"


def test_captions_in_a_table_may_have_several_lines(tmp_path):
    (tmp_path / "captions.csv").write_text('id,caption\n1,"a red\nball, large"\n2,a cup\n')
    assert read_captions(tmp_path / "captions.csv", 2) == ["a red\nball, large", "a cup"]


@pytest.fixture
def files(tmp_path):
    colours = np.array(["red", "green", "blue"])[np.random.default_rng(0).integers(0, 3, 300)]
    (tmp_path / "factors.csv").write_text("colour\n" + "\n".join(colours) + "\n")
    (tmp_path / "captions.txt").write_text("".join(f"a {colour} ball\n" for colour in colours))
    return tmp_path


@pytest.fixture
def call(files, capsys):
    def run(*more):
        flags = ("--factors", files / "factors.csv", "--captions", files / "captions.txt", "--output", files / "audit")
        return outcome(capsys, audit_captions.main, *flags, *more)

    return run


def test_the_script(files, call):
    code, out, err = call()
    assert code == 0, err
    assert "A contrastive model will learn colour: captions tell every factor." in out
    assert {"audit.csv", "audit.png"} <= contents(files).keys()
    assert pd.read_csv(files / "audit.csv").verdict.tolist() == ["told"]


def test_factors_may_have_any_name(files, call):
    """Such as an argument's of pandas, or what Matplotlib would take for mathematics."""
    colours = (files / "factors.csv").read_text().split()[1:]
    (files / "factors.csv").write_text("self,a$b_{$\n" + "".join(f"{colour},{colour}s\n" for colour in colours))
    code, _, err = call()
    assert code == 0, err
    assert pd.read_csv(files / "audit.csv").factor.tolist() == ["self", "a$b_{$"] and (files / "audit.png").exists()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("captions.txt", b"one\n", "1 captions and"),
        ("captions.txt", b"\x00\x01\x02\n", "no text in UTF-8"),
        ("captions.txt", None, "captions.txt is missing"),
        ("factors.csv", None, "factors.csv is missing"),
        ("factors.csv", b"", "has no rows"),
        ("factors.csv", b"colour\n", "has no rows"),
        ("factors.csv", b"a,a\n1,2\n", "two columns 'a'"),
        ("factors.csv", b"a\n1,2\n", "row 2 has more values"),
        ("factors.csv", b"a\ninf\n2\n2\n", "infinite values"),
        ("factors.csv", b"id\n1\n2\n3\n", "no column of factors"),
        ("factors.csv", b"c,d," * 10**5 + b"e\n1\n2\n", "has 200,001 columns, expected 10,000 at most"),
    ],
)
def test_bad_input_is_one_line(files, call, file, content, words):
    (files / file).unlink()
    if content is not None:
        (files / file).write_bytes(content)
    before = contents(files)
    code, _, err = call()
    assert code == 2 and words in err and err.count("\n") == 1
    assert contents(files) == before


def test_an_unknown_column_and_too_few_rows_are_refused(files, call):
    assert "no column 'size'; it has 'colour'" in call("--columns", "size")[2]
    for name, lines in (("factors.csv", 51), ("captions.txt", 50)):
        (files / name).write_text("".join((files / name).read_text().splitlines(keepends=True)[:lines]))
    assert "expected at least 200" in call()[2]


def test_the_seed_draws_the_rows_of_the_probes(files, call):
    lines = (files / "captions.txt").read_text().splitlines(keepends=True)
    (files / "captions.txt").write_text("".join([*lines[:200], *reversed(lines[200:])]))  # a third at random
    scores = []
    for seed in (1, 2, 1):
        assert call("--seed", seed)[0] == 0
        scores.append(pd.read_csv(files / "audit.csv").from_captions[0])
    assert scores[0] == scores[2] != scores[1]


def test_the_picture_shows_the_table(monkeypatch):
    figures = []
    monkeypatch.setattr(audit_captions, "save_figure", lambda figure, _: figures.append(figure))
    report = pd.DataFrame({"factor": ["a", "b", "c"], "verdict": ["told", "misstated", "left out"], "says": [1, 0.8, 0],
                           "contradicts": [0.01, 0.3, np.nan], "low": [0, 0.2, np.nan], "high": [0.02, 0.45, np.nan],
                           "from_captions": [0.9, 0.2, 0.1], "from_told": [0, 0.05, 0.3]})  # fmt: skip
    audit_captions.draw(report, "audit.png")
    left, right = figures[0].axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["a: told", "b: misstated", "c: left out"]
    assert [bar.get_width() for bar in left.patches[:3]] == [1, 0.8, 0]
    assert [bar.get_width() for bar in right.patches[:3]] == [0.9, 0.2, 0.1]
    assert list(right.lines[0].get_xdata()) == [0, 0.05, 0.3]
    colours = [to_rgba(name) for name in ("tab:blue", "tab:orange", "lightgray")]
    assert [bar.get_facecolor() for axes in (left, right) for bar in axes.patches[:3]] == 2 * colours
    (bars,) = left.containers[1].lines[2]
    assert bars.get_segments()[1][:, 0] == pytest.approx([0.2, 0.45])


def test_scores_are_held_out_and_of_the_other_factors():
    """Random words tell the rows that a probe is fitted on, and nothing of others."""
    rng = np.random.default_rng(0)
    colour, shape, maker = (
        np.array(names)[rng.integers(0, 2, 400)] for names in (["red", "green"], ["ball", "cup"], ["me", "you"])
    )
    noise = [" ".join(words) for words in np.array([f"w{k}" for k in range(60)])[rng.integers(0, 60, (400, 10))]]
    factors = pd.DataFrame({"colour": colour, "shape": shape, "maker": maker})
    report = audit_captions.audit(factors, [f"a {a} {b} {c}" for a, b, c in zip(colour, shape, noise, strict=True)])
    assert list(report.verdict) == ["told", "told", "left out"]
    assert report.from_captions[:2].min() > 0.9 and report.from_captions[2] < 0.2
    assert report.from_told.max() < 0.2, "no factor is among those that it is told from"


def test_a_share_is_of_the_annotated_rows():
    colour = np.array(["red", "green", None, None], dtype=object)[np.arange(800) % 4]
    captions = [f"a {word} ball" if word and number % 5 < 3 else "a ball" for number, word in enumerate(colour)]
    assert audit_captions.audit(pd.DataFrame({"colour": colour}), captions).says[0] == pytest.approx(0.6)


def test_slips_whose_rate_may_be_below_the_limit_are_none():
    """6 of 200: from 1.4 to 6.4 %; 20 of 200: from 6.6 %."""
    colour = np.array(["red", "green"])[np.arange(200) % 2]
    for wrong, verdict in ((6, "told"), (20, "misstated")):
        captions = [f"a {word} ball" for word in [*colour[1 : wrong + 1], *colour[wrong:]]]
        report = audit_captions.audit(pd.DataFrame({"colour": colour}), captions)
        assert (report.contradicts[0], report.verdict[0]) == (wrong / 200, verdict)
        assert ("not colour (misstated in 10%)" in audit_captions.conclusion(report)) == (verdict == "misstated")
