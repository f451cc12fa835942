"""The encoders that contrastive learning trains."""

import math
from itertools import pairwise

import torch
from torch import nn

CPU_ROWS = 512  # rows whose activations of one layer stay in a CPU's cache; the gradients' temporaries shrink with them


class MLPEncoder(nn.Sequential):
    """f: R^d → R^D for numeric observations: d → 10d → 50d → 50d → 50d → 50d → 10d → D, LeakyReLU(0.01) between layers."""

    def __init__(self, input_size, encoding_size):
        widths = [input_size, *(factor * input_size for factor in (10, 50, 50, 50, 50, 10)), encoding_size]
        layers = []
        for fan_in, fan_out in pairwise(widths):
            # in place: the gradient of LeakyReLU needs the sign of its output alone
            layers += [nn.Linear(fan_in, fan_out), nn.LeakyReLU(0.01, inplace=True)]
        super().__init__(*layers[:-1])

    def forward(self, x):
        """(B, d) → (B, D) float32; on a CPU a block of rows at a time."""
        blocks = 1 if x.is_cuda else math.ceil(len(x) / CPU_ROWS)
        if blocks <= 1:
            return super().forward(x)
        return torch.cat([super(MLPEncoder, self).forward(block) for block in x.chunk(blocks)])


@torch.no_grad()
def initialise(module, init, generator):
    """Redraw the linear and convolutional layers of `module` in place from `generator`; returns the module.

    "default": PyTorch's own U(−1/√fan_in, 1/√fan_in) for weights and biases. "he": weights N(0, 2/((1 + a²) fan_in)) for
    LeakyReLU(a = 0.01), zero biases (He et al., 2015), so that the signal keeps its scale from layer to layer.
    """
    for layer in module.modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        fan_in = layer.weight[0].numel()
        if init == "he":
            layer.weight.normal_(0, math.sqrt(2 / (1 + 0.01**2) / fan_in), generator=generator)
        elif init == "default":
            layer.weight.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
        else:
            raise ValueError(f"init {init!r} is none of: default, he")
        if layer.bias is not None:
            if init == "he":
                layer.bias.zero_()
            else:
                layer.bias.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
    return module
