"""Images a second in training on MPI3D-Complex, data included, against the plain pipeline.

    python benchmarks/mpi3d_step.py                       # on the CPU, batches of 64
    python benchmarks/mpi3d_step.py --device cuda         # on a GPU, batches of 256 as in the paper
    python benchmarks/mpi3d_step.py --device cuda --workers 8    # ... and the plain pipeline with 8 processes

A step is what main_mpi3dreal.py runs: images and tokens of a batch, both encoders, loss, gradients, clipping, Adam. The plain
form is a DataLoader of single items, normalised one by one and one-hot, and a loss computed once for each modality. Each form
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

import image_text
import main_mpi3dreal
from datasets import EpochOrder
from latent_spaces import seeded_generator
from running.optimisation import Adam
from running.training import GRADIENT_NORM, autocast, describe_device, matrix_precision, select_device

FORMS = {"cpu": ["plain", "fp32", "bf16"], "cuda": ["plain", "fp32", "tf32", "bf16"]}


def plain_loss(h_x, h_t, tau):
    """The loss once with the images first and once with the captions first, by the similarities of all with all."""

    def one_way(h_a, h_b):
        h = torch.cat((h_a, h_b))
        logits = nn.functional.cosine_similarity(h[:, None], h[None], dim=2) / tau
        logits = logits.masked_fill(torch.eye(len(h), dtype=torch.bool, device=h.device), float("-inf"))
        partner = torch.arange(len(h), device=h.device).roll(len(h_a))
        return nn.functional.cross_entropy(logits, partner)

    return (one_way(h_x, h_t) + one_way(h_t, h_x)) / 2


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
    args, given = main_mpi3dreal.parse_flags(flags)
    main_mpi3dreal.apply_recipe(args, given, main_mpi3dreal.RECIPES)
    device = select_device(args)
    pairs, setting = image_text.open_pairs(main_mpi3dreal.EXPERIMENT, args, device)
    encoders = image_text.build_encoders(main_mpi3dreal.EXPERIMENT, args, pairs, setting, device)
    image_text.set_weights(encoders, pairs, args)
    if form == "plain":
        batches = plain_batches(args, options.workers, device)
        encoders = {
            "encoder_img": PlainImages(encoders["encoder_img"]),
            "encoder_txt": OneHotText(encoders["encoder_txt"]),
        }
    parameters = [parameter for encoder in encoders.values() for parameter in encoder.parameters()]
    if form == "plain":
        optimiser = torch.optim.Adam(parameters, lr=args.lr)
    else:
        order = EpochOrder(len(pairs.splits["train"]), seeded_generator(0, "order"), pairs.images.index_device)
        optimiser = Adam(parameters)

    def synchronise():
        if device.type == "cuda":
            torch.cuda.synchronize()

    with matrix_precision(args.precision):
        for step in range(options.steps + 2):
            if step == 2:
                synchronise()
                started = time.perf_counter()
            optimiser.zero_grad()
            with autocast(device, args.precision):
                if form == "plain":
                    images, captions = next(batches)
                    loss = plain_loss(encoders["encoder_img"](images), encoders["encoder_txt"](captions), args.tau)
                else:
                    loss = image_text.batch_loss(encoders, pairs, order, args)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
            optimiser.step(*(() if form == "plain" else (args.lr,)))
    synchronise()
    return options.steps * args.batch_size / (time.perf_counter() - started)


def main():
    """Time every form in a process of its own and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(FORMS), default="cpu")
    parser.add_argument("--datapath", default="data/MPI3d_real_complex")
    parser.add_argument("--batch-size", type=int, help="256 on a GPU, 64 on the CPU")
    parser.add_argument("--steps", type=int, help="100 on a GPU, 3 on the CPU")
    parser.add_argument("--workers", type=int, default=0, help="processes of the plain DataLoader (%(default)s)")
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
        command += [
            "--batch-size",
            str(options.batch_size),
            "--steps",
            str(options.steps),
            "--workers",
            str(options.workers),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{form:6} failed with exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
            continue
        rates[form] = float(done.stdout)
        ratio = f"  {rates[form] / rates['plain']:.1f} × plain" if "plain" in rates else ""
        print(f"{form:6} {rates[form]:9.1f} images/s{ratio}", flush=True)


if __name__ == "__main__":
    main()
