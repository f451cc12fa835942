"""What encodings of dependent semantics hold, direction by direction: of the unbiased block, and beyond it.

    python benchmarks/block_directions.py models/numeric-fast/dep_perturb_3_seed*

For each finished numeric model: the principal directions of the block's covariance Σ_BB, from the least variance on, and what is
left of every other semantic when the block is known, s_j − Σ_jB Σ_BB⁻¹ s_B; the variance of each, and the R² of its linear
regression on the image and on the text encoding. If an encoding holds the block and nothing else, they are 1 and 0.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import probes
from latent_spaces import seeded_generator
from main_numeric import NumericExperiment
from running.command_line import Parser, integer, run_script
from running.directory import trained_args

SAMPLES = 20_000  # to fit, and as many to test


@torch.no_grad()
def directions(experiment, generator):
    """DataFrame of the directions: what, variance, image, text."""
    block, covariance = list(experiment.latents.unbiased), experiment.latents.covariances["s"]
    others = [i for i in range(len(covariance)) if i not in block]
    inner, across = covariance[np.ix_(block, block)], covariance[np.ix_(block, others)]
    variances, axes = np.linalg.eigh(inner)
    told = np.linalg.solve(inner, across)
    left = np.diag(covariance)[others] - (across * told).sum(axis=0)
    parts = []
    for _ in range(2):
        z, h_x, h_t = experiment.sample(SAMPLES, generator)
        s = z.s.double()
        along = {f"direction {k + 1} of the block": s[:, block] @ torch.from_numpy(axes[:, k]) for k in range(len(block))}
        beyond = s[:, others] - s[:, block] @ torch.from_numpy(told)
        parts.append((h_x, h_t, along | {f"s_{j} beyond the block": beyond[:, k] for k, j in enumerate(others)}))
    (*fit_h, fit), (*test_h, test) = parts
    scores = [probes.linear_r2(own, fit, own_test, test) for own, own_test in zip(fit_h, test_h, strict=True)]
    rows = zip(fit, [*variances, *left], scores[0].values(), scores[1].values(), strict=True)
    return pd.DataFrame(rows, columns=["what", "variance", "image", "text"])


def main():
    """Print the table of each model."""
    parser = Parser(__doc__)
    parser.add_argument("models", nargs="+", type=Path, help="model directories")
    parser.add_argument("--seed", type=integer(0), default=0, help="of the samples (%(default)s)")
    flags = parser.parse_args()
    for directory in flags.models:
        args, _ = trained_args(directory, NumericExperiment)
        args.precision = "fp32"
        experiment = NumericExperiment(args, torch.device("cpu"))
        experiment.load(directory)
        table = directions(experiment, seeded_generator(flags.seed, "evaluate"))
        print(directory, table.round(3).to_string(index=False), sep="\n")


if __name__ == "__main__":
    run_script(main)
