"""Images a second in training on MPI3D-Complex, data included, against the plain pipeline.

    python benchmarks/mpi3d_step.py                       # on the CPU, batches of 64
    python benchmarks/mpi3d_step.py --device cuda         # on a GPU, batches of 256 as in the paper
    python benchmarks/mpi3d_step.py --device cuda --workers 8    # ... and the plain pipeline with 8 processes

A step is `training_step`, which main_mpi3dreal.py runs: images and tokens of a batch, both encoders, loss, gradients, clipping,
Adam. The plain form is a DataLoader of single items, normalised one by one and one-hot, and the textbook's loss. Each form
runs in a process of its own, in turn, so that a machine whose speed drifts is fair to all.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from mpi3d_data import PlainDataset
from torch import nn
from torchvision.models import resnet18

from losses import textbook_image_text_loss
from main_mpi3dreal import Mpi3dExperiment
from running.command_line import Parser, integer, run_script
from running.devices import describe_device, keep_freed_memory, select_device
from running.optimisation import GRADIENT_NORM, make_optimiser, training_step

FORMS = {"cpu": ["plain", "fp32", "bf16"], "cuda": ["plain", "fp32", "tf32", "bf16"]}


class PlainImages(nn.Module):
    """The image encoder for normalised images (B, 3, H, W), with torchvision's ResNet-18 as it comes."""

    def __init__(self, encoder):
        super().__init__()
        self.resnet = resnet18(weights=None, num_classes=encoder.linear.in_features).to(encoder.linear.weight.device)
        self.resnet.load_state_dict(encoder.resnet.state_dict())
        self.linear = encoder.linear

    def forward(self, images):
        return self.linear(nn.functional.leaky_relu(self.resnet(images), 0.01))


class OneHotText(nn.Module):
    """The text encoder for one-hot tokens (B, L, V)."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, one_hot):
        x = self.encoder.embedding(one_hot).unsqueeze(1)
        return self.encoder.linear(self.encoder.convolutions(x).flatten(1))


def plain_batches(args, workers, device):
    """Endless batches of normalised images and one-hot captions."""
    dataset = PlainDataset(args.datapath, "train", f"{args.bias_type}_{args.bias_id}")
    loader = torch.utils.data.DataLoader(dataset, args.batch_size, shuffle=True, drop_last=True, num_workers=workers,
                                         pin_memory=device.type == "cuda")  # fmt: skip
    while True:
        for images, captions in loader:
            yield images.to(device), captions.to(device)


def time_form(form, options):
    """Images a second over the steps after two of warm-up."""
    flags = ["--datapath", options.datapath, "--precision", "fp32" if form == "plain" else form, "--seed", "0"]
    flags += ["--bias-id", "4", "--batch-size", str(options.batch_size)] + ["--no-cuda"] * (options.device == "cpu")
    args, _ = Mpi3dExperiment.parse_flags(flags)
    keep_freed_memory()
    model = Mpi3dExperiment(args, select_device(args.no_cuda))
    model.draw(None)
    optimiser = make_optimiser(model.modules, args, model.rates)
    if form == "plain":
        batches = plain_batches(args, options.workers, model.device)
        image, text = PlainImages(model.modules["encoder_img"]), OneHotText(model.modules["encoder_txt"])
        parameters = [*image.parameters(), *text.parameters()]
        optimiser = torch.optim.Adam(parameters, lr=args.lr)

    def plain_step():
        optimiser.zero_grad()
        images, captions = next(batches)
        textbook_image_text_loss(image(images), text(captions), args.tau).backward()
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
        optimiser.step()

    for step in range(options.steps + 2):
        if step == 2:
            torch.get_device_module(model.device).synchronize()
            started = time.perf_counter()
        plain_step() if form == "plain" else training_step(model, optimiser, 0.0)
    torch.get_device_module(model.device).synchronize()
    return options.steps * args.batch_size / (time.perf_counter() - started)


def main():
    """Time every form in a process of its own and print a line for each."""
    parser = Parser(__doc__)
    parser.add_argument("--device", choices=tuple(FORMS), default="cpu")
    parser.add_argument("--datapath", default="data/MPI3d_real_complex")
    parser.add_argument("--batch-size", type=integer(1), help="256 on a GPU, 64 on the CPU")
    parser.add_argument("--steps", type=integer(1), help="100 on a GPU, 3 on the CPU")
    parser.add_argument("--workers", type=integer(0), default=0, help="processes of the plain DataLoader (%(default)s)")
    parser.add_argument("--form", help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.batch_size = options.batch_size or (256 if on_gpu else 64)
    options.steps = options.steps or (100 if on_gpu else 3)
    if options.form:
        return print(json.dumps(time_form(options.form, options)))
    print(f"batches of {options.batch_size}, {describe_device(torch.device(options.device))}")
    rates = {}
    for form in FORMS[options.device]:
        command = [sys.executable, __file__, "--form", form, "--device", options.device, "--datapath", options.datapath]
        command += ["--batch-size", str(options.batch_size), "--steps", str(options.steps)]
        command += ["--workers", str(options.workers)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{form:6} failed with exit code {done.returncode}: {done.stderr.strip().splitlines()[-2:]}")
            continue
        rates[form] = float(done.stdout)
        ratio = f"  {rates[form] / rates['plain']:.1f} × plain" if "plain" in rates else ""
        print(f"{form:6} {rates[form]:9.1f} images/s{ratio}", flush=True)


if __name__ == "__main__":
    run_script(main)
