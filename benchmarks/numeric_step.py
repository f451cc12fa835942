"""Time and memory of one training step at the paper's size, against the plain formulation.

    python benchmarks/numeric_step.py                                    # on the CPU: fp32, and bf16 where the CPU computes it
    python benchmarks/numeric_step.py --device cuda                      # on a GPU: fp32, tf32 and bf16
    python benchmarks/numeric_step.py --recipe fast --theta-value 385 --share-done 0.99    # a late step of the fast recipe

A step is `training_step`, which main_numeric.py runs: sampling, mixing, both encoders, loss, gradients, whitening, clipping,
Adam; flags that are not the benchmark's own go to the experiment. The plain form is the textbook's: an encoder pass for each
batch, the B × B × D tensor of differences, torch.optim.Adam. Each form runs in a process of its own, in turn, so that peak
memory is its own and a machine whose speed drifts is fair to all. The floor is the step's matrix products at the rate of one
large matrix product, measured in the same run.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from encoders import initialise
from latent_spaces import seeded_generator
from losses import textbook_multimodal_loss
from main_numeric import NumericExperiment
from running.command_line import Parser, integer, run_script
from running.devices import describe_device, has_fast_bf16, keep_freed_memory, select_device
from running.optimisation import GRADIENT_NORM, make_optimiser, training_step
from running.schedules import batch_size

FORMS = {"cpu": ["plain", "fp32", "bf16"], "cuda": ["plain", "fp32", "tf32", "bf16"]}


class PlainExperiment(NumericExperiment):
    """The same model and samples, with the loss as a textbook writes it and an encoder pass for each batch."""

    def loss(self, share_done):
        """Eq. 2."""
        pairs, generator = batch_size(self.args, share_done), self.generators["train"]
        _, h_x, h_t = self.sample(pairs, generator)
        if self.args.negatives == "batch":
            return textbook_multimodal_loss(h_x, h_t)
        _, negatives_x, negatives_t = self.sample(pairs, generator)
        return textbook_multimodal_loss(h_x, h_t, negatives_x, negatives_t)


def set_up(form, options):
    """A model of the paper's setting, or of options.flags, the same for every form."""
    precision = "fp32" if form == "plain" else form
    flags = ["--seed", "0", *(["--no-cuda"] if options.device == "cpu" else [])]
    if options.small:
        flags += ["--batch-size", "256", "--semantics-n", "4", "--theta-value", "14", "--modality-n", "2"]
    args, _ = NumericExperiment.parse_flags([*flags, *options.flags, "--precision", precision])
    NumericExperiment.settle(args)
    keep_freed_memory()
    model = (PlainExperiment if form == "plain" else NumericExperiment)(args, select_device(args.no_cuda))
    generator = seeded_generator(0, "init")
    for name, network in model.networks.items():
        network.cpu()
        if name.startswith("f"):
            initialise(network, "he", generator)
        else:  # any mixing serves for timing
            for layer in network.layers:
                nn.init.orthogonal_(layer.weight, generator=generator)
        network.to(model.device)
    if form == "plain":
        for encoder in model.modules.values():
            for layer in encoder:
                if isinstance(layer, nn.LeakyReLU):
                    layer.inplace = False
    return model


def time_form(form, options):
    """Seconds of each of options.steps steps after two of warm-up, and peak memory in bytes: a dict for JSON."""
    model = set_up(form, options)
    parameters = [parameter for module in model.modules.values() for parameter in module.parameters()]
    plain = torch.optim.Adam(parameters, lr=model.args.lr) if form == "plain" else None
    optimiser = make_optimiser(model.modules, model.args, model.rates)

    def plain_step():
        plain.zero_grad()
        model.loss(options.share_done).backward()
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
        plain.step()

    times = []
    for _ in range(options.steps + 2):
        torch.get_device_module(model.device).synchronize()
        started = time.perf_counter()
        plain_step() if plain else training_step(model, optimiser, options.share_done)
        torch.get_device_module(model.device).synchronize()
        times.append(time.perf_counter() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if model.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    return {"times": times[2:], "memory": memory}


def gradient_error(_, options):
    """Relative difference of loss and gradients between the two forms in fp32, on the same encodings of pairs and negatives."""
    model = set_up("fp32", options)
    pairs = batch_size(model.args, options.share_done)
    parameters = [parameter for module in model.modules.values() for parameter in module.parameters()]
    loss = model.loss(options.share_done)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()
    generator = seeded_generator(0, "train", model.device)
    if model.args.negatives == "batch":
        plain = textbook_multimodal_loss(*model.sample(pairs, generator)[1:])
    else:
        (h_x, negatives_x), (h_t, negatives_t) = (h.chunk(2) for h in model.sample(2 * pairs, generator)[1:])
        plain = textbook_multimodal_loss(h_x, h_t, negatives_x, negatives_t)
    plain_gradient = torch.cat([g.flatten() for g in torch.autograd.grad(plain, parameters)]).double()
    error = ((gradient - plain_gradient).norm() / plain_gradient.norm()).item()
    return {"loss": abs(loss.item() - plain.item()) / abs(plain.item()), "gradient": error}


def matrix_rate(form, options):
    """FLOP/s of one large product, the median of fifteen, in the precision of `form`: a dict for JSON."""
    model = set_up(form, options)
    dtype = torch.bfloat16 if form == "bf16" else torch.float32
    width, rows = model.networks["f_x"][4].in_features, 2 * batch_size(model.args, options.share_done)
    a = torch.randn(rows, width, dtype=dtype, device=model.device)
    b = torch.randn(width, width, dtype=dtype, device=model.device)
    out, times = torch.empty_like(a), []
    for _ in range(17):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        torch.get_device_module(model.device).synchronize()
        times.append(time.perf_counter() - started)
    return {"rate": 2 * rows * width**2 / statistics.median(times[2:])}


def matrix_flops(options):
    """FLOPs of the encoders' matrix products in one step: forward, gradient of the weights, and of the inputs but the first."""
    model, total = set_up("fp32", options), 0
    for encoder in model.modules.values():
        layers = [layer for layer in encoder if isinstance(layer, nn.Linear)]
        total += sum(2 * layer.weight.numel() * (2 if layer is layers[0] else 3) for layer in layers)
    batches = 1 if model.args.negatives == "batch" else 2
    return total * batches * batch_size(model.args, options.share_done)


WORK = {"rate": matrix_rate, "time": time_form, "check": gradient_error}


def main():
    """Time every form in processes of its own, in turn, and print a line for each."""
    parser = Parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=integer(1), default=5, help="processes of each form, in turn (%(default)s)")
    parser.add_argument("--steps", type=integer(1), default=2, help="timed steps in each process (%(default)s)")
    parser.add_argument("--share-done", type=float, default=0.0, help="of the training, for the batch's size (%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="time bf16 on a CPU that emulates it, too")
    parser.add_argument("--small", action="store_true", help="a small problem, to see that the benchmark runs")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options, options.flags = parser.parse_known_args()
    if options.worker:
        kind, form = options.worker.split(":")
        return print(json.dumps(WORK[kind](form, options)))
    forms, device = list(FORMS[options.device]), torch.device(options.device)
    native = options.bf16 or has_fast_bf16(device)
    if not native:
        forms.remove("bf16")
    measured, rates = ({form: [] for form in forms} for _ in range(2))
    for _ in range(options.rounds):
        for form in forms:
            measured[form].append(in_process(f"time:{form}"))
            rates[form].append(in_process(f"rate:{form}")["rate"])
    flops = matrix_flops(options)
    print(f"{describe_device(device)}; torch {torch.__version__}")
    print(f"{options.rounds} processes of {options.steps} steps of each form, in turn")
    titles = ("form", "median", "min - max", "against plain", "peak memory", "matrix rate", "of the floor")
    print("{:>6}  {:>8}  {:>17}  {:>13}  {:>11}  {:>12}  {:>12}".format(*titles))
    plain = statistics.median(t for m in measured["plain"] for t in m["times"])
    for form in forms:
        times = [t for m in measured[form] for t in m["times"]]
        rate, median = statistics.median(rates[form]), statistics.median(times)
        memory = max(m["memory"] for m in measured[form])
        print(
            f"{form:>6}  {median:7.3f}s  {min(times):7.3f} - {max(times):6.3f}s  {plain / median:12.1f}x  "
            f"{memory / 1e9:8.2f} GB  {rate / 1e9:7.0f} GF/s  {flops / rate / median:12.2f}"
        )
    error = in_process("check:fp32")
    print(f"fp32 against plain: loss within {error['loss']:.1e}, gradients within {error['gradient']:.1e} (relative)")
    if not native:
        print("bf16 is left out: this CPU only emulates it (--bf16 times it all the same)")


def in_process(work):
    """What WORK gives in a process of its own, with the flags of this one."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", work]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    run_script(main)
