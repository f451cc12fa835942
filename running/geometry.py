"""Where the encodings of a model's images and texts lie: the modality gap, alignment, uniformity, and retrieval."""

import torch

PAIRS = 4096  # of which distances are formed, at most: the first ones


def geometry(h_x, h_t, similarity):
    """Dict of six numbers about (N, D) encodings of the same N pairs, N ≥ 2, in the metric of the loss; computed in float64.

    similarity "cosine": of encodings of length 1. "distance": of encodings about their common centre in units of their root mean
    square distance from it, as no loss by distances knows another scale than its own.

        modality_gap        distance of the two modalities' centres (Liang et al., 2022)
        alignment           mean squared distance of the two encodings of a pair (Wang & Isola, 2020)
        uniformity_x, _t    log of the mean of exp(−2 d²) over pairs of different samples of one modality (the same)
        recall_x, recall_t  share of images whose nearest text is their own, and of texts whose nearest image is, among N

    Raises ValueError for shapes that do not fit and for another similarity.
    """
    if h_x.ndim != 2 or h_x.shape != h_t.shape or len(h_x) < 2:
        raise ValueError(f"h_x {tuple(h_x.shape)} and h_t {tuple(h_t.shape)} must have one shape (N, D), N > 1")
    h_x, h_t = h_x[:PAIRS].double(), h_t[:PAIRS].double()
    if similarity == "cosine":
        h_x, h_t = torch.nn.functional.normalize(h_x, dim=1), torch.nn.functional.normalize(h_t, dim=1)
    elif similarity == "distance":
        both = torch.cat((h_x, h_t))
        scale = (both - both.mean(dim=0)).square().sum(dim=1).mean().sqrt().clamp_min(torch.finfo(both.dtype).tiny)
        h_x, h_t = ((h - both.mean(dim=0)) / scale for h in (h_x, h_t))
    else:
        raise ValueError(f"the similarity {similarity!r} is none of: distance, cosine")
    across = torch.cdist(h_x, h_t)
    return {
        "modality_gap": (h_x.mean(dim=0) - h_t.mean(dim=0)).norm().item(),
        "alignment": (h_x - h_t).square().sum(dim=1).mean().item(),
        "uniformity_x": _uniformity(h_x),
        "uniformity_t": _uniformity(h_t),
        "recall_x": _recall(across),
        "recall_t": _recall(across.T),
    }


def _uniformity(h):
    return torch.pdist(h).square().mul(-2).exp().mean().log().item()


def _recall(distances):
    return (distances.argmin(dim=1) == torch.arange(len(distances), device=distances.device)).double().mean().item()
