"""Adam, and what lets it learn deep MLPs in a fraction of the steps: rates by layer, and a preconditioner."""

import torch
from torch import nn
from torch.optim.adam import adam

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
REFERENCE_FAN_IN = 750  # of the wide layers at the paper's size
RANK = 64  # leading directions of a layer's inputs that are scaled down
INTERVAL = 10  # steps between two updates of the directions


class Adam:
    """Adam (Kingma & Ba, 2015) by torch's functional form, fused.

    The class torch.optim.Adam is the same arithmetic, but making one imports torch's compiler: seconds, and 140 MB.
    """

    def __init__(self, parameters, rates=None):
        """Optimise `parameters`, a list of float tensors that require gradients; `rates` are factors of the learning rate."""
        self.parameters = parameters
        self.rates = rates or [1.0] * len(parameters)
        self.momentum = [torch.zeros_like(parameter) for parameter in parameters]
        self.variance = [torch.zeros_like(parameter) for parameter in parameters]
        self.steps = [torch.zeros((), device=parameter.device) for parameter in parameters]

    def zero_grad(self):
        """Free the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr):
        """One step with learning rate `lr`, in place; a parameter without a gradient stays."""
        states = list(zip(self.parameters, self.momentum, self.variance, self.steps, self.rates, strict=True))
        for rate in sorted(set(self.rates)):
            moving = [state for state in states if state[4] == rate and state[0].grad is not None]
            if not moving:
                continue
            parameters, momentum, variance, steps, _ = (list(column) for column in zip(*moving, strict=True))
            adam(parameters, [parameter.grad for parameter in parameters], momentum, variance, [], steps,
                 lr=lr * rate, beta1=BETA_1, beta2=BETA_2, eps=EPSILON, weight_decay=0.0, amsgrad=False, maximize=False,
                 foreach=False, capturable=False, differentiable=False, fused=True)  # fmt: skip

    def state_dict(self):
        """Dict of lists of tensors: momentum, variance, steps."""
        return {"momentum": self.momentum, "variance": self.variance, "steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Take the state of `state_dict`, in place; raises ValueError or RuntimeError if it is of other parameters."""
        for name, own in self.state_dict().items():
            for mine, theirs in zip(own, state[name], strict=True):
                mine.copy_(theirs)


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


class InputDeflation:
    """Scales the gradients of linear layers down along the leading directions of the layers' inputs.

    The weights of y = W x + b have the gradient G = Σ δ xᵀ. K-FAC (Martens & Grosse, 2015) multiplies it from the right
    by the inverse of A = E[x xᵀ]; in these encoders A has a few large eigenvalues and a long tail, and what is learned
    last lies in the tail. Here the leading eigenpairs U, Λ alone are inverted, up to the smallest of them, λ_r:

        G ← G − G U (I − λ_r Λ⁻¹) Uᵀ

    This costs 2 × 64 / width of one product of the backward pass. U follows A by a step of subspace iteration on the
    inputs of a batch, every tenth step; Λ is a moving average.
    """

    def __init__(self, modules, rank=RANK, interval=INTERVAL):
        """Watch the linear layers of `modules`, a dict name → nn.Module."""
        self.rank, self.interval = rank, interval
        self._layers = {
            f"{module_name}.{name}": layer
            for module_name, module in modules.items()
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear)
        }
        self._inputs, self._directions, self._watching = {}, {}, False
        for name, layer in self._layers.items():
            layer.register_forward_pre_hook(lambda _, inputs, name=name: self._watch(name, inputs[0]))

    def _watch(self, name, inputs):
        if self._watching and torch.is_grad_enabled():
            self._inputs[name] = inputs.detach()

    def before_forward(self, step):
        """Note the layers' inputs if the directions are due at this step."""
        self._watching = step % self.interval == 0

    @torch.no_grad()
    def precondition(self):
        """Deflate the gradients in place, after the directions were updated where they are due."""
        for name, inputs in self._inputs.items():
            self._update(name, inputs.flatten(0, -2).float())
        self._inputs.clear()
        for name, (directions, spectrum) in self._directions.items():
            gradient = self._layers[name].weight.grad
            shrink = 1 - spectrum.min() / spectrum
            gradient.sub_(((gradient @ directions) * shrink) @ directions.T)

    def _update(self, name, inputs):
        rank = min(self.rank, len(inputs) // 4, inputs.shape[1])
        if rank < 2:
            return
        if name not in self._directions:
            directions, spectrum = inputs[:rank].T, None
            iterations = 4
        else:
            (directions, spectrum), iterations = self._directions[name], 1
        for _ in range(iterations):
            directions = torch.linalg.qr(inputs.T @ (inputs @ directions))[0]
        variance = (inputs @ directions).square().mean(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
        self._directions[name] = (directions, variance if spectrum is None else (spectrum + variance) / 2)

    def state_dict(self):
        """Dict name of a layer → [directions (in, r), spectrum (r,)]."""
        return {name: list(pair) for name, pair in self._directions.items()}

    def load_state_dict(self, state):
        """Take the directions of `state_dict`; raises KeyError for a layer that is not watched."""
        devices = {name: self._layers[name].weight.device for name in state}
        self._directions = {name: tuple(part.to(devices[name]) for part in pair) for name, pair in state.items()}
