"""Where encodings lie, against the definitions by loops, and in cases whose answer is known."""

import math

import pytest
import torch

from running.geometry import PAIRS, geometry


def by_loops(h_x, h_t, similarity):
    """The definitions, one number after another."""
    if similarity == "cosine":
        h_x, h_t = ([row / row.norm() for row in h] for h in (h_x, h_t))
    else:
        both = [*h_x, *h_t]
        centre = sum(both) / len(both)
        scale = math.sqrt(sum(float((row - centre) @ (row - centre)) for row in both) / len(both))
        h_x, h_t = ([(row - centre) / scale for row in h] for h in (h_x, h_t))
    count = len(h_x)

    def squared(a, b):
        return float((a - b) @ (a - b))

    def uniformity(h):
        terms = [math.exp(-2 * squared(h[i], h[j])) for i in range(count) for j in range(count) if i != j]
        return math.log(sum(terms) / len(terms))

    def recall(these, those):
        return sum(min(range(count), key=lambda j: squared(these[i], those[j])) == i for i in range(count)) / count

    gap = sum(h_x) / count - sum(h_t) / count
    return {
        "modality_gap": float(gap.norm()),
        "alignment": sum(squared(x, t) for x, t in zip(h_x, h_t, strict=True)) / count,
        "uniformity_x": uniformity(h_x), "uniformity_t": uniformity(h_t),
        "recall_x": recall(h_x, h_t), "recall_t": recall(h_t, h_x),
    }  # fmt: skip


@pytest.mark.parametrize("similarity", ["distance", "cosine"])
@pytest.mark.parametrize("dimensions", [1, 3])
def test_the_definitions(similarity, dimensions):
    generator = torch.Generator().manual_seed(0)
    h_x = torch.randn(12, dimensions, generator=generator, dtype=torch.float64) + 0.5
    h_t = h_x + 0.4 * torch.randn(12, dimensions, generator=generator, dtype=torch.float64) + 0.3
    found, expected = geometry(h_x, h_t, similarity), by_loops(h_x, h_t, similarity)
    if similarity == "cosine" and dimensions == 1:  # all encodings are 1 or −1: which of equals is nearest means nothing
        found, expected = ({name: value for name, value in of.items() if "recall" not in name} for of in (found, expected))
    assert found == pytest.approx(expected, abs=1e-9)


def test_equal_modalities_have_no_gap_and_find_each_other_and_opposite_ones_are_as_far_as_can_be():
    h = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    same, opposite = geometry(h, h, "cosine"), geometry(h.abs(), -h.abs(), "cosine")
    assert (same["modality_gap"], same["recall_x"], same["recall_t"]) == (0, 1, 1) and same["alignment"] < 1e-12
    assert opposite["alignment"] == pytest.approx(4) and opposite["modality_gap"] > 1.5


def test_the_scale_of_distances_does_not_matter_nor_do_samples_beyond_the_first():
    h = torch.randn(PAIRS + 50, 2, generator=torch.Generator().manual_seed(0))
    noisy = h + 0.1 * torch.randn(h.shape, generator=torch.Generator().manual_seed(1))
    found = geometry(h, noisy, "distance")
    assert geometry(100 * h[:PAIRS] + 7, 100 * noisy[:PAIRS] + 7, "distance") == pytest.approx(found, rel=1e-4)


def test_encodings_that_do_not_fit_are_named():
    h = torch.zeros(3, 2)
    for wrong in ((h, h[:2]), (h[:1], h[:1]), (h[0], h[0])):
        with pytest.raises(ValueError, match="must have one shape"):
            geometry(*wrong, "cosine")
    with pytest.raises(ValueError, match="none of: distance, cosine"):
        geometry(h, h, "angle")
