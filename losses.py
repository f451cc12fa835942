"""The contrastive objectives: pure functions of encodings. Each in the paper's form first, then the same, in blocks."""

import math

import torch
from torch import nn

# Distances held at once, in elements: 2 MiB in float64 stay in a CPU's cache, a GPU wants larger blocks.
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
SMALLEST_NORM = 1e-8  # an encoding shorter than this is similar to none (as torch's cosine_similarity)
# Smaller logits count as this: beside the largest they are nothing, and below e^-87 float32 turns denormal, ten times as slow.
SMALLEST_LOGIT = -80.0
SMALLEST_SUM = 1e-17  # e^-39: sums of exponentials that are smaller are formed relative to the largest of their terms
FLOAT32_SPREAD = 2.0**10  # squared length of centred encodings up to which float32 gives their distances within 1e-3


class WholeBatch:
    """The share of a batch of `total` pairs that is all of it. A loss may be given a smaller one, and is then its pairs' part of
    the mean over all: the parts, and their gradients, add up.

    first: number of the share's first pair in the batch; gather: makes (total, D) rows of all pairs, with their gradients, of
    the share's own.
    """

    def __init__(self, total):
        self.total, self.first = total, 0

    def gather(self, rows):
        """The rows themselves."""
        return rows


def textbook_multimodal_loss(h_x, h_t, negatives_x=None, negatives_t=None, p=2.0, tau=1.0):
    """Eq. 2 of the paper as it is estimated, with the B × M × D tensor of differences; arguments as below, unchecked.

    ℓ(a, p; n) = mean_i [ d(a_i, p_i) + log( (exp(−d(a_i, p_i)) + Σ_j exp(−d(a_i, n_j))) / (M + 1) ) ]
    L = ½ [ ℓ(h_x, h_t; negatives_x) + ℓ(h_t, h_x; negatives_t) ],      d(u, v) = Σ_k |u_k − v_k|^p / τ
    """

    def one_way(anchors, positives, negatives):
        in_batch = negatives is None  # an anchor's negatives are the others
        positive = (anchors - positives).abs().pow(p).sum(dim=1) / tau
        negative = (anchors[:, None] - (anchors if in_batch else negatives)).abs().pow(p).sum(dim=2) / tau
        if in_batch:
            negative.fill_diagonal_(math.inf)
        candidates = torch.cat((positive[:, None], negative), dim=1)
        return (positive + (-candidates).logsumexp(dim=1)).mean() - math.log(negative.shape[1] + (not in_batch))

    return (one_way(h_x, h_t, negatives_x) + one_way(h_t, h_x, negatives_t)) / 2


def textbook_image_text_loss(h_x, h_t, tau=1.0, negatives="both"):
    """Cross-entropy of all 2B encodings against their partners, by a 2B × 2B × D product; arguments as below, unchecked.

    negatives "cross" is Eq. 1 of the paper, "both" the loss of its runs (Chen et al., 2020).
    """
    h, pairs = torch.cat((h_x, h_t)), len(h_x)
    similarities = nn.functional.cosine_similarity(h[:, None], h[None], dim=2) / tau
    modality = torch.arange(2 * pairs, device=h.device) // pairs
    excluded = torch.eye(2 * pairs, dtype=torch.bool, device=h.device)
    if negatives == "cross":
        excluded = modality[:, None] == modality
    partner = torch.arange(2 * pairs, device=h.device).roll(pairs)
    return nn.functional.cross_entropy(similarities.masked_fill(excluded, -math.inf), partner)


def textbook_sigmoid_loss(h_x, h_t, scale, bias, similarity="distance"):
    """The sigmoid loss of Zhai et al. (2023), by the B × B × D tensor of differences; arguments as below, unchecked.

    L = −(1/B) Σ_ij log σ( z_ij (scale · s_ij + bias) ),   z_ij = 1 for i = j, else −1,   s_ij = −‖h_x,i − h_t,j‖² or their cosine
    """
    if similarity == "distance":
        similarities = -(h_x[:, None] - h_t[None]).square().sum(dim=2)
    else:
        similarities = nn.functional.cosine_similarity(h_x[:, None], h_t[None], dim=2)
    signs = 2 * torch.eye(len(h_x), dtype=h_x.dtype, device=h_x.device) - 1
    return -nn.functional.logsigmoid(signs * (scale * similarities + bias)).sum() / len(h_x)


# The same, in blocks


def _check_pairs(h_x, h_t):
    if h_x.ndim != 2 or h_x.shape != h_t.shape:
        raise ValueError(f"h_x {tuple(h_x.shape)} and h_t {tuple(h_t.shape)} must have one shape (B, D)")


def _comparable(*encodings):
    """Half-precision encodings in float32, in which they are compared, whatever precision produced them."""
    return [h if h.dtype == torch.float64 else h.float() for h in encodings]


def multimodal_contrastive_loss(h_x, h_t, negatives_x=None, negatives_t=None, p=2.0, tau=1.0, share=None):
    """`textbook_multimodal_loss`, a scalar tensor.

    h_x, h_t: (B, D) float encodings of B pairs. negatives_x, negatives_t: (M, D) encodings of independent draws of the
    anchor's own modality; left out, an anchor's negatives are the M = B − 1 other anchors of the batch. The B × M
    distances are formed in blocks of rows and never kept: a block yields its part of the gradients in the same pass.
    share: of a larger batch, as `WholeBatch` has it, of which these are the pairs, and the negatives as many rows of another.
    Raises ValueError for shapes that do not fit and for p < 1.
    """
    _check_pairs(h_x, h_t)
    if p < 1:
        raise ValueError(f"the exponent p is {p}; it must be at least 1")
    if (negatives_x is None) != (negatives_t is None):
        raise ValueError("negatives_x and negatives_t: give both or neither")
    in_batch, share = negatives_x is None, share or WholeBatch(len(h_x))
    if in_batch and share.total < 2:
        raise ValueError("negatives from the batch need at least two pairs")
    if not in_batch:
        for name, negatives in (("negatives_x", negatives_x), ("negatives_t", negatives_t)):
            if negatives.ndim != 2 or negatives.shape[1] != h_x.shape[1] or not len(negatives):
                raise ValueError(f"{name} {tuple(negatives.shape)} must be (M, {h_x.shape[1]}), M > 0")
    if in_batch:
        negatives_x, negatives_t = h_x, h_t
    h_x, h_t, negatives_x, negatives_t = _comparable(h_x, h_t, negatives_x, negatives_t)
    with torch.autocast(h_x.device.type, enabled=False):
        negatives_x, negatives_t = share.gather(negatives_x), share.gather(negatives_t)
        themselves = share.first if in_batch else None
        loss_x = _AnchorLoss.apply(h_x, h_t, negatives_x, p, tau, share.total, themselves)
        loss_t = _AnchorLoss.apply(h_t, h_x, negatives_t, p, tau, share.total, themselves)
    return (loss_x + loss_t) / 2


def image_text_contrastive_loss(h_x, h_t, tau=1.0, negatives="both", share=None):
    """Contrastive loss of image and text encodings by cosine similarity; a scalar tensor.

    Each of the 2B encodings is classified as its partner of the other modality, by the cross-entropy of the similarities
    over τ. negatives "both": among the 2B − 1 other encodings of both modalities (Chen et al., 2020, as the paper's runs
    have it); "cross": among the B of the other modality, Eq. 1 of the paper. Either matrix of similarities is symmetric in
    the modalities, so it is computed once. h_x, h_t: (B, D) float encodings of B pairs. share: of a larger batch, as
    `WholeBatch` has it, of which these are the pairs. Raises ValueError for shapes that do not fit.
    """
    _check_pairs(h_x, h_t)
    if negatives not in ("both", "cross"):
        raise ValueError(f"negatives {negatives!r} are none of: both, cross")
    h_x, h_t = _comparable(h_x, h_t)
    return _CosineLoss.apply(h_x, h_t, tau, negatives, share or WholeBatch(len(h_x)))


class LearnedLogits(nn.Module):
    """Scale and bias by which the sigmoid loss makes logits of similarities, both learned; the scale by its logarithm.

    For cosines they begin at 10 and −10, as in Zhai et al. (2023), for distances at 1 and −log B, B being the `pairs` of a batch:
    one in B combinations is a pair. With 0 the others drive all encodings onto a line first, where they stay.
    """

    def __init__(self, similarity, pairs):
        super().__init__()
        scale, bias = {"distance": (1.0, -math.log(pairs)), "cosine": (10.0, -10.0)}[similarity]
        self.similarity = similarity
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, h_x, h_t, share=None):
        """`sigmoid_contrastive_loss` of the encodings, a scalar tensor."""
        return sigmoid_contrastive_loss(h_x, h_t, self.log_scale.exp(), self.bias, self.similarity, share)


def sigmoid_contrastive_loss(h_x, h_t, scale, bias, similarity="distance", share=None):
    """`textbook_sigmoid_loss`, a scalar tensor: each of the B × B combinations is told to be a pair or not, by itself.

    h_x, h_t: (B, D) float encodings of B pairs. scale, bias: 0-d tensors. similarity: "distance", the negative squared one, or
    "cosine". share: of a larger batch, as `WholeBatch` has it, of which these are the pairs. Raises ValueError for shapes that
    do not fit and for another similarity.
    """
    _check_pairs(h_x, h_t)
    if similarity not in ("distance", "cosine"):
        raise ValueError(f"the similarity {similarity!r} is none of: distance, cosine")
    share = share or WholeBatch(len(h_x))
    h_x, h_t = _comparable(h_x, h_t)
    with torch.autocast(h_x.device.type, enabled=False):
        h_t = share.gather(h_t)
        left, right = h_x.double(), h_t.double()
        if similarity == "cosine":
            left, right = (h / h.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM) for h in (left, right))
        else:  # the product errs by 1e-16 of the encodings' squared lengths, about a centre that moves nothing
            centre = right.detach().mean(dim=0)
            left, right = _augmented(left - centre, right - centre, 1.0)
        return _SigmoidLoss.apply(left, right, scale, bias, share.total, share.first).to(h_x.dtype)


class LabelLoss(nn.Module):
    """What a linear map of encodings has to tell of the factors themselves, in place of a contrastive loss; the map is learned.

    The sum over factors of the cross-entropy of a soft-max where they are classes, and of the squared error in units of the
    variance where they are numbers.
    """

    def __init__(self, encoding_size, factors):
        """Maps, all 0 at first, for factors, a dict name → (N,) values: int64 classes 0, 1, …, or floats."""
        super().__init__()
        self.classes = {name: int(values.max()) + 1 for name, values in factors.items() if not values.is_floating_point()}
        self.heads = nn.ModuleDict({name: nn.Linear(encoding_size, self.classes.get(name, 1)) for name in factors})
        moments = {name: (values.double().mean().item(), values.double().std(correction=0).item()) for name, values in
                   factors.items() if name not in self.classes}  # fmt: skip
        self.moments = {name: (mean, deviation or 1.0) for name, (mean, deviation) in moments.items()}
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, h, labels, total):
        """The loss, a scalar tensor, of (B, D) encodings, of a batch of `total`; labels: dict name → their (B,) values."""
        h, loss = h.float(), 0.0
        for name, head in self.heads.items():
            if name in self.classes:
                loss = loss + nn.functional.cross_entropy(head(h), labels[name], reduction="sum")
            else:
                mean, deviation = self.moments[name]
                loss = loss + (head(h)[:, 0] - (labels[name] - mean) / deviation).square().sum()
        return loss / total


class _SigmoidLoss(torch.autograd.Function):
    """Σ −log σ / `total` over the rows of `left` (B, K) and those of `right` (M, K), whose products are the similarities.

    The pair of row i is column `first` + i. A block of rows yields its part of the gradients in the same pass.
    """

    @staticmethod
    def forward(ctx, left, right, scale, bias, total, first):
        block_rows = max(1, BLOCK_ELEMENTS[left.device.type] // len(right))
        loss, grad_scale, grad_bias = (torch.zeros((), dtype=left.dtype, device=left.device) for _ in range(3))
        grad_left, grad_right = torch.empty_like(left), torch.zeros_like(right)
        for start in range(0, len(left), block_rows):
            block = slice(start, start + block_rows)
            similarities = left[block] @ right.T
            signed = scale * similarities + bias  # −z · logit; the slope of −log σ(z · logit) is its sigmoid
            signed.diagonal(offset=first + start).neg_()
            loss -= nn.functional.logsigmoid(-signed).sum()
            slope = signed.sigmoid_()
            slope.diagonal(offset=first + start).neg_()
            grad_left[block] = slope @ right
            grad_right.addmm_(slope.T, left[block])
            grad_scale += (slope * similarities).sum()
            grad_bias += slope.sum()
        ctx.save_for_backward(*(g / total for g in (scale * grad_left, scale * grad_right, grad_scale, grad_bias)))
        ctx.dtypes = scale.dtype, bias.dtype
        return loss / total

    @staticmethod
    def backward(ctx, grad_output):
        grad_left, grad_right, grad_scale, grad_bias = (grad_output * gradient for gradient in ctx.saved_tensors)
        return grad_left, grad_right, grad_scale.to(ctx.dtypes[0]), grad_bias.to(ctx.dtypes[1]), None, None


class _CosineLoss(torch.autograd.Function):
    """The loss with its gradients, which are formed at once: backward knows no precision but that of the encoders."""

    @staticmethod
    def forward(ctx, h_x, h_t, tau, negatives, share):
        with torch.enable_grad(), torch.autocast(h_x.device.type, enabled=False):
            h_x, h_t = (h.detach().requires_grad_() for h in (h_x, h_t))
            loss = _cosine_loss(h_x, h_t, tau, negatives, share)
            ctx.save_for_backward(*torch.autograd.grad(loss, (h_x, h_t)))
        return loss.detach()

    @staticmethod
    def backward(ctx, grad_output):
        return *(grad_output * gradient for gradient in ctx.saved_tensors), None, None, None


def _cosine_loss(h_x, h_t, tau, negatives, share):
    own_x, own_t = (h / h.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM) for h in (h_x, h_t))
    pairs, total, first = len(own_x), share.total, share.first
    unit_x, unit_t = share.gather(own_x), share.gather(own_t)
    if negatives == "cross":
        from_x = own_x @ unit_t.T / tau
        sums_x = from_x.logsumexp(dim=1)
        # of the whole batch, the similarities from t are the columns of the same matrix
        sums_t = from_x.logsumexp(dim=0) if pairs == total else (own_t @ unit_x.T / tau).logsumexp(dim=1)
        return ((sums_x + sums_t) / 2 - from_x.diagonal(offset=first)).sum() / total
    similarities = torch.cat((own_x, own_t)) @ torch.cat((unit_x, unit_t)).T / tau
    itself = torch.zeros_like(similarities, dtype=torch.bool)
    itself[:pairs].diagonal(offset=first).fill_(True)
    itself[pairs:].diagonal(offset=total + first).fill_(True)
    log_sums = similarities.masked_fill(itself, -math.inf).logsumexp(dim=1)
    return log_sums.sum() / (2 * total) - similarities[:pairs].diagonal(offset=total + first).sum() / total


class _AnchorLoss(torch.autograd.Function):
    """ℓ(a, p; n), or the anchors' part of it where the batch has a `total` of more; `themselves`: which negative is the first
    anchor itself, None for none. Its gradients are formed with it.
    """

    @staticmethod
    def forward(ctx, anchors, positives, negatives, p, tau, total, themselves):
        found = None
        if p == 2 and themselves is not None and len(anchors) == len(negatives) and anchors.device.type == "cpu":
            found = _loss_among_themselves(anchors, positives, tau)
        loss, *gradients = found or _loss_among_others(anchors, positives, negatives, p, tau, total, themselves)
        ctx.save_for_backward(*gradients)
        return loss.to(anchors.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        gradients = (gradient if gradient is None else grad_output * gradient for gradient in ctx.saved_tensors)
        return *gradients, None, None, None, None


def _loss_among_themselves(anchors, positives, tau):
    """Loss and gradients where the anchors are each other's negatives, by squared distances; None where these are too large.

    exp(−d) is symmetric: one product of its rows gives the gradients of an anchor and of a negative, and half the passes do.
    """
    total, size = anchors.shape
    difference = anchors.double() - positives.double()
    positive_distance = difference.square().sum(dim=1, keepdim=True) / tau
    a = anchors.double() - anchors.double().mean(dim=0)
    with_ones = torch.cat((a, torch.ones_like(a[:, :1])), dim=1).to(anchors.dtype)
    if a.square().sum(dim=1).max() <= FLOAT32_SPREAD * tau:
        a = a.to(anchors.dtype)
    left, right = _augmented(a, a, tau)
    sums, weight_sums = with_ones.new_zeros(2 * size + 2, total), torch.empty_like(positive_distance)
    block_rows = max(1, BLOCK_ELEMENTS["cpu"] // total)
    for start in range(0, total, block_rows):
        block = slice(start, start + block_rows)
        weights = (left[block] @ right.T).to(anchors.dtype).clamp_min_(SMALLEST_LOGIT).exp_()
        weights.diagonal(offset=start).zero_()
        weight_sums[block] = weights.sum(dim=1, keepdim=True) + (-positive_distance[block]).exp()
        # Σ_i w_ij (a_i, 1), and the same with the soft-max weights of row i
        rows = torch.cat((with_ones[block], with_ones[block] / weight_sums[block].to(anchors.dtype)), dim=1)
        sums.addmm_(rows.T, weights)
    if weight_sums.min() < SMALLEST_SUM:
        return None
    as_anchor, as_negative = sums.T.split(size + 1, dim=1)
    pull = as_anchor / weight_sums.to(anchors.dtype) + as_negative
    grad_positive = ((1 - (-positive_distance).exp() / weight_sums) * (2 / tau) * difference).to(anchors.dtype)
    grad_anchors = grad_positive + (2 / tau) * (pull[:, :-1] - pull[:, -1:] * with_ones[:, :-1])
    loss = (positive_distance + weight_sums.log()).mean() - math.log(total)
    return loss, grad_anchors / total, -grad_positive / total, None


def _loss_among_others(anchors, positives, negatives, p, tau, total, themselves):
    """Loss and gradients of any exponent, negatives and share. A block of rows holds all their negatives, so its soft-max
    weights, and with them the gradients, are final.
    """
    rows, columns = len(anchors), len(negatives)
    difference = anchors.double() - positives.double()
    positive_distance = difference.abs().pow(p).sum(dim=1, keepdim=True) / tau
    centre = negatives.double().mean(dim=0)
    a, n = anchors.double() - centre, negatives.double() - centre
    block_rows = max(1, BLOCK_ELEMENTS[anchors.device.type] // columns)
    if p == 2:
        form = anchors.device.type if anchors.dtype == torch.float32 else "cpu"
        negative_logits, gradients = SQUARED_DISTANCE_LOGITS[form], _squared_distance_gradients
    else:
        negative_logits, gradients = _power_distance_logits, _power_distance_gradients
        block_rows = max(1, block_rows // a.shape[1])
    log_sums, positive_weights, grad_a, grad_n = [], [], [], torch.zeros_like(negatives)
    for start in range(0, rows, block_rows):
        block = slice(start, start + block_rows)
        logits = negative_logits(a[block], n, p, tau)
        if themselves is not None:  # a diagonal of the block
            logits.diagonal(offset=themselves + start).fill_(-math.inf)
        # soft-max over the negatives and the positive; divided by their sum only once they have become (rows, D)
        positive_logit = -positive_distance[block]
        largest = torch.maximum(logits.amax(dim=1, keepdim=True), positive_logit)
        weights = logits.sub_(largest).to(anchors.dtype).clamp_min_(SMALLEST_LOGIT).exp_()
        positive = torch.exp(positive_logit - largest)
        weight_sum = weights.sum(dim=1, keepdim=True).double() + positive
        log_sums.append(largest + weight_sum.log())
        positive_weights.append(positive / weight_sum)
        block_grad_a, block_grad_n = gradients(weights, weight_sum.to(weights.dtype), a[block], n, p, tau)
        grad_a.append(block_grad_a)
        grad_n += block_grad_n
    # ∂/∂d of d + logsumexp(−d, …) is 1 − (soft-max weight of the positive)
    slope = p / tau * difference.abs().pow(p - 1) * difference.sign()
    grad_positive = ((1 - torch.cat(positive_weights)) * slope).to(anchors.dtype)
    grad_anchors = torch.cat(grad_a) + grad_positive
    candidates = columns + (themselves is None)
    loss = positive_distance.sum() / total + torch.cat(log_sums).sum() / total - rows / total * math.log(candidates)
    return loss, grad_anchors / total, -grad_positive / total, grad_n / total


def _squared_distance_logits(a, n, p, tau):
    """−‖a − n‖²/τ as one product of augmented float64 matrices: exact however far apart the encodings lie."""
    left, right = _augmented(a, n, tau)
    return left @ right.T


def _augmented(a, n, tau):
    """(B, D + 2) and (M, D + 2), the product of whose rows is −‖a − n‖²/τ."""
    left = torch.cat((2 * a, a.square().sum(dim=1, keepdim=True), torch.ones_like(a[:, :1])), dim=1) / tau
    right = torch.cat((n, -torch.ones_like(n[:, :1]), -n.square().sum(dim=1, keepdim=True)), dim=1)
    return left, right


def _squared_distance_logits_by_differences(a, n, p, tau):
    """The same without float64's products, which most GPUs compute at a 64th of the rate: float32 of exact differences.

    A rounded difference errs by 6e-8 of itself, so that near negatives, which alone count, have small errors; a float32
    product of far encodings would err by more than their distances.
    """
    logits = torch.zeros(len(a), len(n), device=a.device)
    difference = torch.empty_like(logits)
    for k in range(a.shape[1]):
        torch.sub(a[:, k, None], n[None, :, k], out=difference)
        logits.addcmul_(difference, difference, value=-1 / tau)
    return logits


SQUARED_DISTANCE_LOGITS = {"cpu": _squared_distance_logits, "cuda": _squared_distance_logits_by_differences}


def _squared_distance_gradients(weights, total, a, n, p, tau):
    """Σ_j w_ij (n_j − a_i) and Σ_i w_ij (a_i − n_j) times 2/τ: the sums of the weights come along as a column of ones."""
    a, n = a.to(weights.dtype), n.to(weights.dtype)
    weighted_n = weights @ torch.cat((n, torch.ones_like(n[:, :1])), dim=1) / total
    weighted_a = (torch.cat((a, torch.ones_like(a[:, :1])), dim=1) / total).T @ weights
    grad_a = (weighted_n[:, :-1] - weighted_n[:, -1:] * a) * (2 / tau)
    grad_n = (weighted_a[:-1].T - weighted_a[-1:].T * n) * (2 / tau)
    return grad_a, grad_n


def _power_distance_logits(a, n, p, tau):
    """−Σ_k |a_k − n_k|^p / τ for any p ≥ 1, by the differences themselves."""
    return (a.unsqueeze(1) - n.unsqueeze(0)).abs_().pow_(p).sum(dim=2).div_(-tau)


def _power_distance_gradients(weights, total, a, n, p, tau):
    """Gradients of `_power_distance_logits` under the soft-max's weights."""
    difference = (a.unsqueeze(1) - n.unsqueeze(0)).to(weights.dtype)
    slope = difference.abs().pow_(p - 1).mul_(difference.sign_()).mul_((weights / total).unsqueeze(2)).mul_(-p / tau)
    return slope.sum(dim=1), -slope.sum(dim=0)
