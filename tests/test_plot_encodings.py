"""The picture of the encodings shows what scikit-learn finds in them, and bad files are one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import matthews_corrcoef, r2_score
from sklearn.preprocessing import StandardScaler

import plot_encodings
from plot_encodings import first_discriminant, flat_map, held_out, read_encodings
from running.experiment import write_encodings
from running.files import write_json
from running.geometry import geometry
from running.lock import occupied
from running.staging import digests
from tests.scripts import contents, outcome
from tests.test_malicious_files import TRACE, pickled_array, pickled_npz

COUNT = 400  # samples, half of them held out, in no order


def random_arrays(names=("hz_x", "hz_t"), size=3):
    """Encodings of three numbers and of the class of the first, which the texts' encodings hold less well."""
    rng = np.random.default_rng(0)
    s = rng.normal(size=(COUNT, 3))
    h_x = s @ rng.normal(size=(3, size)) + 0.1 * rng.normal(size=(COUNT, size)) + 1
    h_t = h_x + 0.5 * rng.normal(size=(COUNT, size)) - 0.4
    arrays = dict(zip(names, (h_x.astype(np.float32), h_t.astype(np.float32)), strict=True))
    arrays |= {f"s_{i}": s[:, i : i + 1].astype(np.float32) for i in range(2)} | {"noise": rng.normal(size=COUNT)}
    arrays["kind"] = np.digitize(s[:, 0], (-1, 0, 0.5)) * 3
    return arrays | {"is_test": rng.permutation(COUNT) < COUNT // 2, "seed": 7}


def image_arrays():
    """The same of images and texts, with factors of their own: number and kind of both, size of the images alone, the first."""
    arrays = random_arrays(("h_image", "h_text"))
    own = {"image_size": "s_1", "image_number": "s_0", "image_kind": "kind", "text_number": "s_1", "text_kind": "kind"}
    kept = {name: arrays[name] for name in ("h_image", "h_text", "is_test", "seed")}
    return kept | {name: arrays[source].reshape(COUNT) for name, source in own.items()}


@pytest.fixture
def kept(tmp_path):
    """kept(arrays) → the model directory that holds them."""

    def write(arrays):
        folder = tmp_path / "models/m"
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "encodings.npz", **arrays)
        return folder

    return write


@pytest.fixture
def call(tmp_path, capsys):
    return lambda *flags, model="m": outcome(
        capsys, plot_encodings.main, "--model-dir", tmp_path / "models", "--model-id", model, *flags
    )


@pytest.fixture
def drawn(kept, call, monkeypatch):
    """drawn(arrays, flags) → (axes of the three maps, dict title → axes of the factors by row, what is printed)."""

    def draw(arrays, *flags):
        figures = []
        monkeypatch.setattr(plot_encodings, "save_figure", lambda figure, *_: figures.append(figure))
        kept(arrays)
        code, out, err = call(*flags)
        assert code == 0, err
        maps, factors = figures[0].subfigs
        shown = [axes for axes in factors.axes if axes.axison]
        plot_encodings.plt.close(figures[0])
        return maps.axes, shown, out

    return draw


def printed(out):
    """Dict factor → list of the scores of both encodings, None where there is none."""
    rows = [line.split() for line in out.split("held-out")[0].splitlines()[1:]]
    return {name: [None if cell == "–" else float(cell) for cell in cells] for name, *cells in rows}


def points(axes, number=0):
    """Places of a scatter's points."""
    return np.asarray(axes.collections[number].get_offsets())


def by_place(places, values=None):
    """Points in an order of their own, with values if there are any, to five digits."""
    rows = np.column_stack((places, values)) if values is not None else places
    return sorted(map(tuple, np.round(np.asarray(rows, float), 5) + 0.0))


# --------------------------------------------------------------------------------------------------------------
# what is computed


@pytest.mark.parametrize("fitted", [5_000, 100])
def test_scores_and_directions_are_those_of_scikit_learn(kept, monkeypatch, fitted):
    monkeypatch.setattr(plot_encodings, "FITTED", fitted)
    arrays = random_arrays()
    encodings, factors, is_test, _ = read_encodings(kept(arrays) / "encodings.npz")
    scores, directions = held_out(encodings, factors, is_test, np.random.default_rng(3))
    test = arrays["is_test"]
    chosen = np.random.default_rng(3).permutation(COUNT // 2)[:fitted]
    for key in ("hz_x", "hz_t"):
        scaler = StandardScaler().fit(arrays[key][~test].astype(float))
        fit_h, test_h = (scaler.transform(arrays[key][part].astype(float)) for part in (~test, test))
        for name in ("s_0", "s_1", "noise"):
            truth = arrays[name].reshape(COUNT)
            expected = LinearRegression().fit(fit_h, truth[~test]).predict(test_h)
            assert directions[key][name] == pytest.approx(expected, abs=1e-5)
            assert scores[key][name] == pytest.approx(r2_score(truth[test], expected), abs=1e-5)
        kind = arrays["kind"]
        classifier = LogisticRegression(tol=1e-8, max_iter=1000).fit(fit_h[chosen], kind[~test][chosen])
        assert scores[key]["kind"] == pytest.approx(matthews_corrcoef(kind[test], classifier.predict(test_h)), abs=1e-9)
        expected = LinearDiscriminantAnalysis().fit(fit_h, kind[~test]).transform(test_h)[:, 0]
        assert abs(np.corrcoef(directions[key]["kind"], expected)[0, 1]) > 1 - 1e-9
        assert np.corrcoef(directions[key]["kind"], kind[test])[0, 1] > 0.5, "it rises with the classes"
    assert scores["hz_x"]["s_0"] > scores["hz_t"]["s_0"] + 0.05 and abs(scores["hz_x"]["noise"]) < 0.1


def test_the_discriminant_of_collinear_encodings_and_of_a_single_class_is_finite():
    h = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    collinear, classes = torch.cat((h, h, torch.ones(50, 1)), dim=1), torch.arange(50) % 3
    assert first_discriminant(collinear, classes, collinear).numpy() == pytest.approx(
        first_discriminant(h, classes, h).numpy(), abs=1e-6
    )
    assert first_discriminant(h, classes * 0, h).abs().max() < 1e-6


@pytest.mark.parametrize("names", plot_encodings.SIMILARITY)
def test_the_map_is_that_of_scikit_learns_pca(kept, names):
    arrays = random_arrays(names)
    encodings, _, is_test, _ = read_encodings(kept(arrays) / "encodings.npz")
    similarity = plot_encodings.SIMILARITY[names]
    places, labels = flat_map(encodings, is_test, similarity, np.random.default_rng(0))
    h, test = [arrays[name].astype(float) for name in names], arrays["is_test"]
    if similarity == "cosine":
        h = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in h]
    fitted = np.concatenate([part[~test] for part in h])
    pca = PCA(2).fit(fitted)
    scale = np.sqrt(fitted.var(axis=0).sum()) if similarity == "distance" else 1
    signs = None
    for name, part in zip(names, h, strict=True):
        expected = pca.transform(part[test]) / scale
        signs = np.sign((places[name] * expected).sum(axis=0)) if signs is None else signs
        assert places[name] == pytest.approx(signs * expected, abs=1e-9), "of both modalities in the same plane"
    assert [label.split("(")[1] for label in labels] == [f"{share:.0%})" for share in pca.explained_variance_ratio_]


def test_what_an_evaluation_writes_is_read_back(tmp_path):
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for part, count in (("fit", 5), ("test", 4)):
        h = {name: torch.randn(count, 2, generator=generator) for name in ("hz_x", "hz_t")}
        numbers = {name: torch.randn(count, k, generator=generator) for name, k in (("s_0", 1), ("s_inv", 2), ("m_x", 0))}
        constant = {"same": torch.ones(count), "many": torch.arange(count)}
        parts[part] = h | numbers | constant
    write_encodings(tmp_path / "encodings.npz", parts, 7)
    encodings, factors, is_test, passed_over = read_encodings(tmp_path / "encodings.npz")
    assert is_test.tolist() == 5 * [False] + 4 * [True] and list(encodings) == ["hz_x", "hz_t"]
    assert torch.equal(encodings["hz_t"], torch.cat((parts["fit"]["hz_t"], parts["test"]["hz_t"])).double())
    assert list(factors) == ["s_0", "many"] and list(factors["s_0"]) == ["hz_x", "hz_t"]
    assert torch.equal(factors["s_0"]["hz_x"][~is_test], parts["fit"]["s_0"][:, 0].double())
    assert factors["many"]["hz_t"].dtype == torch.int64
    assert passed_over == ["s_inv", "m_x", "same"]


def test_factors_of_too_many_classes_are_passed_over(kept):
    arrays = random_arrays() | {"index": np.arange(COUNT) % 51, "axis": np.arange(COUNT) % 50}
    _, factors, _, passed_over = read_encodings(kept(arrays) / "encodings.npz")
    assert passed_over == ["index"] and "axis" in factors


# --------------------------------------------------------------------------------------------------------------
# what is drawn


def test_the_picture_shows_scores_places_and_pairs(drawn, monkeypatch, tmp_path):
    monkeypatch.setattr(plot_encodings, "JOINED", 30)
    arrays = random_arrays()
    maps, panels, out = drawn(arrays)
    test = arrays["is_test"]
    encodings, factors, is_test, _ = read_encodings(tmp_path / "models/m/encodings.npz")
    scores = printed(out)
    assert list(scores) == ["s_0", "s_1", "noise", "kind"]
    titles = [panel.get_title(loc="left") for panel in panels]
    expected = [f"{name}\n{'MCC' if name == 'kind' else 'R²'} {of_x:.3f}" for name, (of_x, _) in scores.items()]
    expected += [f"{'MCC' if name == 'kind' else 'R²'} {of_t:.3f}" for name, (_, of_t) in scores.items()]
    assert titles == expected
    # the factor that is told best colours both maps
    best = max(scores, key=lambda name: scores[name][0])
    assert best in ("s_0", "s_1") and maps[3].get_title(loc="left") == best
    places, _ = flat_map(encodings, is_test, "distance", np.random.default_rng(0))
    truth = arrays[best][test, 0]
    for axes, name in zip(maps, ("hz_x", "hz_t"), strict=False):
        found = by_place(points(axes), axes.collections[0].get_array())
        assert found == by_place(places[name], truth), "every held-out sample has its place and its colour"
        assert name in axes.get_title(loc="left")
    assert [collection.get_clim() for collection in maps[0].collections] == [maps[1].collections[0].get_clim()]
    # both together
    gap = geometry(*(h[is_test] for h in encodings.values()), "distance")["modality_gap"]
    assert gap > 0.1 and f"{gap:.3f}" in maps[2].get_title(loc="left")
    (lines,) = [collection for collection in maps[2].collections if isinstance(collection, LineCollection)]
    pairs = {tuple(np.round((*x, *t), 6)) for x, t in zip(places["hz_x"], places["hz_t"], strict=True)}
    segments = {tuple(np.round(segment.flatten(), 6)) for segment in lines.get_segments()}
    assert len(segments) == 30 and segments <= pairs
    for line, name in zip(maps[2].lines, encodings, strict=True):
        assert np.ravel(line.get_data()) == pytest.approx(places[name].mean(axis=0)), "the centres"
    # a panel has the factor across and its prediction up
    direction = held_out(encodings, factors, is_test, np.random.default_rng(0))[1]
    assert by_place(points(panels[0])) == by_place(np.column_stack((arrays["s_0"][test, 0], direction["hz_x"]["s_0"])))
    assert by_place(points(panels[4])) == by_place(np.column_stack((arrays["s_0"][test, 0], direction["hz_t"]["s_0"])))


def test_classes_have_colours_a_legend_and_a_panel_each(drawn):
    arrays = random_arrays()
    maps, panels, _ = drawn(arrays, "--factor", "kind")
    test, classes = arrays["is_test"], np.unique(arrays["kind"])
    legend = maps[1].get_legend()
    assert legend.get_title().get_text() == "kind" and [text.get_text() for text in legend.get_texts()] == ["0", "3", "6", "9"]
    colours = [tuple(handle.get_color()) for handle in legend.legend_handles]
    assert len(set(colours)) == 4
    for axes in maps[:2]:
        axes.collections[0].update_scalarmappable()
        drawn_colours = axes.collections[0].get_facecolors()
        counts = [int((drawn_colours == colour).all(axis=1).sum()) for colour in colours]
        assert counts == [int((arrays["kind"][test] == value).sum()) for value in classes]
    kind = panels[3]
    assert kind.get_title(loc="left").startswith("kind\nMCC ")
    assert [label.get_text() for label in kind.get_xticklabels()] == ["0", "3", "6", "9"]
    places = points(kind)
    assert np.abs(places[:, 0] - places[:, 0].round()).max() < 0.4
    columns = places[:, 0].round().astype(int)
    assert np.bincount(columns).tolist() == counts
    medians = [segment[0, 1] for segment in kind.collections[1].get_segments()]
    assert medians == pytest.approx([np.median(places[columns == i, 1]) for i in range(4)])


def test_encodings_of_one_dimension_are_strips(drawn):
    arrays = random_arrays(size=1)
    maps, panels, out = drawn(arrays)
    test = arrays["is_test"]
    both = np.concatenate([arrays[name][~test] for name in ("hz_x", "hz_t")]).astype(float)
    for axes, name, above in zip(maps, ("hz_x", "hz_t"), (True, False), strict=False):
        places = points(axes)
        expected = (arrays[name][test, 0].astype(float) - both.mean()) / both.std()
        assert sorted(places[:, 0]) == pytest.approx(sorted(expected), abs=1e-6)
        assert ((places[:, 1] > 0) == above).all() and np.ptp(places[:, 1]) > 1
    assert len(panels) == 8 and len(printed(out)) == 4


def test_each_modality_has_factors_of_its_own_on_causal3dident(drawn):
    arrays = image_arrays()
    maps, panels, out = drawn(arrays, "--factor", "size")
    scores = printed(out)
    assert list(scores) == ["size", "number", "kind"]
    assert None not in scores["number"] and scores["size"][1] is None and scores["size"][0] > 0.5
    assert [panel.get_title(loc="left").split("\n")[0] for panel in panels[:3]] == ["size", "number", "kind"]
    assert [panel.get_ylabel() for panel in panels] == ["h_image", "", "", "h_text", ""]
    assert "without size" in maps[1].get_title(loc="left") and "without" not in maps[0].get_title(loc="left")
    by_row = np.sort(points(panels[3])[:, 0])
    assert by_row == pytest.approx(np.sort(arrays["text_number"][arrays["is_test"]])), "the text's number, not the image's"


@pytest.mark.parametrize("count", [1, 9, 20])
def test_many_factors_are_wrapped(drawn, count):
    arrays = random_arrays() | {"is_test": np.arange(COUNT) >= 20}
    kept_names = ("hz_x", "hz_t", "is_test")
    arrays = {name: arrays[name] for name in kept_names} | {f"f_{i}": np.arange(COUNT) * 1.0 + i for i in range(count)}
    _, panels, _ = drawn(arrays)
    assert len(panels) == 2 * count
    names = [text.split("\n")[0] for panel in panels if "\n" in (text := panel.get_title(loc="left"))]
    assert names == [f"f_{i}" for i in range(count)]
    assert len({panel.get_position().x0 for panel in panels}) <= plot_encodings.COLUMNS


@pytest.mark.parametrize("names", plot_encodings.SIMILARITY)
def test_collapsed_encodings_and_constant_factors_are_drawn(drawn, names):
    arrays = random_arrays(names) | {"same": np.ones(COUNT)}
    test = arrays["is_test"]
    arrays |= {"constant in the test": np.where(test, 1.0, arrays["noise"]), "one class": np.where(test, np.arange(COUNT) % 3, 0)}
    arrays |= {name: np.full((COUNT, 2), 0.1, np.float32) for name in names}
    _, panels, out = drawn(arrays, "--factor", "constant in the test")
    assert "passed over  same" in out and len(panels) == 12
    assert max(printed(out.replace("constant in the test", "constant").replace("one class", "class"))["kind"]) == 0


def test_the_least_of_samples(drawn):
    arrays = {name: values[:4] if np.ndim(values) else values for name, values in random_arrays().items()}
    assert len(drawn(arrays | {"is_test": np.array([False, True, False, True])})[1]) == 8


# --------------------------------------------------------------------------------------------------------------
# the script


def test_the_picture_is_written_whole_and_again_the_same(kept, call):
    arrays = {name: values for name, values in random_arrays().items() if name not in ("s_1", "noise", "kind")}
    folder = kept(arrays | {"$^$": np.arange(COUNT) % 2})
    before = contents(folder)
    code, out, err = call()
    assert code == 0, err
    picture = folder / "encodings.png"
    assert out.endswith(f"picture      {picture}\n")
    after = contents(folder)
    assert after.keys() - before.keys() == {"encodings.png"} and before.items() <= after.items()
    with Image.open(picture) as opened:
        opened.load()
        assert min(opened.size) > 1_000
    again = folder.parent / "again.png"
    assert call("--output", again, "--seed", "0", model=str(folder))[0] == 0, "a path names a model too"
    assert again.read_bytes() == picture.read_bytes()


def test_the_seed_draws_the_samples(drawn, monkeypatch):
    monkeypatch.setattr(plot_encodings, "DRAWN", 50)
    monkeypatch.setattr(plot_encodings, "MAPPED", 60)
    first, again, other = (drawn(random_arrays(), "--seed", seed) for seed in ("3", "3", "4"))
    assert np.array_equal(points(first[0][2]), points(again[0][2])) and len(points(first[0][2])) == 60
    assert np.array_equal(points(first[1][3]), points(again[1][3])) and len(points(first[1][3])) == 50
    assert not np.isin(points(first[0][2]), points(other[0][2])).all()
    assert printed(first[2]) == printed(other[2]), "all held-out samples are scored"


def changed(**changes):
    """Writes an encodings.npz with other arrays in it, None for one that is missing."""
    arrays = {name: values for name, values in (random_arrays() | changes).items() if values is not None}
    return lambda path: np.savez(path, **arrays)


def spoilt(name, value):
    """Writes one with a value in an array that does not belong there."""
    values = random_arrays()[name]
    values[5] = value
    return changed(**{name: values})


BAD = {
    "missing": (lambda path: path.unlink(), "--evaluate --save-encodings"),
    "a folder": (lambda path: path.unlink() or path.mkdir(), "no regular file"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "no zip": (lambda path: path.write_bytes(b"not a zip"), "is damaged"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-300]), "is damaged"),
    "flipped": (lambda path: path.write_bytes(path.read_bytes().replace(b"'shape'", b"'shapo'", 1)), "is damaged"),
    "one array": (lambda path: path.write_bytes(npy(np.ones(3))), "is damaged"),
    "pickled": (lambda path: path.write_bytes(pickled_npz(hz_x=None, hz_t=None, is_test=None)), "is damaged"),
    "pickled array": (lambda path: path.write_bytes(pickled_array()), "is damaged"),
    "no array": (lambda path: path.write_bytes(pickled_npz(hz_x=b"x", hz_t=b"x", is_test=b"x")), "hz_x is |S1"),
    "foreign": (lambda path: np.savez(path, images=np.ones(3)), "holds images; expected is_test and hz_x"),
    "nothing": (lambda path: np.savez(path), "holds nothing"),
    "without is_test": (changed(is_test=None), "expected is_test"),
    "without texts": (changed(hz_t=None), "expected is_test and hz_x, hz_t"),
    "shorter": (changed(s_1=np.ones(COUNT - 1)), "s_1 is float64 of shape (399,)"),
    "a number": (changed(s_1=np.ones(())), "s_1 is float64 of shape ()"),
    "words": (changed(s_1=np.array(COUNT * ["red"])), "s_1 is <U3"),
    "complex": (changed(s_1=np.ones(COUNT, complex)), "s_1 is complex128"),
    "integers": (changed(hz_x=np.ones((COUNT, 3), int)), "hz_x is int64"),
    "no masks": (changed(is_test=np.ones(COUNT)), "is_test is float64"),
    "other dimensions": (changed(hz_t=np.ones((COUNT, 2))), "expected one shape (N, D)"),
    "no dimensions": (changed(hz_x=np.ones((COUNT, 0)), hz_t=np.ones((COUNT, 0))), "expected one shape (N, D)"),
    "flat": (changed(hz_x=np.ones(COUNT), hz_t=np.ones(COUNT)), "expected one shape (N, D)"),
    "NaN": (spoilt("hz_t", np.nan), "hz_t holds values that are not finite"),
    "infinite": (spoilt("s_0", -np.inf), "s_0 holds values that are not finite"),
    "huge": (spoilt("noise", 1e200), "noise holds values that are not finite, or above 1e+30"),
    "one held out": (changed(is_test=np.arange(COUNT) < 1), "holds out 1 of 400"),
    "one to fit": (changed(is_test=np.arange(COUNT) > 0), "holds out 399 of 400"),
    "no factor": (changed(s_0=None, s_1=None, noise=None, kind=None, m_x=np.ones((COUNT, 2))), "has no factor to draw: m_x of"),
}


def npy(values):
    """The bytes of a .npy file."""
    path = Path("values.npy")
    np.save(path, values)
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_line(kept, call, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    folder = kept(random_arrays())
    write, words = BAD[case]
    write(folder / "encodings.npz")
    before = contents(folder)
    code, _, err = call()
    assert code == 2 and words in err and err.count("\n") == 1, err
    assert contents(folder) == before and not Path(TRACE).exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--factor", "s_9"], "--factor s_9 is none of those to draw: s_0, s_1, noise, kind"),
        (["--factor", "is_test"], "--factor is_test is none of those"),
        (["--output", "missing/picture.png"], "is no folder to write picture.png to"),
        (["--output", "picture.doc"], "does not end in"),
        (["--model-id", "other"], "there is no model"),
        (["--model-id", "m/encodings.npz"], "there is no model"),
        (["--seed", "-1"], "-1 is too small"),
    ],
)
def test_a_wrong_flag_is_one_line(kept, call, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    kept(random_arrays())
    before = contents(tmp_path)
    code, _, err = call(*flags)
    assert code == 2 and words in err and err.count("\n") == 1, err
    assert contents(tmp_path) == before


def test_the_encodings_of_another_model_are_refused(kept, call):
    folder = kept(random_arrays())
    write_json(folder / "args.json", {"files": digests(folder)})
    assert call()[0] == 0
    kept(random_arrays() | {"s_0": np.ones(COUNT)})
    code, _, err = call()
    assert code == 2 and "encodings.npz is damaged, or another model's" in err and err.count("\n") == 1


def test_a_file_that_would_inflate_is_refused_before_it_does(kept, call):
    folder = kept(random_arrays())
    np.savez_compressed(folder / "encodings.npz", **random_arrays(), more=np.zeros(10**6))
    code, _, err = call()
    assert code == 2 and "encodings.npz is damaged" in err and err.count("\n") == 1


def test_no_picture_is_drawn_into_a_directory_that_another_process_works_in(kept, call, tmp_path):
    folder = kept(random_arrays())
    with occupied(folder):
        code, _, err = call()
        assert code == 2 and "in use by process" in err and err.count("\n") == 1
        assert call("--output", tmp_path / "elsewhere.png")[0] == 0


def test_a_picture_that_cannot_be_written_leaves_the_earlier_one(kept, call, monkeypatch):
    folder = kept(random_arrays())
    (folder / "encodings.png").write_bytes(b"earlier")

    def full(figure, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plot_encodings.plt.Figure, "savefig", full)
    before = contents(folder)
    code, _, err = call()
    assert code == 2 and "No space left on device" in err and err.count("\n") == 1
    assert contents(folder) == before


def test_the_maps_have_the_colours_of_the_factor_that_images_hold_best(drawn):
    arrays, noise = random_arrays(), np.random.default_rng(1).normal(size=(4, 400, 1))
    for name, own, n in (("hz_x", "s_0", noise[:2]), ("hz_t", "s_1", noise[2:])):
        arrays[name] = np.hstack((arrays[own], arrays["s_0"] + arrays["s_1"] + n[0], n[1])).astype(np.float32)
    maps, _, out = drawn(arrays)
    scores = printed(out)
    assert scores["s_0"][0] > 0.9 > scores["s_1"][0] and scores["s_1"][1] > 0.9 > scores["s_0"][1]
    assert maps[3].get_title(loc="left") == "s_0"


@pytest.mark.parametrize(("names", "similarity"), [(("hz_x", "hz_t"), "distance"), (("h_image", "h_text"), "cosine")])
def test_the_gap_is_that_of_the_model_s_similarity(drawn, names, similarity):
    arrays = random_arrays(names)
    maps, _, _ = drawn(arrays)
    h = [torch.from_numpy(arrays[name][arrays["is_test"]]).double() for name in names]
    gaps = {kind: f"{geometry(*h, kind)['modality_gap']:.3f}" for kind in ("distance", "cosine")}
    assert gaps["distance"] != gaps["cosine"] and gaps[similarity] in maps[2].get_title(loc="left")
