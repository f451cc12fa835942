"""The loss against its formula written out in float64."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from losses import (
    LabelLoss,
    LearnedLogits,
    image_text_contrastive_loss,
    multimodal_contrastive_loss,
    sigmoid_contrastive_loss,
    textbook_image_text_loss,
    textbook_multimodal_loss,
    textbook_sigmoid_loss,
)


def value_and_gradients(loss, tensors, dtype, **options):
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    value = loss(*leaves, **options)
    value.backward()
    return value.detach().double(), [leaf.grad.double() for leaf in leaves]


def encodings(sizes, dimensions, scale=1.0, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # rounded to float32, so that both precisions see the same numbers
    return [(torch.randn(n, dimensions, generator=generator) * scale + offset).double() for n in sizes]


def relative(found, expected):
    return ((found - expected).norm() / expected.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("p, tau", [(2.0, 1.0), (2.0, 0.3), (1.0, 1.0), (3.0, 2.0), (1.5, 0.7)])
@pytest.mark.parametrize("pairs, negatives, dimensions", [(40, 40, 10), (33, 7, 3), (1, 5, 1)])
def test_value_and_gradients_in_float64(p, tau, pairs, negatives, dimensions, monkeypatch):
    monkeypatch.setitem(losses.BLOCK_ELEMENTS, "cpu", 150)  # several blocks, the last one short
    tensors = encodings((pairs, pairs, negatives, negatives), dimensions)
    value, gradients = value_and_gradients(multimodal_contrastive_loss, tensors, torch.float64, p=p, tau=tau)
    expected, expected_gradients = value_and_gradients(textbook_multimodal_loss, tensors, torch.float64, p=p, tau=tau)
    assert abs(value - expected) <= 1e-12 * max(1, abs(expected))
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative(found, wanted) < 1e-10


@pytest.mark.parametrize(
    "scale, tau, among_themselves",
    [(1.0, 1.0, True), (0.05, 1.0, True), (6.0, 1.0, True), (6.0, 0.2, True), (30.0, 1.0, None), (200.0, 1.0, False)],
    ids=["unit", "near", "spread", "cold", "far", "apart"],
)
def test_negatives_of_the_batch_have_a_form_of_their_own_where_they_are_near(scale, tau, among_themselves, monkeypatch):
    """By one symmetric matrix; None: in whichever form. Encodings far from all others and their partners need the other."""
    general, counted = losses._loss_among_others, []
    monkeypatch.setattr(losses, "_loss_among_others", lambda *arguments: counted.append(1) or general(*arguments))
    monkeypatch.setitem(losses.BLOCK_ELEMENTS, "cpu", 7_000)  # several blocks, the last one short
    h_x, noise = encodings((300, 300), 4, scale)
    tensors = (h_x, (h_x + noise / (10 if scale < 100 else 1)).float().double())
    value, gradients = value_and_gradients(multimodal_contrastive_loss, tensors, torch.float32, tau=tau)
    expected, expected_gradients = value_and_gradients(textbook_multimodal_loss, tensors, torch.float64, tau=tau)
    assert among_themselves is None or len(counted) == (0 if among_themselves else 2)
    assert abs(value - expected) <= 1e-5 * max(1, abs(expected))
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative(found, wanted) < 2e-5
    monkeypatch.setattr(losses, "_loss_among_themselves", lambda *_: None)
    others = value_and_gradients(multimodal_contrastive_loss, tensors, torch.float64, tau=tau)
    assert abs(others[0] - expected) <= 1e-10 * max(1, abs(expected))


@pytest.mark.parametrize("form", ["cpu", "cuda"])
@pytest.mark.parametrize("dimensions", [1, 10])
@pytest.mark.parametrize(
    "scale, offset",
    [(1.0, 0.0), (1e-4, 0.0), (30.0, 0.0), (1e4, 0.0), (1.0, 1e3), (0.01, 100.0)],
    ids=["unit", "collapsed", "spread", "far apart", "far from the origin", "collapsed and far"],
)
def test_float32_is_within_1e_5_also_at_extremes(scale, offset, form, dimensions, monkeypatch):
    """In the form of a CPU and in that of a GPU, whose distances have no float64 product."""
    monkeypatch.setitem(losses.SQUARED_DISTANCE_LOGITS, "cpu", losses.SQUARED_DISTANCE_LOGITS[form])
    h_x, noise, n_x, n_t = encodings((300, 300, 300, 300), dimensions, scale, offset)
    h_t = (h_x + 0.1 * (noise - offset)).float().double()
    tensors = (h_x, h_t, n_x, n_t)
    value, gradients = value_and_gradients(multimodal_contrastive_loss, tensors, torch.float32)
    expected, expected_gradients = value_and_gradients(textbook_multimodal_loss, tensors, torch.float64)
    assert torch.isfinite(value) and abs(value - expected) <= 1e-5 * max(1, abs(expected))
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert torch.isfinite(found).all()
        assert relative(found, wanted) < 1e-5 or wanted.norm() < 1e-30


class PartOfBatch:
    """A share of a batch whose other rows are at hand: `gather` takes its own and finds the batch they are of."""

    def __init__(self, total, first, stop, batches):
        self.total, self.first, self.rows, self.batches = total, first, slice(first, stop), batches

    def gather(self, rows):
        return next(batch for batch in self.batches if torch.allclose(batch[self.rows], rows, atol=0))


@pytest.mark.parametrize("bounds", [(0, 23), (0, 11, 23), (0, 7, 8, 23)], ids=["one", "two", "three"])
@pytest.mark.parametrize("kind", ["independent", "batch", "both", "cross", "distance", "cosine"])
def test_the_parts_of_a_batch_add_up_with_their_gradients(kind, bounds, monkeypatch):
    monkeypatch.setitem(losses.BLOCK_ELEMENTS, "cpu", 100)  # several blocks in a share
    tensors = encodings((23,) * (4 if kind == "independent" else 2), 4)
    loss = multimodal_contrastive_loss if kind in ("independent", "batch") else image_text_contrastive_loss
    options = {"tau": 0.3} | ({"negatives": kind} if kind in ("both", "cross") else {})
    if kind in ("distance", "cosine"):
        loss, options = sigmoid_contrastive_loss, {"scale": torch.tensor(1.7), "bias": torch.tensor(-0.4), "similarity": kind}

    def in_parts(*tensors, **options):
        known = [*tensors, *(h / h.norm(dim=1, keepdim=True) for h in tensors)]  # the cosine's encodings have length 1
        shares = [PartOfBatch(23, *bounds[k : k + 2], known) for k in range(len(bounds) - 1)]
        # inside the public function the cosine's gradients are formed at once, over other processes' rows too: test_ranks.py
        part = losses._cosine_loss if loss is image_text_contrastive_loss else loss
        return sum(part(*(h[share.rows] for h in tensors), share=share, **options) for share in shares)

    value, gradients = value_and_gradients(in_parts, tensors, torch.float64, **options)
    expected, expected_gradients = value_and_gradients(loss, tensors, torch.float64, **options)
    assert abs(value - expected) < 1e-12
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative(found, wanted) < 1e-10


def test_negatives_from_the_batch_leave_the_anchor_out(monkeypatch):
    monkeypatch.setitem(losses.BLOCK_ELEMENTS, "cpu", 100)
    h_x, h_t = encodings((23, 23), 4)

    def one_by_one(h_x, h_t, p):
        others = [torch.arange(23) != i for i in range(23)]
        rows = [textbook_multimodal_loss(h_x[i : i + 1], h_t[i : i + 1], h_x[others[i]], h_t[others[i]], p) for i in range(23)]
        return torch.stack(rows).mean()

    for p in (2.0, 1.0):
        value, gradients = value_and_gradients(multimodal_contrastive_loss, (h_x, h_t), torch.float64, p=p)
        for reference in (one_by_one, textbook_multimodal_loss):
            expected, expected_gradients = value_and_gradients(reference, (h_x, h_t), torch.float64, p=p)
            assert abs(value - expected) < 1e-12
            for found, wanted in zip(gradients, expected_gradients, strict=True):
                assert relative(found, wanted) < 1e-10


class LargestTensor(TorchDispatchMode):
    """Context that notes the number of elements of the largest tensor that is made in it."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel())
        return out


@pytest.mark.parametrize("p", [2.0, 1.0])
@pytest.mark.parametrize("in_batch", [True, False])
def test_no_tensor_of_all_pairs_is_made(p, in_batch, monkeypatch):
    monkeypatch.setitem(losses.BLOCK_ELEMENTS, "cpu", 4000)
    leaves = [h.float().requires_grad_() for h in encodings((200, 200, 200, 200), 8)]
    with LargestTensor() as largest:
        multimodal_contrastive_loss(*leaves[: 2 if in_batch else 4], p=p).backward()
    assert 1000 < largest.size <= 4000 < 200 * 200


def test_identical_encodings_have_the_loss_of_chance_and_perfect_ones_its_bound():
    same = torch.ones(8, 3)
    assert multimodal_contrastive_loss(same, same, same, same).item() == pytest.approx(0, abs=1e-6)
    apart = torch.arange(8.0)[:, None] * 100
    negatives = apart + 1e4
    assert multimodal_contrastive_loss(apart, apart, negatives, negatives).item() == pytest.approx(-torch.tensor(9.0).log())


def test_autocast_does_not_reach_the_loss():
    tensors = encodings((50, 50, 50, 50), 5)
    plain = multimodal_contrastive_loss(*(tensor.float() for tensor in tensors))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(multimodal_contrastive_loss(*(tensor.float() for tensor in tensors)), plain)
        low = multimodal_contrastive_loss(*(tensor.bfloat16() for tensor in tensors))
    assert low.dtype == torch.float32 and abs(low - plain) < 0.1


def test_no_gradient_flows_where_none_is_asked():
    h_x, h_t, n_x, n_t = (tensor.float() for tensor in encodings((9, 9, 9, 9), 2))
    h_x.requires_grad_()
    multimodal_contrastive_loss(h_x, h_t, n_x, n_t).backward()
    assert h_x.grad is not None and h_t.grad is None


@pytest.mark.parametrize(
    "shapes, options, message",
    [
        (((4, 2), (5, 2), (4, 2), (4, 2)), {}, "one shape"),
        (((4, 2), (4, 2), (4, 3), (4, 2)), {}, "negatives_x"),
        (((4, 2), (4, 2), (4, 2), (0, 2)), {}, "negatives_t"),
        (((4, 2), (4, 2), (4, 2)), {}, "both or neither"),
        (((1, 2), (1, 2)), {}, "two pairs"),
        (((4, 2), (4, 2)), {"p": 0.5}, "exponent"),
    ],
)
def test_arguments_that_do_not_fit(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        multimodal_contrastive_loss(*(torch.zeros(shape) for shape in shapes), **options)


# --------------------------------------------------------------------------------------------------------------
# image/text loss


def written_out_image_text(h_x, h_t, tau=1.0, negatives="both"):
    """The loss of the 2B rows, one after another, each over the list of its candidates."""
    encodings = [*h_x, *h_t]
    pairs, terms = len(h_x), []
    for i, anchor in enumerate(encodings):
        partner = (i + pairs) % (2 * pairs)
        others = range(2 * pairs) if negatives == "both" else range(pairs) if i >= pairs else range(pairs, 2 * pairs)
        candidates = [j for j in others if j != i]
        logits = torch.stack([(anchor @ encodings[j]) / (anchor.norm() * encodings[j].norm()) for j in candidates]) / tau
        terms.append(torch.logsumexp(logits, dim=0) - logits[candidates.index(partner)])
    return torch.stack(terms).mean()


@pytest.mark.parametrize("negatives", ["both", "cross"])
@pytest.mark.parametrize("pairs, dimensions, tau", [(17, 5, 1.0), (2, 3, 0.1), (9, 1, 2.0)])
def test_image_text_value_and_gradients_in_float64(pairs, dimensions, tau, negatives):
    tensors = encodings((pairs, pairs), dimensions)
    options = {"tau": tau, "negatives": negatives}
    value, gradients = value_and_gradients(image_text_contrastive_loss, tensors, torch.float64, **options)
    for reference in (written_out_image_text, textbook_image_text_loss):
        expected, expected_gradients = value_and_gradients(reference, tensors, torch.float64, **options)
        assert abs(value - expected) <= 1e-12 * max(1, abs(expected))
        for found, wanted in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-14)


def test_image_text_loss_is_symmetric_and_independent_of_scale():
    h_x, h_t = encodings((30, 30), 4)
    value = image_text_contrastive_loss(h_x, h_t)
    assert image_text_contrastive_loss(h_t, h_x).item() == pytest.approx(value.item(), abs=1e-13)
    assert image_text_contrastive_loss(100 * h_x, h_t / 7).item() == pytest.approx(value.item(), abs=1e-12)
    single = image_text_contrastive_loss(h_x.float(), h_t.float())
    assert single.dtype == torch.float32 and single.item() == pytest.approx(value.item(), abs=1e-6)


def test_image_text_loss_of_half_precision_and_of_zero_is_finite():
    h_x, h_t = (h.bfloat16().requires_grad_() for h in encodings((8, 8), 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = image_text_contrastive_loss(h_x, h_t, tau=0.05)
    expected = image_text_contrastive_loss(h_x.detach().double(), h_t.detach().double(), tau=0.05)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    zero = torch.zeros(4, 3, requires_grad=True)
    image_text_contrastive_loss(zero, torch.ones(4, 3)).backward()
    assert zero.grad.isfinite().all()


def test_image_text_loss_names_wrong_inputs():
    with pytest.raises(ValueError, match=r"h_x \(4, 3\) and h_t \(4, 2\)"):
        image_text_contrastive_loss(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="none of: both, cross"):
        image_text_contrastive_loss(torch.ones(4, 3), torch.ones(4, 3), negatives="all")


# --------------------------------------------------------------------------------------------------------------
# the sigmoid loss


def written_out_sigmoid(h_x, h_t, scale, bias, similarity):
    """Zhai et al. (2023), by loops."""
    total = h_x.new_zeros(())
    for i, x in enumerate(h_x):
        for j, t in enumerate(h_t):
            alike = -((x - t) ** 2).sum() if similarity == "distance" else x @ t / (x.norm() * t.norm())
            total = total + torch.log1p(torch.exp(-(1 if i == j else -1) * (scale * alike + bias)))
    return total / len(h_x)


@pytest.mark.parametrize("similarity", ["distance", "cosine"])
@pytest.mark.parametrize(
    "pairs, dimensions, scale, bias", [(17, 5, 1.0, -3.0), (2, 3, 0.1, 0.0), (1, 1, 2.0, 1.0), (9, 1, 10.0, -10.0)]
)
def test_sigmoid_value_and_gradients_in_float64(similarity, pairs, dimensions, scale, bias, monkeypatch):
    monkeypatch.setitem(losses.BLOCK_ELEMENTS, "cpu", 30)  # several blocks
    learned = [torch.tensor(value) for value in (scale, bias)]
    tensors = [*encodings((pairs, pairs), dimensions), *learned]
    expected, expected_gradients = value_and_gradients(written_out_sigmoid, tensors, torch.float64, similarity=similarity)
    for loss in (textbook_sigmoid_loss, sigmoid_contrastive_loss):
        value, gradients = value_and_gradients(loss, tensors, torch.float64, similarity=similarity)
        assert abs(value - expected) < 1e-10 * abs(expected)
        for found, wanted in zip(gradients, expected_gradients, strict=True):
            assert relative(found, wanted) < 1e-9 or wanted.norm() < 1e-12


@pytest.mark.parametrize("similarity", ["distance", "cosine"])
@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (30.0, 0.0), (1.0, 1e3)])
def test_sigmoid_in_float32_is_that_of_float64_also_at_extremes(similarity, scale, offset):
    tensors = [*encodings((300, 300), 3, scale, offset), torch.tensor(1.5), torch.tensor(-6.0)]
    expected, expected_gradients = value_and_gradients(textbook_sigmoid_loss, tensors, torch.float64, similarity=similarity)
    value, gradients = value_and_gradients(sigmoid_contrastive_loss, tensors, torch.float32, similarity=similarity)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    # of encodings far from the origin the cosine's differences are below float32
    bound = 1e-4 if similarity == "distance" or offset == 0 else 0.3
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative(found, wanted) < bound


def test_sigmoid_loss_names_wrong_inputs():
    h, one = torch.zeros(3, 2), torch.ones(())
    with pytest.raises(ValueError, match="must have one shape"):
        sigmoid_contrastive_loss(h, torch.zeros(2, 2), one, one)
    with pytest.raises(ValueError, match="none of: distance, cosine"):
        sigmoid_contrastive_loss(h, h, one, one, "angle")


def test_a_multiple_of_a_loss_has_that_multiple_of_its_gradients():
    h_x, h_t = encodings((9, 9), 3)
    learned = torch.tensor(1.5), torch.tensor(-2.0)
    for loss, more in ((multimodal_contrastive_loss, ()), (image_text_contrastive_loss, ()), (sigmoid_contrastive_loss, learned)):
        _, gradients = value_and_gradients(loss, (h_x, h_t, *more), torch.float64)
        _, scaled = value_and_gradients(lambda *of, loss=loss: 0.25 * loss(*of), (h_x, h_t, *more), torch.float64)
        for own, whole in zip(scaled, gradients, strict=True):
            torch.testing.assert_close(own, whole / 4)


def test_sigmoid_loss_of_half_precision_is_formed_in_full():
    h_x, h_t = (h.bfloat16() for h in encodings((8, 8), 3))
    learned = torch.tensor(1.5), torch.tensor(-2.0)
    loss, expected = sigmoid_contrastive_loss(h_x, h_t, *learned), textbook_sigmoid_loss(h_x.double(), h_t.double(), *learned)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("tau", [1.0, 0.01])
def test_clusters_that_lie_far_apart_keep_the_precision_of_float32(tau):
    """Distances within a cluster are lost in a float32 product of encodings whose squared length is 10,000 τ."""
    side, noise, own = encodings((300, 300, 300), 2)
    h_x = ((100 * side.sign() + noise) * tau**0.5).float().double()
    h_t = (h_x + 0.3 * own * tau**0.5).float().double()
    value, gradients = value_and_gradients(multimodal_contrastive_loss, (h_x, h_t), torch.float32, tau=tau)
    expected, expected_gradients = value_and_gradients(textbook_multimodal_loss, (h_x, h_t), torch.float64, tau=tau)
    assert abs(value - expected) <= 1e-6 * abs(expected)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative(found, wanted) < 1e-4


def test_sigmoid_loss_does_not_depend_on_the_origin():
    h_x, h_t = encodings((20, 20), 3)
    learned = torch.tensor(1.5).double(), torch.tensor(-2.0).double()
    expected = sigmoid_contrastive_loss(h_x, h_t, *learned).item()
    assert sigmoid_contrastive_loss(h_x + 2.0**20, h_t + 2.0**20, *learned).item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("similarity, scale, bias", [("distance", 1.0, -math.log(64)), ("cosine", 10.0, -10.0)])
def test_learned_logits_begin_where_they_are_said_to(similarity, scale, bias):
    logits = LearnedLogits(similarity, 64)
    assert logits.log_scale.exp().item() == pytest.approx(scale) and logits.bias.item() == pytest.approx(bias)
    h_x, h_t = (h.float() for h in encodings((9, 9), 3))
    expected = sigmoid_contrastive_loss(h_x, h_t, torch.tensor(scale), torch.tensor(bias), similarity)
    assert logits(h_x, h_t).item() == pytest.approx(expected.item(), rel=1e-5)


# --------------------------------------------------------------------------------------------------------------
# labels


def test_the_loss_of_labels_against_numpy_and_scikit_learn():
    from sklearn.metrics import log_loss

    h = encodings((40,), 5)[0].float()
    labels = {"class": torch.arange(40) % 3, "number": 7 + 2 * torch.randn(40, generator=torch.Generator().manual_seed(0))}
    loss = LabelLoss(5, labels)
    assert loss(h, labels, 40).item() == pytest.approx(math.log(3) + 1, rel=1e-5), "at first nothing is told"
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.normal_(generator=generator)
    logits, number = (h.double() @ head.weight.double().T + head.bias.double() for head in loss.heads.values())
    classes = log_loss(labels["class"], logits.softmax(dim=1).detach().numpy())
    wanted = labels["number"].double().numpy()
    squared = np.mean((number[:, 0].detach().numpy() - (wanted - wanted.mean()) / wanted.std()) ** 2)
    assert loss(h, labels, 40).item() == pytest.approx(classes + squared, rel=1e-5)
    parts = [loss(h[part], {name: values[part] for name, values in labels.items()}, 40) for part in (slice(15), slice(15, 40))]
    assert sum(parts).item() == pytest.approx(classes + squared, rel=1e-5), "the parts of a batch add up"


def test_a_constant_label_costs_nothing_and_breaks_nothing():
    labels = {"class": torch.zeros(6, dtype=torch.int64), "number": torch.full((6,), 3.0)}
    assert LabelLoss(2, labels)(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), labels, 6).item() == 0
