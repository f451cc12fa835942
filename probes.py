"""Probes of frozen encodings: what linear and nonlinear models can read off them, on held-out samples.

Regression of continuous targets is scored by R², classification of discrete ones by the Matthews correlation: that is what
MCC means here and in the paper's figures, not the mean correlation coefficient of other work on identifiability.

Everything runs on the device of its inputs and agrees with scikit-learn's estimators: LinearRegression and MLPRegressor,
LogisticRegression and MLPClassifier (Pedregosa et al., 2011). Regressors and MLPs of all targets are fitted together. Targets of
regression are dictionaries from a name to (N, k) tensors, or (N,) where k = 1; with k > 1 they are one regression with k outputs,
whose R² are averaged uniformly. Targets of classification are (N,) integer tensors, one class a number. Encodings are (N, D) to
fit and (M, D) to test. ValueError is raised for shapes or names that do not fit and for values that are not finite.
"""

import itertools

import torch
from threadpoolctl import threadpool_limits

from mlp_probes import binary_cross_entropy, cross_entropy, fit_and_predict, squared_error, with_ones

LEARNED, ABSENT = 0.9, 0.1  # the score from which a factor counts as learned, and up to which as absent
FOUND = 0.8  # of Causal3DIdent, where shapes are small: the score from which one counts as found

LOGISTIC_TOLERANCE, LOGISTIC_ITERATIONS = 1e-6, 1000  # of the largest gradient of the mean loss; of L-BFGS


def standardise(fit_h, test_h):
    """Encodings shifted and scaled to mean 0, variance 1 of the fitting set, in float32; constant features are shifted alone."""
    _check_encodings(fit_h, test_h)
    fit_h, test_h = fit_h.double(), test_h.double()
    variance, mean = torch.var_mean(fit_h, dim=0, correction=0)
    # the variance that rounding alone can give a constant
    rounding = len(fit_h) * torch.finfo(torch.float64).eps
    scale = torch.where(variance <= rounding * variance + (rounding * mean).square(), 1.0, variance.sqrt())
    return ((fit_h - mean) / scale).float(), ((test_h - mean) / scale).float()


def r2_by_name(targets, predictions):
    """R² of each prediction, dict name → float, averaged uniformly over the outputs; a GPU is waited for three times in all.

    targets, predictions: dicts name → (N, k) or (N,), N ≥ 2. A constant output counts 1 where it is predicted exactly and 0
    otherwise (as scikit-learn's r2_score). Raises ValueError for values that are not finite.
    """
    _check_finite({f"target {name}": targets[name] for name in predictions})
    _check_finite({f"the prediction of {name}": prediction for name, prediction in predictions.items()})
    pairs = [(columns(targets[name]), columns(prediction)) for name, prediction in predictions.items()]
    scores = [r2_columns(target, prediction).mean() for target, prediction in pairs]
    return dict(zip(predictions, torch.stack(scores).tolist(), strict=True))


def r2_columns(target, prediction):
    """(k,) float64: R² of each output; target, prediction: (N, k)."""
    target, prediction = target.double(), prediction.double()
    residual = (target - prediction).square().sum(dim=0)
    total = (target - target.mean(dim=0)).square().sum(dim=0)
    return torch.where(total == 0, (residual == 0).double(), 1 - residual / total)


def matthews_correlation(target, prediction):
    """Matthews correlation of (N,) integer classes, a float in [−1, 1] (Gorodkin, 2004); 0 where either is constant."""
    # counted on the host: one copy from a GPU, where each count would be waited for
    classes, joint = torch.cat((target, prediction)).cpu().unique(return_inverse=True)
    counts = torch.bincount(joint[: len(target)] * len(classes) + joint[len(target) :], minlength=len(classes) ** 2)
    counts = counts.reshape(len(classes), -1).double()
    true, predicted, total = counts.sum(dim=1), counts.sum(dim=0), counts.sum()
    covariance = counts.trace() * total - true @ predicted
    variances = (total**2 - true @ true) * (total**2 - predicted @ predicted)
    return (covariance / variances.sqrt()).item() if variances > 0 else 0.0


def linear_r2(fit_h, fit_targets, test_h, test_targets):
    """R² of ordinary least squares with intercept on the test set, by target."""
    check_regression(fit_h, fit_targets, test_h, test_targets)
    return r2_by_name(test_targets, linear_predictions(fit_h, fit_targets, test_h))


def linear_predictions(fit_h, fit_targets, test_h):
    """Dict target → (M, k) float64. One pseudo-inverse serves all; collinear features get the solution of least norm."""
    _, predicted = least_squares(fit_h, side_by_side(fit_targets), test_h)
    widths = [columns(target).shape[1] for target in fit_targets.values()]
    return dict(zip(fit_targets, predicted.split(widths, dim=1), strict=True))


def least_squares(fit_h, wanted, test_h):
    """((N, k), (M, k)) float64: for both sets, the affine function of encodings that fits `wanted`, (N, k) float64, best."""
    fit_h, test_h = fit_h.double(), test_h.double()
    centre, mean = fit_h.mean(dim=0), wanted.mean(dim=0)
    coefficients = torch.linalg.pinv(fit_h - centre) @ (wanted - mean)
    return tuple((h - centre) @ coefficients + mean for h in (fit_h, test_h))


def logistic_mcc(fit_h, fit_targets, test_h, test_targets):
    """MCC of multinomial logistic regression of standardised encodings on the test set, by target.

    The minimum of the log-loss plus ‖W‖²/2, as LogisticRegression's with its defaults, in float64. A target with a single class
    to fit scores 0.
    """
    _check_classes(fit_h, fit_targets, test_h, test_targets)
    h, test_h, scores = with_ones(fit_h).double(), with_ones(test_h).double(), {}
    for name, target in fit_targets.items():
        labels, place = target.unique(return_inverse=True)
        # L-BFGS does so little between two gradients that threads of SciPy's BLAS would only wait, on the cores of torch's
        with threadpool_limits(1, user_api="blas"):
            weights = _logistic_weights(h, torch.nn.functional.one_hot(place, len(labels)).to(h.dtype))
        scores[name] = matthews_correlation(test_targets[name], labels[(test_h @ weights.T).argmax(dim=1)])
    return scores


def _logistic_weights(h, truth):
    """(K, D + 1) weights and intercepts of K classes; h: (N, D + 1), the last column 1, truth: (N, K) one-hot, float64."""
    from scipy.optimize import minimize

    features, wanted = h.T.contiguous(), truth.T @ h
    # two classes have one vector of weights w in scikit-learn, and (−w/2, w/2) here: half its square
    penalty = torch.full_like(wanted, 2.0 if len(wanted) == 2 else 1.0)
    penalty[:, -1] = 0

    def loss_and_gradient(flat):
        weights = torch.from_numpy(flat).to(h.device).view_as(wanted)
        logits = weights @ features
        log_sums = logits.logsumexp(dim=0)
        loss = log_sums.sum() - (weights * wanted).sum() + (penalty * weights.square()).sum() / 2
        gradient = logits.sub_(log_sums).exp_() @ h - wanted + penalty * weights
        # one copy from a GPU brings both
        both = torch.cat((loss.reshape(1), gradient.div_(len(h)).flatten())).cpu().numpy()
        return both[0].item() / len(h), both[1:]

    start = torch.zeros(wanted.numel(), dtype=h.dtype).numpy()
    options = {"maxiter": LOGISTIC_ITERATIONS, "gtol": LOGISTIC_TOLERANCE, "ftol": 0}
    solution = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options=options).x
    return torch.from_numpy(solution).to(h.device).view_as(wanted)


def mlp_r2(encodings, fit_targets, test_targets, generator, steps=None, first_rate=None):
    """R² of an MLP on the test set, by (encoding, target).

    encodings: dict name → (fit_h, test_h), standardised; generator: a torch.Generator, of which one number is drawn. One hidden
    layer of 100 ReLU units and scikit-learn's defaults for MLPRegressor but for MAX_EPOCHS, in float32; with `steps`, that many
    instead of its rule to stop, and with `first_rate` by a falling rate (`mlp_probes.fit_and_predict`). Raises ValueError
    where the training diverges.
    """
    for fit_h, test_h in encodings.values():
        check_regression(fit_h, fit_targets, test_h, test_targets)
    truths = {name: (columns(target), squared_error) for name, target in fit_targets.items()}
    outputs = fit_and_predict(encodings, truths, generator, steps, first_rate)
    keys = list(itertools.product(encodings, fit_targets))
    return r2_by_name({key: test_targets[key[1]] for key in keys}, {key: outputs[key].T for key in keys})


def mlp_mcc(encodings, fit_targets, test_targets, generator, steps=None, first_rate=None):
    """MCC of MLPs as `mlp_r2` has them, with MLPClassifier's defaults; a target with a single class to fit scores 0."""
    for fit_h, test_h in encodings.values():
        _check_classes(fit_h, fit_targets, test_h, test_targets)
    labels, truths = {}, {}
    for name, target in fit_targets.items():
        labels[name], place = target.unique(return_inverse=True)
        if len(labels[name]) == 2:  # one output tells two classes apart
            truths[name] = place.unsqueeze(1), binary_cross_entropy
        elif len(labels[name]) > 2:
            truths[name] = torch.nn.functional.one_hot(place, len(labels[name])), cross_entropy
    outputs = fit_and_predict(encodings, truths, generator, steps, first_rate)
    scores = dict.fromkeys(itertools.product(encodings, fit_targets), 0.0)
    for (encoding, target), output in outputs.items():
        place = (output[0] > 0).long() if len(output) == 1 else output.argmax(dim=0)
        scores[encoding, target] = matthews_correlation(test_targets[target], labels[target][place])
    return scores


def columns(target):
    """(N, k) of a target (N, k) or (N,)."""
    return target.reshape(len(target), -1)


def side_by_side(targets):
    """(N, k) float64: the outputs of all targets, in their order."""
    return torch.cat([columns(target).double() for target in targets.values()], dim=1)


def check_regression(fit_h, fit_targets, test_h, test_targets):
    """Dict target → number of outputs; ValueError for shapes or names that do not fit and for values that are not finite."""
    widths = {}
    for name, target, h in _all_targets(fit_h, fit_targets, test_h, test_targets):
        if target.ndim not in (1, 2) or len(target) != len(h) or not target.numel():
            raise ValueError(f"target {name} has the shape {tuple(target.shape)}; expected ({len(h)}, k) as the encoding")
        width = columns(target).shape[1]
        if widths.setdefault(name, width) != width:
            raise ValueError(f"target {name} has {widths[name]} outputs to fit and {width} to test")
    for targets in (fit_targets, test_targets):
        _check_finite({f"target {name}": targets[name] for name in widths})
    return widths


def _check_classes(fit_h, fit_targets, test_h, test_targets):
    for name, target, h in _all_targets(fit_h, fit_targets, test_h, test_targets):
        if target.shape != (len(h),) or target.is_floating_point() or not len(target):
            raise ValueError(f"target {name} is {target.dtype} {tuple(target.shape)}; expected ({len(h)},) integer classes")


def _all_targets(fit_h, fit_targets, test_h, test_targets):
    """List of (name, target, its encoding) of both sets; ValueError for encodings or names that do not fit."""
    _check_encodings(fit_h, test_h)
    if missing := [name for name in fit_targets if name not in test_targets]:
        raise ValueError(f"no test targets for: {', '.join(missing)}")
    sets = (fit_targets, fit_h), (test_targets, test_h)
    return [(name, targets[name], h) for targets, h in sets for name in fit_targets]


def _check_encodings(fit_h, test_h):
    if fit_h.ndim != 2 or test_h.ndim != 2 or fit_h.shape[1] != test_h.shape[1] or not len(fit_h):
        raise ValueError(f"encodings {tuple(fit_h.shape)} and {tuple(test_h.shape)} must have shapes (N, D) and (M, D), N > 0")
    _check_finite({"the fitting encoding": fit_h, "the test encoding": test_h})


def _check_finite(tensors):
    """Raise ValueError that names the first of a dict name → tensor with values that are not finite."""
    finite = torch.stack([values.isfinite().all() for values in tensors.values()]).tolist()
    if not all(finite):
        raise ValueError(f"{list(tensors)[finite.index(False)]} holds values that are not finite")
