"""Pictures show the scores they are given."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from figures import plot_factor_scores

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
