"""One training step, and the optimisers behind it.

Adam, and what learns in a fraction of its steps: rates by layer, a preconditioner, and Muon.
"""

import torch
from torch import nn
from torch.optim.adam import adam

from running.devices import matrix_precision
from running.ranks import add_up
from running.schedules import learning_rate

GRADIENT_NORM = 2.0  # to which larger gradients are clipped

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
REFERENCE_FAN_IN = 750  # of the wide layers at the paper's size
DAMPING = 0.01  # of the inputs' covariance, in units of its mean eigenvalue
INTERVAL, INVERSE_INTERVAL = 5, 20  # steps between two updates of the covariance, and of its inverse
COVARIANCE_DECAY = 0.9  # of the moving average, an update
MUON_MOMENTUM, MUON_RATE = 0.9, 20  # the rate in units of Adam's
LARGEST_FILTERS = 2**20  # entries of a layer's filters; larger ones would take most of the time and gain little
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X, which draws singular values near 1
NEWTON_SCHULZ_STEPS = 5


def training_step(experiment, optimiser, share_done):
    """One step of a run: forward, backward, whitening, clipping, update; returns (loss, norm of the gradient), 0-d tensors.

    experiment: has `args` and loss(share_done), a scalar tensor of one fresh batch, whose own gradients are formed with it; so
    what is left to backward is the encoders', in their precision. Of several processes each has its part of the loss and of the
    gradients, and they are summed.
    """
    args = experiment.args
    optimiser.zero_grad()
    loss = experiment.loss(share_done)
    with matrix_precision(args.precision):
        loss.backward()
    # the graph is freed now: its nodes would lie between the next step's activations and scatter the heap
    loss = loss.detach()
    add_up([loss, *(parameter.grad for parameter in optimiser.parameters if parameter.grad is not None)])
    return loss, optimiser.step(learning_rate(args, share_done))


def make_optimiser(modules, args, rates=None):
    """The optimiser of the flags for `modules`, a dict name → nn.Module; rates: dict name → factor of its learning rate."""
    by_layer, by_module = fan_in_rates(modules) if args.layer_lr == "fan-in" else {}, rates or {}
    matrices = matrices_for_muon(modules) if args.optimiser == "muon" else []
    by_layer |= {id(matrix): 1.0 for matrix in matrices}  # its steps are of one size at any fan-in
    factors = {
        parameter: by_layer.get(id(parameter), 1.0) * by_module.get(name, 1.0)
        for name, module in modules.items()
        for parameter in module.parameters()
        if parameter.requires_grad
    }
    whitening = InputWhitening(modules) if args.preconditioner == "inputs" else None
    if args.optimiser == "muon":
        return Muon(list(factors), list(factors.values()), whitening, matrices)
    return Adam(list(factors), list(factors.values()), whitening)


class Adam:
    """Adam (Kingma & Ba, 2015) by torch's functional form, fused.

    The class torch.optim.Adam is the same arithmetic, but making one imports torch's compiler: seconds, and 140 MB.
    """

    def __init__(self, parameters, rates=None, whitening=None):
        """Optimise `parameters`, a list of float tensors that require gradients.

        rates: factors of the learning rate; whitening: an InputWhitening of their gradients.
        """
        self.parameters, self.whitening = parameters, whitening
        self.count = 0  # steps done
        self.rates = rates or [1.0] * len(parameters)
        self.momentum = [torch.zeros_like(parameter) for parameter in parameters]
        self.variance = [torch.zeros_like(parameter) for parameter in parameters]
        self._counts = torch.zeros(len(parameters), device=parameters[0].device)
        self.steps = list(self._counts.unbind())  # of each parameter, on its device, where the fused kernel wants them

    def zero_grad(self):
        """Free the gradients, before the forward pass of a step."""
        for parameter in self.parameters:
            parameter.grad = None
        if self.whitening:
            self.whitening.before_forward(self.count)

    def step(self, lr):
        """Whiten and clip the gradients and update, with learning rate `lr`; returns the norm before the clipping, 0-d."""
        if self.whitening:
            self.whitening.precondition()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_NORM)
        self.update(lr)
        self.count += 1
        return norm

    def _states(self):
        return list(zip(self.parameters, self.momentum, self.variance, self.steps, self.rates, strict=True))

    def update(self, lr):
        """Move the parameters by their gradients, with learning rate `lr`, in place; one without a gradient stays."""
        self._update_adam(self._states(), lr)

    @torch.no_grad()
    def _update_adam(self, states, lr):
        for rate in sorted(set(self.rates)):
            moving = [state for state in states if state[4] == rate and state[0].grad is not None]
            if not moving:
                continue
            steps = [state[3] for state in moving]
            tensors = [in_memory_order(parameter, parameter.grad, *moments) for parameter, *moments, _, _ in moving]
            adam(*map(list, zip(*tensors, strict=True)), [], steps,
                 lr=lr * rate, beta1=BETA_1, beta2=BETA_2, eps=EPSILON, weight_decay=0.0, amsgrad=False, maximize=False,
                 foreach=False, capturable=False, differentiable=False, fused=True)  # fmt: skip

    def state_dict(self):
        """Dict of lists of tensors: momentum, variance, steps."""
        # the numbers of steps come from a GPU in one copy
        return {"momentum": self.momentum, "variance": self.variance, "steps": list(self._counts.cpu().unbind())}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Take the state of `state_dict`, in place; raises ValueError or RuntimeError if it is of other parameters."""
        for own, theirs in ((self.momentum, state["momentum"]), (self.variance, state["variance"])):
            for mine, other in zip(own, theirs, strict=True):
                mine.copy_(other)
        self._counts.copy_(torch.stack(state["steps"]))


class Muon(Adam):
    """Muon (Jordan et al., 2024) for the filters of convolutions and other matrices, Adam for all else and very large filters.

    The step of a layer's weights, a matrix of a row for each filter, is the nearest orthogonal matrix to their momentum, about:
    all its singular directions move alike. Under Adam those that are strong at first, of images colours and places, move on alone
    for long; what few weak ones carry, of images shapes, is learned in a fraction of the steps.
    """

    def __init__(self, parameters, rates=None, whitening=None, matrices=()):
        """As Adam; matrices: those of `parameters` that Muon takes beside filters."""
        super().__init__(parameters, rates, whitening)
        self._matrices = {id(matrix) for matrix in matrices}

    @torch.no_grad()
    def update(self, lr):
        """As Adam's, with learning rate `lr` for Adam and MUON_RATE times that for filters and matrices."""
        others, alike = [], {}
        for state in self._states():
            parameter, momentum, _, _, rate = state
            taken = (parameter.dim() == 4 and parameter.numel() <= LARGEST_FILTERS) or id(parameter) in self._matrices
            if parameter.grad is None or not taken:
                others.append(state)
                continue
            parameter, gradient, momentum = in_memory_order(parameter, parameter.grad, momentum)
            momentum.mul_(MUON_MOMENTUM).add_(gradient)
            direction = gradient.add(momentum, alpha=MUON_MOMENTUM).flatten(1)  # of Nesterov
            # small matrices of one shape cost little more than one of them
            key = direction.shape if parameter.dim() == 2 else id(parameter)
            alike.setdefault(key, []).append((parameter, direction, rate))
        for group in alike.values():
            parameters, directions, rates = zip(*group, strict=True)
            stretch = max(1, directions[0].shape[0] / directions[0].shape[1]) ** 0.5
            updates = orthogonalised(torch.stack(directions)) if len(group) > 1 else [orthogonalised(directions[0])]
            for parameter, update, rate in zip(parameters, updates, rates, strict=True):
                parameter.add_(update.view(parameter.shape), alpha=-lr * MUON_RATE * rate * stretch)
        self._update_adam(others, lr)


def matrices_for_muon(modules):
    """List of the weights of linear layers that Muon takes: in a network of these alone, all but the last layer's.

    Maps that stand side by side, as LabelLoss has them, are last layers all of them.
    """
    matrices = []
    for module in modules.values():
        if any(isinstance(part, nn.ModuleDict) for part in module.modules()):
            continue
        layers = [layer for layer in module.modules() if not list(layer.children()) and list(layer.parameters())]
        if all(isinstance(layer, nn.Linear) for layer in layers):
            matrices += [layer.weight for layer in layers[:-1]]
    return matrices


def orthogonalised(matrix):
    """U S′ Vᵀ of (…, m, n) matrices U S Vᵀ, by Newton–Schulz steps; S′ is 0.7 to 1.2 but for very small values.

    Each step multiplies X from the left by a polynomial in G = X Xᵀ, the smaller of X's Gram matrices: G is followed alone and
    the product of the polynomials meets X once, at the end, for a third of the work where X is long.
    """
    a, b, c = NEWTON_SCHULZ
    multiply_add = torch.addmm if matrix.dim() == 2 else torch.baddbmm
    is_wide = matrix.shape[-2] <= matrix.shape[-1]
    wide = matrix if is_wide else matrix.mT
    x = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    gram, product = x @ x.mT, None
    for left in reversed(range(NEWTON_SCHULZ_STEPS)):
        polynomial = multiply_add(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
        if left:
            gram = polynomial @ gram @ polynomial
    x = product @ x
    return x if is_wide else x.mT


def in_memory_order(first, *others):
    """Views of tensors of one shape, their dimensions as those of the first lie in memory.

    For elementwise work on channels-last weights: on a CPU the fused Adam copies what is not contiguous, to and fro.
    """
    order = sorted(range(first.dim()), key=first.stride, reverse=True)
    return [tensor.permute(order) for tensor in (first, *others)]


def fan_in_rates(modules):
    """Dict id(parameter) → factor of the learning rate: REFERENCE_FAN_IN / fan-in of its layer.

    Adam moves every weight by about the learning rate, so that a layer's outputs move by the rate times its fan-in; with
    these factors all layers of networks of all widths move alike, and share one best rate (Yang & Hu, 2021).
    """
    rates = {}
    for module in modules.values():
        for layer in module.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                fan_in = layer.weight[0].numel()
                rates |= {id(parameter): REFERENCE_FAN_IN / fan_in for parameter in layer.parameters()}
    return rates


class InputWhitening:
    """Scales the gradients of linear layers down along the directions in which the layers' inputs vary most.

    The weights of y = W x + b have the gradient G = Σ δ xᵀ. K-FAC (Martens & Grosse, 2015) multiplies it from the right by
    the damped inverse of A = E[x xᵀ]; in these encoders A has a few large eigenvalues and a long tail, and what is learned
    last lies in the tail. With λ the mean eigenvalue of A times `damping`,

        G ← G (A/λ + I)⁻¹

    leaves the directions far below λ as they are. A is a moving average over every fifth batch, its inverse is made anew
    every twentieth step. The other factor of K-FAC, the covariance of δ, gains too little here to be worth its time.
    """

    def __init__(self, modules, damping=DAMPING, interval=INTERVAL, inverse_interval=INVERSE_INTERVAL):
        """Watch the linear layers of `modules`, a dict name → nn.Module."""
        self.damping, self.interval, self.inverse_interval = damping, interval, inverse_interval
        self._layers = {
            f"{module_name}.{name}": layer
            for module_name, module in modules.items()
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear)
        }
        self._inputs, self._covariances, self._inverses, self._step = {}, {}, {}, 0
        for name, layer in self._layers.items():
            layer.register_forward_pre_hook(lambda _, inputs, name=name: self._watch(name, inputs[0]))

    def _watch(self, name, inputs):
        if self._step % self.interval == 0 and torch.is_grad_enabled():
            # an encoder may take its rows in blocks
            self._inputs.setdefault(name, []).append(inputs.detach())

    def before_forward(self, step):
        """Tell which step comes next: the layers' inputs are noted where they are due."""
        self._step = step
        self._inputs.clear()

    @torch.no_grad()
    def precondition(self):
        """Whiten the gradients in place, after the covariances and their inverses were updated where they are due."""
        moments, counts = {}, {}
        for name, blocks in self._inputs.items():
            blocks = [block.flatten(0, -2).float() for block in blocks]
            moments[name] = sum(block.T @ block for block in blocks)
            counts[name] = moments[name].new_full((), sum(map(len, blocks)))
        add_up([*moments.values(), *counts.values()])
        for name, moment in moments.items():
            covariance = moment / counts[name]
            if name in self._covariances:
                self._covariances[name].lerp_(covariance, 1 - COVARIANCE_DECAY)
            else:
                self._covariances[name] = covariance
        # the first averages are of few batches: they are followed at once
        if self._inputs and (self._step < self.inverse_interval or self._step % self.inverse_interval == 0):
            self._inverses = {name: self._damped_inverse(covariance) for name, covariance in self._covariances.items()}
        for name, inverse in self._inverses.items():
            gradient = self._layers[name].weight.grad
            gradient.copy_(gradient @ inverse)

    def _damped_inverse(self, covariance):
        level = (self.damping * covariance.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny)
        damped = covariance / level + torch.eye(len(covariance), device=covariance.device)
        # without a check, for which the host would wait: the damping keeps it positive definite
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(damped).L)

    def state_dict(self):
        """Dict name of a layer → [covariance (in, in), damped inverse (in, in)]."""
        return {name: [self._covariances[name], inverse] for name, inverse in self._inverses.items()}

    def load_state_dict(self, state):
        """Take the matrices of `state_dict`; raises ValueError if they are of other layers, or of none."""
        expected = {name: 2 * [(torch.strided, 2 * (self._layers[name].in_features,))] for name in state if name in self._layers}
        found = {name: [(matrix.layout, tuple(matrix.shape)) for matrix in pair] for name, pair in state.items()}
        if found != expected or not found:
            raise ValueError("its preconditioner is of other layers")
        devices = {name: layer.weight.device for name, layer in self._layers.items()}
        self._covariances, self._inverses = (
            {name: pair[part].to(devices[name], copy=True) for name, pair in state.items()} for part in (0, 1)
        )
