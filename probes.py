"""Probes of frozen encodings: what linear and nonlinear models can read off them, on held-out samples.

Regression of continuous targets is scored by R², classification of discrete ones by the Matthews correlation (MCC).

Everything runs on the device of its inputs and agrees with scikit-learn's estimators: LinearRegression, MLPRegressor and
GridSearchCV(KernelRidge), LogisticRegression and MLPClassifier (Pedregosa et al., 2011). Regressors and MLPs of all targets
are fitted together. Targets of regression are dictionaries from a name to (N, k) tensors, or (N,) where k = 1; with
k > 1 they are one regression with k outputs, whose R² are averaged uniformly. Targets of classification are (N,) integer
tensors, one class a number.
"""

import math

import torch
from scipy.linalg import lapack
from threadpoolctl import threadpool_limits

LEARNED, ABSENT = 0.9, 0.1  # the score from which a factor counts as learned, and up to which as absent
FOUND = 0.8  # of Causal3DIdent, where shapes are small: the score from which one counts as found

HIDDEN_UNITS, LEARNING_RATE, BATCH_SIZE, WEIGHT_DECAY, MAX_EPOCHS = 100, 1e-3, 200, 1e-4, 200
TOLERANCE, PATIENCE = 1e-4, 10  # stop once more than PATIENCE epochs running have not improved the loss by TOLERANCE
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8

LOGISTIC_TOLERANCE, LOGISTIC_ITERATIONS = 1e-6, 1000  # of the largest gradient of the mean loss; of L-BFGS

ALPHAS = (1.0, 0.1, 0.01, 0.001)
GAMMAS = tuple(10.0**exponent for exponent in (-2, -2 / 3, 2 / 3, 2))
FOLDS = 3
DIRECT_SIZE = 4096  # samples up to which a CPU factorises for each α in float64; a GPU always does
CHEBYSHEV_TOLERANCE = 1e-3  # R² measures within less than this of the exact solution
KERNEL_ROWS = 512  # rows of a kernel that are formed at once


def standardise(fit_h, test_h):
    """Both encodings shifted and scaled to mean 0, variance 1 of the fitting set: (N, D), (M, D) → the same in float32.

    Features that are constant in the fitting set are shifted alone (as scikit-learn's StandardScaler). Raises
    ValueError for shapes that do not fit and for values that are not finite.
    """
    _check_encodings(fit_h, test_h)
    fit_h, test_h = fit_h.double(), test_h.double()
    variance, mean = torch.var_mean(fit_h, dim=0, correction=0)
    # the variance that rounding alone can give a constant
    rounding = len(fit_h) * torch.finfo(torch.float64).eps
    scale = torch.where(variance <= rounding * variance + (rounding * mean).square(), 1.0, variance.sqrt())
    return ((fit_h - mean) / scale).float(), ((test_h - mean) / scale).float()


def r2_scores(target, prediction):
    """R² averaged uniformly over the outputs, a float that may be negative; target, prediction: (N, k) or (N,), N ≥ 2.

    A constant output counts 1 where it is predicted exactly and 0 otherwise (as scikit-learn's r2_score). Raises
    ValueError for shapes that differ, for fewer than two samples and for values that are not finite.
    """
    if target.shape != prediction.shape or target.ndim not in (1, 2) or len(target) < 2:
        raise ValueError(
            f"target {tuple(target.shape)} and prediction {tuple(prediction.shape)} must have one shape (N, k), N ≥ 2"
        )
    _check_finite("target", target)
    _check_finite("prediction", prediction)
    return _r2_columns(_columns(target), _columns(prediction)).mean().item()


def matthews_correlation(target, prediction):
    """Matthews correlation of (N,) integer classes, a float in [−1, 1] (Gorodkin, 2004); 0 where either is constant."""
    classes, joint = torch.cat((target, prediction)).unique(return_inverse=True)
    counts = torch.bincount(joint[: len(target)] * len(classes) + joint[len(target) :], minlength=len(classes) ** 2)
    counts = counts.reshape(len(classes), -1).double()
    true, predicted, total = counts.sum(dim=1), counts.sum(dim=0), counts.sum()
    covariance = counts.trace() * total - true @ predicted
    variances = (total**2 - true @ true) * (total**2 - predicted @ predicted)
    return (covariance / variances.sqrt()).item() if variances > 0 else 0.0


def fit_linear(fit_h, fit_targets, test_h):
    """Predictions of ordinary least squares with intercept: a dictionary of (M, k) float64 tensors by target.

    fit_h: (N, D) and test_h: (M, D) encodings, fit_targets: (N, k) each. One pseudo-inverse serves all targets;
    collinear features get the solution of least norm. Raises ValueError for shapes that do not fit and for values
    that are not finite.
    """
    _check_encodings(fit_h, test_h)
    widths = _check_targets(fit_targets, fit_h)
    h, targets = fit_h.double(), _stack(fit_targets)
    h_mean, target_mean = h.mean(dim=0), targets.mean(dim=0)
    coefficients = torch.linalg.pinv(h - h_mean) @ (targets - target_mean)
    prediction = (test_h.double() - h_mean) @ coefficients + target_mean
    return dict(zip(fit_targets, prediction.split(widths, dim=1), strict=True))


def linear_r2(fit_h, fit_targets, test_h, test_targets):
    """R² of ordinary least squares on the test set, by target (spec: probe a).

    fit_h: (N, D), test_h: (M, D); fit_targets, test_targets: (N, k), (M, k) under the same names. Raises ValueError
    for shapes or names that do not fit and for values that are not finite.
    """
    _check_test_targets(fit_targets, test_targets, test_h)
    predictions = fit_linear(fit_h, fit_targets, test_h)
    return {name: r2_scores(_columns(test_targets[name]), predictions[name]) for name in fit_targets}


def mlp_r2(encodings, fit_targets, test_targets, generator, steps=None):
    """R² of the MLP probe on the test set, by (encoding, target) (spec: probe b, `--mlp-eval`).

    encodings: a dictionary from a name to (fit_h (N, D), test_h (M, D)), standardised; fit_targets, test_targets:
    (N, k), (M, k) under the same names; generator: a torch.Generator, of which one number is drawn. One hidden layer of
    100 ReLU units and scikit-learn's defaults for MLPRegressor, in float32; with `steps`, that many steps instead of its
    rule to stop. All networks of one shape train as one batch, and a network leaves it when its own training loss stops
    improving. They share their initial weights and the order of the minibatches, so other targets change the R² of a target by
    rounding alone. Raises ValueError for shapes or names that do not fit, for values that are not finite and
    where the training diverges.
    """
    groups = {}
    for encoding, (fit_h, test_h) in encodings.items():
        _check_encodings(fit_h, test_h)
        widths = _check_targets(fit_targets, fit_h)
        _check_test_targets(fit_targets, test_targets, test_h)
        for target, width in zip(fit_targets, widths, strict=True):
            groups.setdefault((fit_h.shape[1], width), []).append((encoding, target))
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    scores = {}
    for (size, _), members in groups.items():
        fit_inputs, test_inputs, source = _stacked_inputs(encodings, size, members)
        stacked = torch.stack([_columns(fit_targets[target]).float() for _, target in members], dim=1)
        rng = torch.Generator().manual_seed(seed)
        networks, _ = _train_networks(fit_inputs, source, stacked, _squared_error, rng, steps)
        outputs = _network_outputs(networks, test_inputs, source, stacked.shape[2])
        for (encoding, target), output in zip(members, outputs, strict=True):
            scores[encoding, target] = r2_scores(_columns(test_targets[target]), output.T)
    return {(encoding, target): scores[encoding, target] for encoding in encodings for target in fit_targets}


def logistic_mcc(fit_h, fit_targets, test_h, test_targets):
    """MCC of multinomial logistic regression on the test set, by target.

    fit_h: (N, D), test_h: (M, D), standardised; fit_targets, test_targets: (N,), (M,) integers under the same names. The
    minimum of the log-loss plus ‖W‖²/2, as LogisticRegression's with its defaults, in float64. A target with a single class
    to fit scores 0. Raises ValueError for shapes or names that do not fit and for values that are not finite.
    """
    _check_encodings(fit_h, test_h)
    _check_classes(fit_targets, test_targets, fit_h, test_h)
    h, test_h, scores = _with_ones(fit_h).double(), _with_ones(test_h).double(), {}
    for name, target in fit_targets.items():
        labels, place = target.unique(return_inverse=True)
        # L-BFGS does so little between two gradients that threads of SciPy's BLAS would only wait, on the cores of torch's
        with threadpool_limits(1, user_api="blas"):
            weights = _logistic_weights(h, torch.nn.functional.one_hot(place, len(labels)).to(h.dtype))
        scores[name] = matthews_correlation(test_targets[name], labels[(test_h @ weights.T).argmax(dim=1)])
    return scores


def mlp_mcc(encodings, fit_targets, test_targets, generator, steps=None):
    """MCC of an MLP classifier on the test set, by (encoding, target).

    encodings: a dictionary from a name to (fit_h (N, D), test_h (M, D)), standardised; fit_targets, test_targets: (N,),
    (M,) integers under the same names; generator: a torch.Generator, of which one number is drawn. One hidden layer of 100
    ReLU units and scikit-learn's defaults for MLPClassifier, in float32; with `steps`, that many steps instead of its rule
    to stop. As in `mlp_r2`, all networks of one shape train as one batch, whatever the encoding. A target with a single
    class to fit scores 0. Raises ValueError for shapes or names that do not fit, for values that are not finite and where
    the training diverges.
    """
    groups, classes, scores = {}, {name: target.unique() for name, target in fit_targets.items()}, {}
    for encoding, (fit_h, test_h) in encodings.items():
        _check_encodings(fit_h, test_h)
        _check_classes(fit_targets, test_targets, fit_h, test_h)
        for target, labels in classes.items():
            if len(labels) == 1:
                scores[encoding, target] = 0.0
            else:
                groups.setdefault((fit_h.shape[1], len(labels)), []).append((encoding, target))
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    for (size, count), members in groups.items():
        fit_inputs, test_inputs, source = _stacked_inputs(encodings, size, members)
        places = [torch.searchsorted(classes[target], fit_targets[target]) for _, target in members]
        if count == 2:  # one output tells two classes apart
            truth, loss_and_delta = torch.stack(places, dim=1).unsqueeze(2), _binary_cross_entropy
        else:
            truth, loss_and_delta = torch.nn.functional.one_hot(torch.stack(places, dim=1), count), _cross_entropy
        rng = torch.Generator().manual_seed(seed)
        networks, _ = _train_networks(fit_inputs, source, truth.float(), loss_and_delta, rng, steps)
        outputs = _network_outputs(networks, test_inputs, source, truth.shape[2])
        for (encoding, target), output in zip(members, outputs, strict=True):
            place = (output[0] > 0).long() if count == 2 else output.argmax(dim=0)
            scores[encoding, target] = matthews_correlation(test_targets[target], classes[target][place])
    return {(encoding, target): scores[encoding, target] for encoding in encodings for target in fit_targets}


def kernel_ridge_r2(fit_h, fit_targets, test_h, test_targets, return_best=False):
    """R² of RBF kernel ridge regression on the test set, by target (spec: probe b).

    With return_best, a pair: that, and the (α, γ) chosen by target.
    fit_h: (N, D), N ≥ 6, and test_h: (M, D), standardised; fit_targets, test_targets: (N, k), (M, k) under the same
    names. α and γ are chosen for each target by the mean R² over three contiguous folds (the first of equals in
    scikit-learn's order), then fitted on all N samples. A factorisation serves all targets. Up to 4096 samples, and
    always on a GPU, there is one in float64 for each α; beyond that, one serves every α too (`_shared_coefficients`),
    in float32 where that is enough (`_precision`). The kernel of 20,480 samples takes 3.4 GB. SciPy's BLAS has its own
    number of threads (OPENBLAS_NUM_THREADS). Raises ValueError for shapes or names that do not fit, for values that are
    not finite and for fewer than six fitting samples.
    """
    _check_encodings(fit_h, test_h)
    widths = _check_targets(fit_targets, fit_h)
    _check_test_targets(fit_targets, test_targets, test_h)
    if len(fit_h) < 2 * FOLDS:
        raise ValueError(f"{len(fit_h)} samples to fit; {FOLDS} folds need at least {2 * FOLDS}")
    h, targets = fit_h.double(), _stack(fit_targets)
    solved, column = targets.unique(dim=1, return_inverse=True)  # s_inv repeats columns of s_i
    cv_scores = torch.zeros(len(ALPHAS), len(GAMMAS), len(widths))
    for held_out in torch.arange(len(h), device=h.device).tensor_split(FOLDS):
        fitted = torch.ones(len(h), dtype=torch.bool, device=h.device).index_fill_(0, held_out, False)
        for g, gamma in enumerate(GAMMAS):
            coefficients = _ridge_coefficients(h[fitted], solved[fitted], gamma, ALPHAS)
            predictions = _kernel_product(h[held_out], h[fitted], gamma, torch.cat(coefficients, dim=1))
            for a, prediction in enumerate(predictions.split(solved.shape[1], dim=1)):
                columns = _r2_columns(targets[held_out], prediction[:, column]).split(widths)
                cv_scores[a, g] += torch.stack([column.mean() for column in columns]).cpu() / FOLDS
    grid = [(alpha, gamma) for alpha in ALPHAS for gamma in GAMMAS]
    best = {}
    for name, target_scores in zip(fit_targets, cv_scores.flatten(0, 1).T.tolist(), strict=True):
        best[name] = grid[target_scores.index(max(target_scores))]
    scores = {}
    for gamma in sorted({gamma for _, gamma in best.values()}):
        names = [name for name in best if best[name][1] == gamma]
        alphas = sorted({best[name][0] for name in names})
        chosen = {name: fit_targets[name] for name in names}
        solved, column = _stack(chosen).unique(dim=1, return_inverse=True)
        coefficients = _ridge_coefficients(h, solved, gamma, alphas)
        predictions = _kernel_product(test_h.double(), h, gamma, torch.cat(coefficients, dim=1))
        predictions = predictions.split(solved.shape[1], dim=1)
        for name, own in zip(
            names, column.split([_columns(target).shape[1] for target in chosen.values()]), strict=True
        ):
            scores[name] = r2_scores(_columns(test_targets[name]), predictions[alphas.index(best[name][0])][:, own])
    scores = {name: scores[name] for name in fit_targets}
    return (scores, best) if return_best else scores


# Checks and shapes


def _columns(target):
    return target.reshape(len(target), -1)


def _stack(targets):
    return torch.cat([_columns(target).double() for target in targets.values()], dim=1)


def _with_ones(h):
    """(N, D) → (N, D + 1) float32 whose last column is 1, so that biases are a row of the weights."""
    return torch.cat((h.float(), torch.ones(len(h), 1, device=h.device)), dim=1)


def _stacked_inputs(encodings, size, members):
    """Encodings of one size as (E, N, size + 1), (E, M, size + 1), and (len(members),): which of them each network reads."""
    names = [name for name, (fit_h, _) in encodings.items() if fit_h.shape[1] == size]
    fit_inputs, test_inputs = (torch.stack([_with_ones(encodings[name][part]) for name in names]) for part in (0, 1))
    source = torch.tensor([names.index(encoding) for encoding, _ in members], device=fit_inputs.device)
    return fit_inputs, test_inputs, source


def _check_finite(name, values):
    if not values.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite")


def _check_encodings(fit_h, test_h):
    if fit_h.ndim != 2 or test_h.ndim != 2 or fit_h.shape[1] != test_h.shape[1] or not len(fit_h):
        raise ValueError(
            f"encodings {tuple(fit_h.shape)} and {tuple(test_h.shape)} must have shapes (N, D) and (M, D), N > 0"
        )
    _check_finite("the fitting encoding", fit_h)
    _check_finite("the test encoding", test_h)


def _check_targets(targets, h):
    """The numbers of outputs, in the order of the targets."""
    for name, target in targets.items():
        if target.ndim not in (1, 2) or len(target) != len(h) or not target.numel():
            raise ValueError(
                f"target {name} has the shape {tuple(target.shape)}; expected ({len(h)}, k) as the encoding"
            )
        _check_finite(f"target {name}", target)
    return [_columns(target).shape[1] for target in targets.values()]


def _check_test_targets(fit_targets, test_targets, test_h):
    if missing := [name for name in fit_targets if name not in test_targets]:
        raise ValueError(f"no test targets for: {', '.join(missing)}")
    widths = _check_targets({name: test_targets[name] for name in fit_targets}, test_h)
    for (name, target), width in zip(fit_targets.items(), widths, strict=True):
        if _columns(target).shape[1] != width:
            raise ValueError(f"target {name} has {_columns(target).shape[1]} outputs to fit and {width} to test")


def _check_classes(fit_targets, test_targets, fit_h, test_h):
    if missing := [name for name in fit_targets if name not in test_targets]:
        raise ValueError(f"no test targets for: {', '.join(missing)}")
    for targets, h in ((fit_targets, fit_h), (test_targets, test_h)):
        for name in fit_targets:
            target = targets[name]
            if target.shape != (len(h),) or target.is_floating_point() or not len(target):
                raise ValueError(
                    f"target {name} is {target.dtype} {tuple(target.shape)}; expected ({len(h)},) integer classes"
                )


def _r2_columns(target, prediction):
    """(k,) float64: R² of each output."""
    target, prediction = target.double(), prediction.double()
    residual = (target - prediction).square().sum(dim=0)
    total = (target - target.mean(dim=0)).square().sum(dim=0)
    constant = torch.where(residual == 0, 1.0, 0.0).double()
    return torch.where(total == 0, constant, 1 - residual / total)


# Logistic regression


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
        return loss.item() / len(h), gradient.div_(len(h)).flatten().cpu().numpy()

    start = torch.zeros(wanted.numel(), dtype=h.dtype).numpy()
    options = {"maxiter": LOGISTIC_ITERATIONS, "gtol": LOGISTIC_TOLERANCE, "ftol": 0}
    solution = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options=options).x
    return torch.from_numpy(solution).to(h.device).view_as(wanted)


# MLP probe: N networks D → 100 → k, one row of parameters each


def _views(rows, inputs, outputs):
    """Rows of parameters as hidden weights and biases (N, D + 1, 100), output weights (N, k, 100), biases (N, k, 1)."""
    hidden, output, bias = rows.split((inputs * HIDDEN_UNITS, outputs * HIDDEN_UNITS, outputs), dim=1)
    return hidden.view(-1, inputs, HIDDEN_UNITS), output.view(-1, outputs, HIDDEN_UNITS), bias.unsqueeze(2)


def _initial_row(inputs, outputs, generator):
    """One network's parameters: Glorot's uniform distribution with factor 6, biases too (as MLPRegressor for ReLU)."""
    hidden_bound, output_bound = (math.sqrt(6 / (fan + HIDDEN_UNITS)) for fan in (inputs - 1, outputs))
    hidden = torch.empty(inputs * HIDDEN_UNITS).uniform_(-hidden_bound, hidden_bound, generator=generator)
    output = torch.empty(outputs * (HIDDEN_UNITS + 1)).uniform_(-output_bound, output_bound, generator=generator)
    return torch.cat((hidden, output))


def _squared_error(outputs, targets):
    """(N,) losses of a minibatch, half the mean square of each network, and (N, k, B) deltas in place of the outputs.

    The deltas are outputs − targets, as in MLPRegressor: with k outputs it descends k times the loss it reports.
    """
    delta = outputs.sub_(targets)
    return delta.square().sum(dim=(1, 2)).mul_(0.5 / delta[0].numel()), delta


def _binary_cross_entropy(outputs, targets):
    """(N,) losses of a minibatch and (N, 1, B) deltas of logits of the class 1, the targets being 0 and 1."""
    loss = torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(dim=(1, 2))
    return loss, outputs.sigmoid_().sub_(targets)


def _cross_entropy(outputs, targets):
    """(N,) losses of a minibatch and (N, k, B) deltas of logits of k classes, the targets being one-hot."""
    log_probabilities = outputs.log_softmax(dim=1)
    loss = (log_probabilities * targets).sum(dim=1).mean(dim=1).neg_()
    return loss, log_probabilities.exp_().sub_(targets)


@torch.no_grad()
def _train_networks(inputs, source, targets, loss_and_delta, generator, max_steps=None):
    """Parameters (N, P) of N networks trained side by side, each until it stops, and their numbers of epochs (N,).

    inputs: (E, n, D + 1) float32, the last column 1; source: (N,) the input of each network; targets: (n, N, k). Adam,
    the penalty, the loss of an epoch and the rule to stop are those of scikit-learn's MLPRegressor; with max_steps, all
    take that many steps instead. The gradients are written out, since autograd would cost more than these small products.
    """
    device, (_, samples, size), (_, count, outputs) = inputs.device, inputs.shape, targets.shape
    batch_size = min(BATCH_SIZE, samples)
    rows = _initial_row(size, outputs, generator).to(device).repeat(count, 1)
    finished, epochs = torch.empty_like(rows), torch.zeros(count, dtype=torch.long, device=device)
    active = torch.arange(count, device=device)
    momentum, variance, steps = torch.zeros_like(rows), torch.zeros_like(rows), 0
    best, stalled = torch.full((count,), math.inf, device=device), torch.zeros(count, device=device)
    penalised = torch.ones_like(rows[0])  # 1 for weights, 0 for biases
    for bias in (_views(penalised[None], size, outputs)[0][:, -1], _views(penalised[None], size, outputs)[2]):
        bias.zero_()
    # activations and their gradients, by size of the minibatch: the last one of an epoch may be smaller
    widths = {batch_size, samples % batch_size} - {0}
    buffers = {width: torch.empty(2, count, HIDDEN_UNITS, width, device=device) for width in widths}
    last_epoch = MAX_EPOCHS if max_steps is None else math.ceil(max_steps / math.ceil(samples / batch_size))
    for epoch in range(1, last_epoch + 1):
        # anew each epoch: networks that stopped have left
        gradients, weights = torch.empty_like(rows), torch.empty_like(rows)
        hidden_weights, output_weights, output_biases = _views(rows, size, outputs)
        hidden_gradients, output_gradients, bias_gradients = _views(gradients, size, outputs)
        order = torch.randperm(samples, generator=generator).to(device)
        batches = inputs.index_select(1, order).split(batch_size, dim=1)
        target_batches = targets.index_select(0, order).permute(1, 2, 0).split(batch_size, dim=2)
        epoch_loss = torch.zeros_like(best)
        for batch, batch_targets in zip(batches, target_batches, strict=True):
            if steps == max_steps:
                break
            width = batch.shape[1]
            batch = batch.index_select(0, source).transpose(1, 2)
            hidden, hidden_delta = buffers[width]

            torch.bmm(hidden_weights.transpose(1, 2), batch, out=hidden).relu_()
            loss, delta = loss_and_delta(torch.baddbmm(output_biases, output_weights, hidden), batch_targets)
            torch.mul(rows, penalised, out=weights)
            epoch_loss.add_(loss, alpha=width).add_(torch.linalg.vecdot(weights, weights), alpha=WEIGHT_DECAY / 2)

            delta.mul_(1 / width)
            output_gradients.copy_(torch.bmm(delta, hidden.transpose(1, 2)))
            bias_gradients.copy_(delta.sum(dim=2, keepdim=True))
            if outputs == 1:  # the output weight is a factor of its whole row: fewer passes over the activations
                on = hidden.gt_(0)
                torch.mul(torch.bmm(batch * delta, on.transpose(1, 2)), output_weights, out=hidden_gradients)
            else:
                torch.bmm(output_weights.transpose(1, 2), delta, out=hidden_delta)
                torch.ops.aten.threshold_backward.grad_input(hidden_delta, hidden, 0, grad_input=hidden_delta)
                hidden_gradients.copy_(torch.bmm(batch, hidden_delta.transpose(1, 2)))
            gradients.add_(weights, alpha=WEIGHT_DECAY / width)
            steps += 1
            _adam_step(rows, gradients, momentum, variance, steps)
        epoch_loss /= samples
        if not epoch_loss.isfinite().all():
            raise ValueError("the training of an MLP probe diverged: the encodings or the targets are too large")
        stalled = torch.where(epoch_loss > best - TOLERANCE, stalled + 1, 0)
        best = torch.minimum(best, epoch_loss)
        stop = (stalled > PATIENCE) & (max_steps is None) | (epoch == last_epoch)
        if stop.any():
            finished[active[stop]], epochs[active[stop]] = rows[stop], epoch
            if stop.all():
                break
            rows, momentum, variance, best, stalled, active, source = (
                state[~stop] for state in (rows, momentum, variance, best, stalled, active, source)
            )
            targets = targets[:, ~stop]
            buffers = {width: buffer[:, : len(rows)] for width, buffer in buffers.items()}
    return finished, epochs


def _adam_step(rows, gradients, momentum, variance, steps):
    """Adam's step number `steps` in place, by the kernel behind torch.optim.Adam(fused=True).

    scikit-learn adds ε to √v where torch adds it to √v over its bias correction, hence the quotient.
    """
    count = torch.full((), steps, dtype=torch.float32, device=rows.device)
    epsilon = EPSILON / math.sqrt(1 - BETA_2**steps)
    settings = {"lr": LEARNING_RATE, "beta1": BETA_1, "beta2": BETA_2, "eps": epsilon}
    unused = {"weight_decay": 0.0, "amsgrad": False, "maximize": False}
    torch._fused_adam_([rows], [gradients], [momentum], [variance], [], [count], **settings, **unused)


@torch.no_grad()
def _network_outputs(rows, inputs, source, outputs):
    """(N, k, M) float32: what networks of parameters (N, P) give for inputs (E, M, D + 1)."""
    hidden_weights, output_weights, output_biases = _views(rows, inputs.shape[2], outputs)
    parts = []
    for part in inputs.split(10 * BATCH_SIZE, dim=1):
        hidden = torch.bmm(hidden_weights.transpose(1, 2), part.index_select(0, source).transpose(1, 2)).relu_()
        parts.append(torch.baddbmm(output_biases, output_weights, hidden))
    return torch.cat(parts, dim=2)


# Kernel ridge regression: (K + αI) c = y with K_ij = exp(−γ ‖h_i − h_j‖²)


def _kernel_block(left, right, gamma, dtype):
    """(rows, columns) of K for float64 encodings; distances in float64, so that K errs by rounding alone."""
    exponent = torch.addmm(-gamma * right.square().sum(dim=1), left, right.T, alpha=2 * gamma)
    exponent.sub_(gamma * left.square().sum(dim=1, keepdim=True)).clamp_(max=0)
    return exponent.to(dtype).exp_()


def _kernel_product(left, right, gamma, coefficients):
    """(M, k): K(left, right) @ coefficients, a few rows of K at a time, in the precision of the coefficients."""
    return torch.cat(
        [_kernel_block(rows, right, gamma, coefficients.dtype) @ coefficients for rows in left.split(KERNEL_ROWS)]
    )


def _ridge_solver(h, gamma, alpha, dtype):
    """A function targets (n, k) ↦ (K + αI)⁻¹ targets, both float64, from a Cholesky factor of that dtype in place of K.

    On a CPU the factor is SciPy's, whose LAPACK measures faster than torch's. A float32 factor that fails is made in
    float64; raises LinAlgError where that fails too.
    """
    kernel = torch.empty(len(h), len(h), dtype=dtype, device=h.device)
    for start in range(0, len(h), KERNEL_ROWS):
        rows = slice(start, start + KERNEL_ROWS)
        kernel[rows, start:] = _kernel_block(h[rows], h[start:], gamma, dtype)  # LAPACK reads one triangle alone
    kernel.diagonal().fill_(1 + alpha)
    if h.is_cuda:
        factor, failed = torch.linalg.cholesky_ex(kernel, upper=True)
    else:
        potrf, potrs = (lapack.spotrf, lapack.spotrs) if dtype == torch.float32 else (lapack.dpotrf, lapack.dpotrs)
        # upper and row by row is lower and column by column, as LAPACK stores it: no copy
        factor, failed = potrf(kernel.numpy().T, lower=True, clean=False, overwrite_a=True)
    if failed and dtype == torch.float32:
        del kernel, factor
        return _ridge_solver(h, gamma, alpha, torch.float64)
    if failed:
        raise torch.linalg.LinAlgError(f"the kernel with γ = {gamma:g}, α = {alpha:g} is not positive definite")
    if h.is_cuda:
        return lambda targets: torch.cholesky_solve(targets, factor, upper=True)
    return lambda targets: torch.from_numpy(potrs(factor, targets.to(dtype).numpy(), lower=True)[0]).double()


def _ridge_coefficients(h, targets, gamma, alphas):
    """A list of (K + αI)⁻¹ targets, (n, k) each; h: (n, D), targets: (n, k), all float64."""
    if h.is_cuda or len(h) <= DIRECT_SIZE:
        return [_ridge_solver(h, gamma, alpha, torch.float64)(targets) for alpha in alphas]
    centre = math.sqrt(min(alphas) * max(alphas))
    return _shared_coefficients(_ridge_solver(h, gamma, centre, _precision(h, gamma)), targets, centre, alphas)


def _precision(h, gamma):
    """float32 where rounding it disturbs K by less than a hundredth of the smallest α, else float64.

    The disturbance is the rounding error of K's largest eigenvalue, which is at most the largest sum of a row of K:
    n for a small γ, a few neighbours for a large one. Rows evenly spread stand for all of them.
    """
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
