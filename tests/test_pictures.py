"""Pictures show the scores they are given."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from running.pictures import difference_heatmap, plot_factor_scores, plot_score_curves, plot_side_by_side, plt, score_heatmap

SCORES = pd.DataFrame([[0.99, 0.01, -0.2], [0.5, np.nan, 1.3]], index=["hz_x", "hz_t"], columns=["s_0", "s_1", "m_x"])


def drawn(tmp_path, scores, **options):
    plot_factor_scores({"linear": scores, "nonlinear": scores}, tmp_path / "p.png", "title", **options)
    with Image.open(tmp_path / "p.png") as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_a_higher_score_is_a_darker_cell(tmp_path):
    zeros, ones = (drawn(tmp_path, SCORES * 0 + value) for value in (0.0, 1.0))
    assert ones.shape == zeros.shape and ones.mean() < zeros.mean() - 20


def test_the_unbiased_columns_are_framed(tmp_path):
    def orange(picture):
        return (np.abs(picture - [255, 127, 14]).sum(axis=2) < 30).sum()

    assert orange(drawn(tmp_path, SCORES)) == 0 < orange(drawn(tmp_path, SCORES, highlighted={"s_0"}))


def test_a_failure_leaves_no_picture(tmp_path):
    with pytest.raises(FileNotFoundError):
        plot_factor_scores({"linear": SCORES}, tmp_path / "missing" / "p.png", "title")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def axes():
    """Axes of an empty picture."""
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def test_scores_have_the_decimals_asked_for_and_missing_ones_no_text(axes):
    score_heatmap(axes, SCORES, decimals=1)
    assert [text.get_text() for text in axes.texts] == ["1.0", "0.0", "0.0", "0.5", "1.0"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["s_0", "s_1", "m_x"]


def test_references_stand_small_below_the_scores(axes):
    floor, ceiling = SCORES * 0 + 0.1, SCORES.drop(columns="m_x") * 0 + 0.97
    score_heatmap(axes, SCORES, references=[floor, ceiling])
    below = {text.get_position(): text.get_text() for text in axes.texts if text.get_fontsize() < 6}
    assert below[(0, 0.36)] == "0.10 | 0.97" and below[(2, 0.36)] == "0.10 | –"
    assert len(axes.texts) == 5 + len(below)


def test_differences_are_signed_and_legible_on_dark_cells(axes):
    difference_heatmap(axes, pd.DataFrame([[-0.61, -0.001, 0.02, np.nan]], columns=list("abcd")))
    texts = [(text.get_text(), text.get_color()) for text in axes.texts]
    assert texts == [("-0.61", "white"), ("+0.00", "black"), ("+0.02", "black")]


def test_long_names_are_slanted(axes):
    for name, angle in (("s_1", 0), ("object_shape", 45)):
        score_heatmap(axes, SCORES.set_axis([name, "b", "c"], axis=1))
        assert axes.get_xticklabels()[0].get_rotation() == angle


def drawn_axes(monkeypatch, plot, *arguments):
    """The axes of a picture that is not written."""
    kept = []
    monkeypatch.setattr("running.pictures.save_figure", lambda figure, *_, **__: kept.append(figure))
    plot(*arguments)
    plt.close(kept[0])
    return kept[0].axes


def test_what_the_paper_misprints_is_marked_in_its_panel_and_in_the_differences(monkeypatch):
    panel, notes = ("row", "column"), SCORES.astype(str).map(lambda _: "")
    notes.loc["hz_x", "s_0"] = "misprint"
    tables = [{panel: table} for table in (SCORES, SCORES, SCORES * np.nan, notes)]
    _, paper, differences = drawn_axes(monkeypatch, plot_side_by_side, *tables, 2, "p.png", "title")
    assert paper.texts[-1].get_text() == "0.99\nmisprint"
    assert [text.get_text() for text in differences.texts] == ["misprint"]


def test_curves_of_all_figures_share_their_scale_unless_a_score_is_below(monkeypatch):
    lowest = []
    for score in (0.4, -0.5):
        scores = {("row", "column"): pd.DataFrame([[score, 0.5]], index=["y1"], columns=["{1}", "[2]"])}
        deviations = {panel: table * 0 for panel, table in scores.items()}
        axes = drawn_axes(monkeypatch, plot_score_curves, scores, deviations, {}, "p.png", "title")[0]
        assert axes.get_ylim()[1] == 1.03
        lowest.append(axes.get_ylim()[0])
    assert lowest[0] == -0.03 and -0.6 < lowest[1] < -0.5
