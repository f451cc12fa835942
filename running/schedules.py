"""What changes while a run goes on, each a function of the share of the steps that is done, in [0, 1)."""

import math

FIRST_BATCHES_UNTIL = 0.4  # share of the steps with --first-batch-size, as long as the temperature is --first-tau
TAU_LEAVES, TAU_ARRIVES = 0.4, 0.7  # shares of the steps between which τ goes from --first-tau to --tau
SPARE_UNTIL = 0.15  # share of the steps after which --spare-dimensions are cut off

LR_SCHEDULES = {
    "constant": lambda share_done: 1.0,
    # warm up over the first tenth, then a half cosine down to nothing (Smith & Topin, 2018)
    "onecycle": lambda share_done: (
        0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * share_done / 0.1))
        if share_done < 0.1
        else 1e-4 + 0.5 * (1 + math.cos(math.pi * (share_done - 0.1) / 0.9))
    ),
}


def learning_rate(args, share_done):
    """Learning rate of a step: --lr times the factor of --lr-schedule."""
    return args.lr * LR_SCHEDULES[args.lr_schedule](share_done)


def batch_size(args, share_done):
    """Pairs in the batch of a step: --batch-size, growing geometrically to --final-batch-size unless that is 0.

    --first-batch-size, where there is one, takes its place in the first FIRST_BATCHES_UNTIL of the steps.
    """
    first = vars(args).get("first_batch_size", 0)  # of images alone
    if first and share_done < FIRST_BATCHES_UNTIL:
        return first
    growth = (args.final_batch_size or args.batch_size) / args.batch_size
    return round(args.batch_size * growth**share_done)


def smallest_batch(args):
    """Pairs in the smallest batch of a run."""
    sizes = (args.batch_size, args.final_batch_size, vars(args).get("first_batch_size", 0))
    return min(size for size in sizes if size)


def temperature(args, share_done):
    """τ of a step: --first-tau at first, --tau at last, a straight line between TAU_LEAVES and TAU_ARRIVES."""
    if not args.first_tau:
        return args.tau
    way = min(max((share_done - TAU_LEAVES) / (TAU_ARRIVES - TAU_LEAVES), 0.0), 1.0)
    return args.first_tau + way * (args.tau - args.first_tau)


def visible_dimensions(args, encoding_size, share_done):
    """Dimensions of the encodings that the loss sees: --spare-dimensions more than their size until SPARE_UNTIL.

    In D dimensions the semantics that are found first leave no room for one that takes both encoders long, such as the shape
    among places and colours, and an encoder that gives it up teaches the other one nothing of it. In more dimensions it is
    found beside the others, and once both have it, it stays when the spare dimensions are cut off.
    """
    return encoding_size + (args.spare_dimensions if share_done < SPARE_UNTIL else 0)
