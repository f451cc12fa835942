"""The loss of a late step of the fast recipe and its gradients, against the textbook's and against its floor.

    OMP_NUM_THREADS=1 python benchmarks/numeric_loss.py
    python benchmarks/numeric_loss.py --pairs 2000 --dimensions 10 --scale 8

Negatives are the others of the batch. The floor is what no form of the loss can do without on a CPU: two B × B products and B²
exponentials for each modality, in float32, a block at a time as the loss has them. All take turns in one process.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import losses
from running.command_line import Parser, integer, run_script
from running.devices import describe_device, keep_freed_memory


def gradients(loss, h_x, h_t):
    """Value and gradients of a loss of two encodings."""
    leaves = [h.clone().requires_grad_() for h in (h_x, h_t)]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def by_blocks(h_x, h_t):
    """The loss in the form that any negatives need."""
    symmetric, losses._loss_among_themselves = losses._loss_among_themselves, lambda *_: None
    try:
        return losses.multimodal_contrastive_loss(h_x, h_t)
    finally:
        losses._loss_among_themselves = symmetric


def floor(h_x, h_t):
    """The products and exponentials alone."""
    for h in (h_x, h_t):
        left, right = losses._augmented(h, h, 1.0)
        rows, sums = torch.cat((right, right), dim=1), 0.0
        for start in range(0, len(h), block := max(1, losses.BLOCK_ELEMENTS["cpu"] // len(h))):
            weights = (left[start : start + block] @ right.T).clamp_min_(losses.SMALLEST_LOGIT).exp_()  # none is denormal
            sums = sums + rows[start : start + block].T @ weights
    return sums


def main():
    parser = Parser(__doc__)
    parser.add_argument("--pairs", type=integer(1), default=1000, help="of the batch (%(default)s)")
    parser.add_argument("--dimensions", type=integer(1), default=5, help="of the encodings (%(default)s)")
    parser.add_argument("--scale", type=float, default=8.0, help="standard deviation of the encodings (%(default)s)")
    parser.add_argument("--rounds", type=integer(1), default=15, help="(%(default)s)")
    args = parser.parse_args()
    keep_freed_memory()
    draw = torch.Generator().manual_seed(0)
    h_x = args.scale * torch.randn(args.pairs, args.dimensions, generator=draw)
    h_t = h_x + 0.3 * torch.randn(h_x.shape, generator=draw)
    forms = {
        "textbook": lambda: gradients(losses.textbook_multimodal_loss, h_x, h_t),
        "in blocks": lambda: gradients(by_blocks, h_x, h_t),
        "here": lambda: gradients(losses.multimodal_contrastive_loss, h_x, h_t),
        "floor": lambda: floor(h_x, h_t),
    }
    seconds, found = {name: [] for name in forms}, {}
    for _ in range(args.rounds + 1):  # the first is not counted
        for name, form in forms.items():
            started = time.perf_counter()
            found[name] = form()
            seconds[name].append(time.perf_counter() - started)
    print(f"{args.pairs} pairs in {args.dimensions} dimensions, {describe_device(torch.device('cpu'))}, {args.rounds} rounds")
    least = statistics.median(seconds["floor"][1:])
    for name, times in seconds.items():
        median = statistics.median(times[1:])
        spread = f"({min(times[1:]) * 1e3:.1f} to {max(times[1:]) * 1e3:.1f})"
        print(f"{name:10} {median * 1e3:7.1f} ms {spread:20} {median / least:5.2f} times the floor")
    exact = gradients(losses.textbook_multimodal_loss, h_x.double(), h_t.double())
    for name in ("textbook", "in blocks", "here"):
        errors = [((own - other).norm() / other.norm()).item() for own, other in zip(found[name], exact, strict=True)]
        print(f"{name:10} differs from float64 by {max(errors):.1e}")


if __name__ == "__main__":
    run_script(main)
