"""MLP probes of frozen encodings, networks D → 100 (ReLU) → k: many at once, since each alone is far too small for a processor.

`fit_and_predict` trains as scikit-learn's MLPRegressor and MLPClassifier do, in minibatches and until the loss stalls;
`FullBatchProbes` as the downstream tasks of Section 5.1 ask, on all samples in every step, or nearly so in an eighth of the time.
Everything is in float32.
"""

import math

import torch
from tqdm import tqdm

HIDDEN_UNITS, LEARNING_RATE, BATCH_SIZE, WEIGHT_DECAY = 100, 1e-3, 200, 1e-4
MAX_EPOCHS = 10_000  # the runs' limit; scikit-learn's default, 200, ends fits to classes and to small sets too early
TOLERANCE, PATIENCE = 1e-4, 10  # stop once more than PATIENCE epochs running have not improved the loss by TOLERANCE
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
FAST_PROBES = (2_000, 10.0)  # steps of fast probes, and their first rate in units of LEARNING_RATE
CHUNK = 1024  # samples of a full batch whose activations are still in a CPU cache when the gradient needs them
PART = 256  # samples of a step that estimates the gradient of all


def with_ones(h):
    """(N, D) → (N, D + 1) float32 whose last column is 1, so that biases are a row of the weights."""
    return torch.cat((h.float(), torch.ones(len(h), 1, device=h.device)), dim=1)


def adam_step(parameters, gradients, momentum, variance, step, epsilon=EPSILON, rate=1.0, betas=(BETA_1, BETA_2)):
    """Adam's step number `step` in place, all four being lists of tensors: the kernel behind torch.optim.Adam(fused=True).

    rate: factor of the learning rate; betas: decay of the first and of the second moment.

    The class itself would do, but making one imports torch's compiler: seconds.
    """
    counts = [torch.full((), step, dtype=torch.float32, device=parameter.device) for parameter in parameters]
    settings = {"lr": LEARNING_RATE * rate, "beta1": betas[0], "beta2": betas[1], "eps": epsilon}
    unused = {"weight_decay": 0.0, "amsgrad": False, "maximize": False}
    torch._fused_adam_(parameters, gradients, momentum, variance, [], counts, **settings, **unused)


def fit_and_predict(encodings, truths, generator, steps=None, first_rate=None):
    """Dict (encoding, target) → (k, M) float32 outputs for the test set, of a network for each encoding and target.

    encodings: dict name → (fit_h (N, D), test_h (M, D)); truths: dict name → (truth (N, k), one of the losses below); generator:
    a torch.Generator, of which one number is drawn; steps: that many instead of MLPRegressor's rule to stop; first_rate: the
    learning rate falls from that many times the usual to 0 over these steps. All networks of one shape train as one batch,
    from the same initial weights over the same minibatches: what others are beside it changes a network by rounding alone.
    Raises ValueError where the training diverges.
    """
    groups = {}
    for encoding, (fit_h, _) in encodings.items():
        for target, (truth, loss_and_delta) in truths.items():
            groups.setdefault((fit_h.shape[1], truth.shape[1], loss_and_delta), []).append((encoding, target))
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    outputs = {}
    for (size, width, loss_and_delta), members in groups.items():
        names = [name for name, (fit_h, _) in encodings.items() if fit_h.shape[1] == size]
        fit_inputs, test_inputs = (torch.stack([with_ones(encodings[name][part]) for name in names]) for part in (0, 1))
        source = torch.tensor([names.index(encoding) for encoding, _ in members], device=fit_inputs.device)
        stacked = torch.stack([truths[target][0].float() for _, target in members], dim=1)
        rng = torch.Generator().manual_seed(seed)
        networks, _ = train_networks(fit_inputs, source, stacked, loss_and_delta, rng, steps, first_rate)
        trained = network_outputs(views(networks, size + 1, width), test_inputs, source)
        outputs |= zip(members, trained, strict=True)
    return outputs


def squared_error(outputs, targets):
    """(N,) losses of a minibatch, half the mean square of each network, and (N, k, B) deltas in place of the outputs.

    The deltas are outputs − targets, as in MLPRegressor: with k outputs it descends k times the loss it reports.
    """
    delta = outputs.sub_(targets)
    return delta.square().sum(dim=(1, 2)).mul_(0.5 / delta[0].numel()), delta


def binary_cross_entropy(outputs, targets):
    """(N,) losses of a minibatch and (N, 1, B) deltas of logits of the class 1, the targets being 0 and 1."""
    loss = torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(dim=(1, 2))
    return loss, outputs.sigmoid_().sub_(targets)


def cross_entropy(outputs, targets):
    """(N,) losses of a minibatch and (N, k, B) deltas of logits of k classes, the targets being one-hot."""
    log_probabilities = outputs.log_softmax(dim=1)
    loss = (log_probabilities * targets).sum(dim=1).mean(dim=1).neg_()
    return loss, log_probabilities.exp_().sub_(targets)


def views(rows, inputs, outputs):
    """Rows of parameters as hidden weights and biases (N, D + 1, 100), output weights (N, k, 100), biases (N, k, 1)."""
    hidden, output, bias = rows.split((inputs * HIDDEN_UNITS, outputs * HIDDEN_UNITS, outputs), dim=1)
    return hidden.view(-1, inputs, HIDDEN_UNITS), output.view(-1, outputs, HIDDEN_UNITS), bias.unsqueeze(2)


def initial_row(inputs, outputs, generator):
    """One network's parameters: Glorot's uniform distribution with factor 6, biases too (as MLPRegressor for ReLU)."""
    hidden_bound, output_bound = (math.sqrt(6 / (fan + HIDDEN_UNITS)) for fan in (inputs - 1, outputs))
    hidden = torch.empty(inputs * HIDDEN_UNITS).uniform_(-hidden_bound, hidden_bound, generator=generator)
    output = torch.empty(outputs * (HIDDEN_UNITS + 1)).uniform_(-output_bound, output_bound, generator=generator)
    return torch.cat((hidden, output))


@torch.no_grad()
def train_networks(inputs, source, targets, loss_and_delta, generator, max_steps=None, first_rate=None):
    """Parameters (N, P) of N networks trained side by side, each until it stops, and their numbers of epochs (N,) on the CPU.

    inputs: (E, n, D + 1) float32, the last column 1; source: (N,) the input of each network; targets: (n, N, k). Adam,
    the penalty, the loss of an epoch and the rule to stop are those of scikit-learn's MLPRegressor; with max_steps, all
    take that many instead, and with first_rate by a falling rate, as `fit_and_predict` has it. Raises ValueError where the
    training diverges.
    """
    device, (_, samples, size), (_, count, outputs) = inputs.device, inputs.shape, targets.shape
    batch_size = min(BATCH_SIZE, samples)
    rows = initial_row(size, outputs, generator).to(device).repeat(count, 1)
    finished = torch.empty_like(rows)
    momentum, variance, steps = torch.zeros_like(rows), torch.zeros_like(rows), 0
    # which networks stop is decided on the CPU, by one copy of the losses an epoch: a GPU would be waited for at each question
    active, epochs = torch.arange(count), torch.zeros(count, dtype=torch.long)
    best, stalled = torch.full((count,), math.inf), torch.zeros(count)
    penalised = torch.ones_like(rows[0])  # 1 for weights, 0 for biases
    hidden, _, biases = views(penalised[None], size, outputs)
    hidden[:, -1], biases[:] = 0, 0
    last_epoch = MAX_EPOCHS if max_steps is None else math.ceil(max_steps / math.ceil(samples / batch_size))
    for epoch in range(1, last_epoch + 1):
        # anew each epoch: networks that stopped have left
        gradients, weights = torch.empty_like(rows), torch.empty_like(rows)
        parts, gradient_parts = views(rows, size, outputs), views(gradients, size, outputs)
        order = torch.randperm(samples, generator=generator).to(device)
        batches = inputs.index_select(1, order).split(batch_size, dim=1)
        target_batches = targets.index_select(0, order).permute(1, 2, 0).split(batch_size, dim=2)
        epoch_loss = torch.zeros(len(rows), device=device)
        for batch, batch_targets in zip(batches, target_batches, strict=True):
            if steps == max_steps:
                break
            width = batch.shape[1]
            batch = batch.index_select(0, source).transpose(1, 2)
            loss = _backpropagate(parts, gradient_parts, batch, batch_targets, loss_and_delta)
            torch.mul(rows, penalised, out=weights)
            epoch_loss.add_(loss, alpha=width).add_(torch.linalg.vecdot(weights, weights), alpha=WEIGHT_DECAY / 2)
            gradients.add_(weights, alpha=WEIGHT_DECAY / width)
            steps += 1
            # scikit-learn adds ε to √v, where torch adds it to √v over its bias correction
            epsilon = EPSILON / math.sqrt(1 - BETA_2**steps)
            rate = 1.0 if first_rate is None else first_rate * (1 - (steps - 1) / max_steps)
            adam_step([rows], [gradients], [momentum], [variance], steps, epsilon, rate)
        epoch_loss = epoch_loss.div_(samples).cpu()
        if not epoch_loss.isfinite().all():
            raise ValueError("the training of an MLP probe diverged: the encodings or the targets are too large")
        stalled = torch.where(epoch_loss > best - TOLERANCE, stalled + 1, 0)
        best = torch.minimum(best, epoch_loss)
        stop = (stalled > PATIENCE) & (max_steps is None) | (epoch == last_epoch)
        if stop.any():
            epochs[active[stop]] = epoch
            finished.index_copy_(0, active[stop].to(device), rows.index_select(0, stop.nonzero()[:, 0].to(device)))
            if stop.all():
                break
            best, stalled, active = best[~stop], stalled[~stop], active[~stop]
            going_on = (~stop).nonzero()[:, 0].to(device)
            rows, momentum, variance, source = (state[going_on] for state in (rows, momentum, variance, source))
            targets = targets[:, going_on]
    return finished, epochs


def _backpropagate(parameters, gradients, batch, targets, loss_and_delta):
    """(N,) losses of a minibatch (N, D + 1, B); writes `gradients`, `views` too. Autograd costs more than these products."""
    hidden_weights, output_weights, output_biases = parameters
    hidden_gradients, output_gradients, bias_gradients = gradients
    hidden = torch.bmm(hidden_weights.transpose(1, 2), batch).relu_()
    loss, delta = loss_and_delta(torch.baddbmm(output_biases, output_weights, hidden), targets)
    delta.mul_(1 / batch.shape[2])
    output_gradients.copy_(torch.bmm(delta, hidden.transpose(1, 2)))
    bias_gradients.copy_(delta.sum(dim=2, keepdim=True))
    if delta.shape[1] == 1:  # the output weight is a factor of its whole row: fewer passes over the activations
        on = hidden.gt_(0)
        torch.mul(torch.bmm(batch * delta, on.transpose(1, 2)), output_weights, out=hidden_gradients)
    else:
        hidden_delta = torch.bmm(output_weights.transpose(1, 2), delta)
        torch.ops.aten.threshold_backward.grad_input(hidden_delta, hidden, 0, grad_input=hidden_delta)
        hidden_gradients.copy_(torch.bmm(batch, hidden_delta.transpose(1, 2)))
    return loss


@torch.no_grad()
def network_outputs(parameters, inputs, source):
    """(N, k, M) float32: what networks of `parameters`, as `views` has them, give for inputs (E, M, D + 1)."""
    hidden_weights, output_weights, output_biases = parameters
    outputs = []
    for part in inputs.split(10 * BATCH_SIZE, dim=1):
        hidden = torch.bmm(hidden_weights.transpose(1, 2), part.index_select(0, source).transpose(1, 2)).relu_()
        outputs.append(torch.baddbmm(output_biases, output_weights, hidden))
    return torch.cat(outputs, dim=2)


def initial_network(size, outputs, generator):
    """(hidden (100, size), output (outputs, 100)): Xavier-uniform weights (Glorot & Bengio, 2010); the biases are zero."""
    hidden, output = torch.empty(HIDDEN_UNITS, size), torch.empty(outputs, HIDDEN_UNITS)
    return tuple(torch.nn.init.xavier_uniform_(weight, generator=generator) for weight in (hidden, output))


class FullBatchProbes:
    """K probes of one encoding that train as one network: first the regressions, then classifiers of two classes.

    Two identities make a step cheap, and it stays the step of K networks with losses MSE and cross-entropy up to float32
    rounding:

    - With the units that are on, M (100, N), and the deltas δ (N,) of the outputs, the gradients of the hidden weights W
      (100, D + 1) and of the output weights u (100,) both follow from G = M diag(δ) X: u ⊙ G and the rows of W ⊙ G summed.
    - The gradients of a classifier's two outputs are opposite, and Adam answers opposite gradients with opposite steps.
      So half their difference, a, has all there is to learn: logit 2a, and the gradient of one output for Adam.
    """

    def __init__(self, size, regressions, classifiers, generator, device):
        """Draw initial weights for encodings of `size` dimensions, network after network; generator: on the CPU."""
        networks = [initial_network(size, outputs, generator) for outputs in [1] * regressions + [2] * classifiers]
        hidden = torch.stack([hidden.T for hidden, _ in networks], dim=1)
        self.hidden = torch.cat((hidden, torch.zeros(1, len(networks), HIDDEN_UNITS))).to(device)  # (D + 1, K, 100)
        self.output = torch.stack([o[0] if len(o) == 1 else (o[1] - o[0]) / 2 for _, o in networks]).to(device)
        self.bias = torch.zeros(len(networks), 1, device=device)
        self.regressions = regressions
        self._factor = torch.tensor([[1.0]] * regressions + [[2.0]] * classifiers, device=device)  # logit 2a

    def _logit_layer(self):
        """Weights (K, 1, 100) and biases (K, 1, 1) of the logits."""
        return (self.output * self._factor).unsqueeze(1), (self.bias * self._factor).unsqueeze(1)

    @torch.no_grad()
    def train(self, h, targets, steps, rate=1.0):
        """Full-batch steps of Adam for h (N, D), standardised, targets (N, K), classes as 0 and 1; ValueError if it diverges.

        rate: factor of the learning rate. So many times fewer steps come about as far and fit as closely: the second moment
        forgets so many times faster, and momentum lasts until steps bear the curvature that they bear at a rate of 1, which is
        2 (1 + β_1) / (1 − β_1) over the rate (Cohen et al. 2022, arXiv 2207.14484).
        """
        parts = list(zip(_chunks(with_ones(h)), _chunks(targets.float()), strict=True))
        borne = (1 + BETA_1) / (1 - BETA_1) * rate
        betas = (borne - 1) / (borne + 1) if rate > 1 else BETA_1, 1 - (1 - BETA_2) * rate
        parameters, activations = [self.hidden, self.output, self.bias], {}
        gradients, momentum, variance = ([torch.zeros_like(part) for part in parameters] for _ in range(3))
        for step in tqdm(range(1, steps + 1), unit="step", leave=False, disable=None):  # shown on a terminal
            self._write_gradients(gradients, parts, len(h), activations)
            adam_step(parameters, gradients, momentum, variance, step, rate=rate, betas=betas)
        self._check_finite()

    @torch.no_grad()
    def train_in_parts(self, h, targets, steps, rate, generator):
        """Steps of Adam whose gradient one part of the samples corrects: SAGA's estimate (Defazio et al. 2014, arXiv 1407.0202).

        Each part's gradient is kept, as it was when the part came last. A step computes one anew, g, and takes the sum of what
        is kept plus (g − what was kept of it) times the number of parts, which is right on average and, as the steps are small,
        nearly so each time: minibatches without most of their noise, which would count as a moment and keep steps small.

        rate: factor of the learning rate; generator: on the CPU, for the order of the parts. The rest as in `train`.
        """
        parts = list(zip(_chunks(with_ones(h), PART), _chunks(targets.float(), PART), strict=True))
        betas = BETA_1, 1 - (1 - BETA_2) * rate
        parameters, activations = [self.hidden, self.output, self.bias], {}
        momentum, variance = ([torch.zeros_like(part) for part in parameters] for _ in range(2))
        kept = self.hidden.new_empty(len(parts), sum(part.numel() for part in parameters))
        new, estimate = torch.empty_like(kept[0]), torch.empty_like(kept[0])
        new_gradients, estimated = self._as_parameters(new), self._as_parameters(estimate)
        for row, part in zip(kept, parts, strict=True):
            self._write_gradients(self._as_parameters(row), [part], len(h), activations)
        order = []
        for step in tqdm(range(1, steps + 1), unit="step", leave=False, disable=None):
            if not order:  # the sum too is taken anew in each pass: rounding does not add up
                order, total = torch.randperm(len(parts), generator=generator).tolist(), kept.sum(dim=0)
            drawn = order.pop()
            self._write_gradients(new_gradients, [parts[drawn]], len(h), activations)
            change = new - kept[drawn]
            kept[drawn] = new
            torch.add(total, change, alpha=len(parts), out=estimate)
            total.add_(change)
            adam_step(parameters, estimated, momentum, variance, step, rate=rate, betas=betas)
        self._check_finite()

    def _as_parameters(self, row):
        """The numbers of a row (P,) as views of the parameters' shapes."""
        parameters = self.hidden, self.output, self.bias
        parts = row.split([parameter.numel() for parameter in parameters])
        return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]

    def _write_gradients(self, gradients, parts, samples, activations):
        """Write what `parts`, pairs of h (D + 1, B) and targets (K, B), add to the gradients of the mean loss of all samples."""
        hidden_gradient, output_gradient, bias_gradient = gradients
        hidden_gradient.zero_()
        bias_gradient.zero_()
        weights, biases = self._logit_layer()
        # forward and back within a chunk, so that its activations never leave the cache
        for x, target in parts:
            if x.shape[1] not in activations:
                activations[x.shape[1]] = x.new_empty(self.output.numel(), x.shape[1])
            flat = torch.mm(self.hidden.flatten(1).T, x, out=activations[x.shape[1]]).relu_()
            active = flat.view(len(weights), HIDDEN_UNITS, -1)
            delta = torch.baddbmm(biases, weights, active)
            delta[self.regressions :].sigmoid_()
            delta.sub_(target.unsqueeze(1))
            bias_gradient.add_(delta.sum(dim=2))
            torch.ops.aten.threshold_backward.grad_input(delta.expand_as(active), active, 0, grad_input=active)
            hidden_gradient.flatten(1).addmm_(x, flat.T)
        slope = 2 / self._factor / samples  # δ of MSE is twice output − target, of cross-entropy that alone
        hidden_gradient.mul_(slope)  # G, (D + 1, K, 100)
        torch.sum(hidden_gradient * self.hidden, dim=0, out=output_gradient)
        hidden_gradient.mul_(weights[:, 0])
        bias_gradient.mul_(slope)

    def _check_finite(self):
        if not torch.stack([parameter.isfinite().all() for parameter in (self.hidden, self.output, self.bias)]).all():
            raise ValueError("the training of a probe diverged: the encodings or the targets are too large")

    def predict(self, h):
        """(N, K) float32 for encodings (N, D): predictions of the regressions, log-odds of class 1 of the classifiers."""
        parameters = self.hidden.transpose(0, 1), *self._logit_layer()
        source = torch.zeros(len(self.bias), dtype=torch.long, device=h.device)
        return network_outputs(parameters, with_ones(h)[None], source)[:, 0].T


def _chunks(rows, size=None):
    """Rows (N, k) as a list of (k, B), B being `size` or small enough for a CPU's cache; a GPU needs large kernels instead."""
    return [part.T.contiguous() for part in rows.split(size or (len(rows) if rows.is_cuda else CHUNK))]
