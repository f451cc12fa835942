"""RBF kernel ridge regression: the nonlinear probe of the numeric experiments where no MLP is asked for.

(K + αI) c = y with K_ij = exp(−γ ‖h_i − h_j‖²). α and γ are chosen as scikit-learn's GridSearchCV(KernelRidge) chooses them.
"""

import math

import torch
from scipy.linalg import lapack

from probes import check_regression, r2_by_name, r2_columns, side_by_side

ALPHAS = (1.0, 0.1, 0.01, 0.001)
GAMMAS = tuple(10.0**exponent for exponent in (-2, -2 / 3, 2 / 3, 2))
FOLDS = 3
DIRECT_SIZE = 4096  # samples up to which there is a factorisation for each α, in float64
CHEBYSHEV_TOLERANCE = 1e-3  # R² measures within less than this of the exact solution
KERNEL_ROWS = 512  # rows of a kernel that are formed at once


def kernel_ridge_r2(fit_h, fit_targets, test_h, test_targets, return_best=False):
    """R² of RBF kernel ridge regression on the test set, by target; with return_best a pair: that, and (α, γ) by target.

    Encodings are standardised, and N ≥ 6. α and γ are chosen for each target by the mean R² over three contiguous folds (the
    first of equals in scikit-learn's order), then fitted on all N samples. A factorisation serves all targets. Up to 4096
    samples there is one in float64 for each α; beyond that, one serves every α too (`_shared_coefficients`), in float32 where
    that is enough (`_precision`). The kernel of 20,480 samples takes 3.4 GB, and its factor takes its place. On a CPU SciPy's
    BLAS has its own number of threads (OPENBLAS_NUM_THREADS). Raises ValueError as the other probes, and for N < 6.
    """
    widths = check_regression(fit_h, fit_targets, test_h, test_targets)
    if len(fit_h) < 2 * FOLDS:
        raise ValueError(f"{len(fit_h)} samples to fit; {FOLDS} folds need at least {2 * FOLDS}")
    best = _chosen_parameters(fit_h.double(), fit_targets, widths)
    fitted = {}
    for gamma in sorted({gamma for _, gamma in best.values()}):
        chosen = {name: target for name, target in fit_targets.items() if best[name][1] == gamma}
        alphas = sorted({best[name][0] for name in chosen})
        solved, column = side_by_side(chosen).unique(dim=1, return_inverse=True)
        predictions = _predictions(fit_h.double(), solved, test_h.double(), gamma, alphas)
        for name, own in zip(chosen, column.split([widths[name] for name in chosen]), strict=True):
            fitted[name] = predictions[alphas.index(best[name][0])][:, own]
    scores = r2_by_name(test_targets, {name: fitted[name] for name in fit_targets})
    return (scores, best) if return_best else scores


def _chosen_parameters(h, fit_targets, widths):
    """Dict target → (α, γ) of the best mean R² over the folds; widths: dict target → number of outputs."""
    targets = side_by_side(fit_targets)
    solved, column = targets.unique(dim=1, return_inverse=True)  # s_inv repeats columns of s_i
    scores = torch.zeros(len(ALPHAS), len(GAMMAS), len(widths), device=h.device)
    # the folds are slices, and the scores stay on the device: nothing here waits for a GPU
    h_folds, solved_folds, target_folds = (rows.tensor_split(FOLDS) for rows in (h, solved, targets))
    for fold, (held_out, truth) in enumerate(zip(h_folds, target_folds, strict=True)):
        fit_h, fit_solved = (torch.cat(rows[:fold] + rows[fold + 1 :]) for rows in (h_folds, solved_folds))
        for g, gamma in enumerate(GAMMAS):
            for a, prediction in enumerate(_predictions(fit_h, fit_solved, held_out, gamma, ALPHAS)):
                r2 = r2_columns(truth, prediction[:, column]).split(list(widths.values()))
                scores[a, g] += torch.stack([outputs.mean() for outputs in r2]) / FOLDS
    grid = [(alpha, gamma) for alpha in ALPHAS for gamma in GAMMAS]
    by_target = zip(fit_targets, scores.flatten(0, 1).T.tolist(), strict=True)
    return {name: grid[own.index(max(own))] for name, own in by_target}


def _predictions(h, targets, test_h, gamma, alphas):
    """List of (M, k) predictions for test_h (M, D), one for each α, fitted on h (n, D) and targets (n, k); all float64."""
    if len(h) <= DIRECT_SIZE:
        coefficients = [_ridge_solver(h, gamma, alpha, torch.float64)(targets) for alpha in alphas]
    else:
        centre = math.sqrt(min(alphas) * max(alphas))
        solve = _ridge_solver(h, gamma, centre, _precision(h, gamma))
        coefficients = _shared_coefficients(solve, targets, centre, alphas)
    coefficients = torch.cat(coefficients, dim=1)
    parts = [_kernel_block(rows, h, gamma, torch.float64) @ coefficients for rows in test_h.split(KERNEL_ROWS)]
    return torch.cat(parts).split(targets.shape[1], dim=1)


def _kernel_block(left, right, gamma, dtype):
    """(rows, columns) of K for float64 encodings; distances in float64, so that K errs by rounding alone."""
    exponent = torch.addmm(-gamma * right.square().sum(dim=1), left, right.T, alpha=2 * gamma)
    exponent.sub_(gamma * left.square().sum(dim=1, keepdim=True)).clamp_(max=0)
    return exponent.to(dtype).exp_()


def _ridge_solver(h, gamma, alpha, dtype):
    """Function targets (n, k) ↦ (K + αI)⁻¹ targets, float64, by Cholesky in that dtype, or float64 if it fails; LinAlgError.

    Either library takes K column by column, and its lower triangle alone: that is the upper one of K row by row, not copied. On
    a GPU the factor is solved with triangle by triangle, since torch's cholesky_solve would copy it.
    """
    kernel = torch.empty(len(h), len(h), dtype=dtype, device=h.device)
    for start in range(0, len(h), KERNEL_ROWS):
        rows = slice(start, start + KERNEL_ROWS)
        kernel[rows, start:] = _kernel_block(h[rows], h[start:], gamma, dtype)
    kernel.diagonal().fill_(1 + alpha)
    if h.is_cuda:
        factor, failed = kernel.T, torch.empty((), dtype=torch.int32, device=h.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        failed = failed.item()
    else:
        # SciPy's LAPACK measures faster than torch's
        potrf, potrs = (lapack.spotrf, lapack.spotrs) if dtype == torch.float32 else (lapack.dpotrf, lapack.dpotrs)
        factor, failed = potrf(kernel.numpy().T, lower=True, clean=False, overwrite_a=True)
    if failed and dtype == torch.float32:
        del kernel, factor
        return _ridge_solver(h, gamma, alpha, torch.float64)
    if failed:
        raise torch.linalg.LinAlgError(f"the kernel with γ = {gamma:g}, α = {alpha:g} is not positive definite")
    if h.is_cuda:
        solve = torch.linalg.solve_triangular
        return lambda targets: solve(factor.T, solve(factor, targets.to(dtype), upper=False), upper=True).double()
    return lambda targets: torch.from_numpy(potrs(factor, targets.to(dtype).numpy(), lower=True)[0]).double()


def _precision(h, gamma):
    """float32 where rounding it disturbs K by less than a hundredth of the smallest α, else float64."""
    # The largest eigenvalue is at most the largest sum of a row of K. Rows evenly spread stand for all of them.
    rows = h[:: math.ceil(len(h) / KERNEL_ROWS)]
    largest = _kernel_block(rows, h, gamma, torch.float64).sum(dim=1).max().item()
    return torch.float32 if largest * torch.finfo(torch.float32).eps / 2 < min(ALPHAS) / 100 else torch.float64


def _shared_coefficients(solve, targets, centre, alphas):
    """(K + αI)⁻¹ targets for every α from one solve(v) = (K + βI)⁻¹ v, β = centre = √(min α · max α): a list of (n, k).

    W = β (K + βI)⁻¹ has its eigenvalues in (0, 1], and K + αI = (K + βI)(I + (r − 1) W) with r = α/β. The Chebyshev
    series of 1 / (1 + (r − 1) w) on [0, 1] is known,

        (1 / √r) [ 1 + 2 Σ_j ρ^j T_j(2w − 1) ],      ρ = (1 − √r) / (1 + √r),

    so one recurrence T_{j+1} = 2 (2W − I) T_j − T_{j−1} serves all α. It ends where the largest |ρ|^j is below
    CHEBYSHEV_TOLERANCE: after 20 terms for all of ALPHAS, at once for a single α.
    """
    roots = [math.sqrt(alpha / centre) for alpha in alphas]
    largest = max(abs(1 - root) / (1 + root) for root in roots)
    terms = math.ceil(math.log(CHEBYSHEV_TOLERANCE) / math.log(largest)) if largest > 1e-9 else 0
    older, newer = None, solve(targets)
    sums = [newer.clone() for _ in roots]
    for term in range(1, terms + 1):
        product = solve(newer).mul_(2 * centre).sub_(newer)  # (2W − I) T
        older, newer = newer, product if older is None else product.mul_(2).sub_(older)
        for total, root in zip(sums, roots, strict=True):
            total.add_(newer, alpha=2 * ((1 - root) / (1 + root)) ** term)
    return [total.div_(root) for total, root in zip(sums, roots, strict=True)]
