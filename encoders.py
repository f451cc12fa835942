"""The encoders that contrastive learning trains."""

import copy
import math
from itertools import pairwise

import scipy.linalg
import torch
from torch import nn

CAPTION_LENGTHS = range(4, 165)  # tokens that a TextEncoder reads
TINY_OUTPUT = 4  # pixels of a convolution's output
SMALLEST_VARIANCE = 1e-12  # of a direction of encodings, in units of all of theirs
CPU_ROWS = 512  # rows whose activations of one layer stay in a CPU's cache; the gradients' temporaries shrink with them


def hidden_widths(sizes, input_size):
    """List of the units of hidden layers: of a text like "60,60,60", or for "paper" 10d, 50d, 50d, 50d, 50d, 10d of d inputs."""
    if sizes == "paper":
        return [factor * input_size for factor in (10, 50, 50, 50, 50, 10)]
    return [int(units) for units in sizes.split(",")]


class MLPEncoder(nn.Sequential):
    """f: R^d → R^D for numeric observations, LeakyReLU(0.01) between layers.

    hidden_sizes: of the hidden layers, as `hidden_widths` has them.
    """

    def __init__(self, input_size, encoding_size, hidden_sizes="paper"):
        widths = [input_size, *hidden_widths(hidden_sizes, input_size), encoding_size]
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
def narrowed(encoders, encodings, size):
    """List of copies of two encoders that keep the `size` directions along which the encodings of a pair agree best.

    encodings: of pairs, two of (N, D), which the last linear layer of each encoder gives. The directions have the largest ratio
    of covariance across the two to variance within, and the copies' encodings are their projections onto what these span.
    """
    a, b = ((h.double() - h.double().mean(dim=0)).cpu() for h in encodings)
    across, within = a.T @ b + b.T @ a, a.T @ a + b.T @ b
    floor = (SMALLEST_VARIANCE * within.trace()).clamp_min(1e-100)  # along some, or all, they may not vary
    within.diagonal().add_(floor)
    _, directions = scipy.linalg.eigh(across, within)
    directions = torch.linalg.qr(torch.from_numpy(directions[:, ::-1][:, :size].copy()))[0]
    copies = [copy.deepcopy(encoder) for encoder in encoders]
    for layer in ([layer for layer in encoder.modules() if isinstance(layer, nn.Linear)][-1] for encoder in copies):
        projection = directions.T.to(layer.weight.device)
        weight, bias = projection @ layer.weight.double(), projection @ layer.bias.double()
        layer.weight, layer.bias = (nn.Parameter(part.to(layer.weight.dtype)) for part in (weight, bias))
        layer.out_features = size
    return copies


class SmallOutputConv2d(nn.Conv2d):
    """Conv2d that is the product of a matrix of patches with the weights where the output is tiny.

    It has no bias, dilation or groups, as in a ResNet. CPU libraries divide the work of a convolution along its output,
    and take four times as long over one of 2 × 2.
    """

    def forward(self, x):
        """(B, C, H, W) → (B, C', H', W')."""
        (height, width), (stride, _) = self.kernel_size, self.stride
        rows, columns = ((x.shape[2 + k] + 2 * self.padding[k] - self.kernel_size[k]) // stride + 1 for k in (0, 1))
        if x.is_cuda or rows * columns > TINY_OUTPUT:
            return super().forward(x)
        patches = nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0) + 2 * (self.padding[1],) + 2 * (self.padding[0],))
        patches = patches.unfold(1, height, stride).unfold(2, width, stride)  # (B, H', W', C, height, width)
        # the order in which channels-last weights lie in memory
        patches = patches.permute(0, 1, 2, 4, 5, 3).flatten(3)
        return (patches @ self.weight.permute(0, 2, 3, 1).flatten(1).T).permute(0, 3, 1, 2)


class ImageEncoder(nn.Module):
    """f: images → R^D: ResNet-18 (He et al., 2016) without pretrained weights → LeakyReLU(0.01) → linear."""

    def __init__(self, encoding_size, mean, std, hidden_size=100):
        """Encoder of images whose channels, scaled to [0, 1], have that mean and standard deviation."""
        from torchvision.models import resnet18  # a slow import, which numeric experiments need not wait for

        super().__init__()
        self.resnet = resnet18(weights=None, num_classes=hidden_size)
        for layer in self.resnet.modules():  # the last four make 2 × 2 from images of 64 × 64
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                layer.__class__ = SmallOutputConv2d
        self.linear = nn.Linear(hidden_size, encoding_size)
        self.register_buffer("mean", 255 * torch.tensor(mean), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std), persistent=False)
        # the images' own order in memory, and the faster one for convolutions
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        """(B, H, W, 3) uint8 images → (B, D)."""
        x = ((images - self.mean) / self.std).permute(0, 3, 1, 2)
        return self.linear(nn.functional.leaky_relu(self.resnet(x), 0.01))


class TextEncoder(nn.Module):
    """f: captions of L tokens → R^D: each token to R^128, then convolutions over the L × 128 image, then linear.

    Convolutions 4 × 4 of stride 2, each with batch normalisation and ReLU, halve the image while both sides are at least 4.
    """

    WIDTH, CHANNELS = 128, (25, 50, 100, 200)  # the last number of channels goes on

    def __init__(self, vocabulary_size, length, encoding_size):
        """Encoder of captions of `length` tokens; ValueError unless it is one of CAPTION_LENGTHS."""
        if length not in CAPTION_LENGTHS:
            raise ValueError(f"captions of {length} tokens, expected {CAPTION_LENGTHS[0]} to {CAPTION_LENGTHS[-1]} with {{eos}}")
        super().__init__()
        # of one-hot tokens: the weights are (128, V) as anyone's linear layer, so its initialisation and files are too
        self.embedding = nn.Linear(vocabulary_size, self.WIDTH)
        layers, channels, height, width = [], 1, length, self.WIDTH
        while height >= 4 and width >= 4:
            out_channels = self.CHANNELS[min(len(layers) // 3, len(self.CHANNELS) - 1)]
            layers += [nn.Conv2d(channels, out_channels, 4, stride=2, padding=1, bias=True)]
            layers += [nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
            channels, height, width = out_channels, height // 2, width // 2
        self.convolutions = nn.Sequential(*layers)
        self.linear = nn.Linear(channels * height * width, encoding_size)

    def forward(self, tokens):
        """(B, L) int64 token numbers → (B, D)."""
        # one-hot vectors times a matrix are a look-up of its columns
        x = nn.functional.embedding(tokens, self.embedding.weight.T) + self.embedding.bias
        return self.linear(self.convolutions(x.unsqueeze(1)).flatten(1))


@torch.no_grad()
def initialise(module, init, generator):
    """Redraw the linear and convolutional layers of `module` in place from `generator`; returns the module.

    "default": PyTorch's own U(−1/√fan_in, 1/√fan_in) for weights and biases, and torchvision's N(0, 2/fan_out) for the
    convolutions of a ResNet, which are those without biases. "he": weights N(0, 2/((1 + a²) fan_in)) for
    LeakyReLU(a = 0.01), zero biases (He et al., 2015), so that the signal keeps its scale from layer to layer.
    """
    for layer in module.modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        fan_in = layer.weight[0].numel()
        if init == "he":
            layer.weight.normal_(0, math.sqrt(2 / (1 + 0.01**2) / fan_in), generator=generator)
        elif init == "default" and isinstance(layer, nn.Conv2d) and layer.bias is None:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
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


def initialise_all(modules, init, generator, device):
    """`initialise` each of some modules, in order, from a generator on the CPU, and leave them on `device`."""
    for module in modules:
        initialise(module.cpu(), init, generator).to(device)
