"""Time and memory of one training step at the paper's size, against the plain formulation.

    python benchmarks/numeric_step.py                      # on the CPU: fp32, and bf16 where the CPU computes it
    python benchmarks/numeric_step.py --device cuda        # on a GPU: fp32, tf32 and bf16

A step is what main_numeric.py runs: sampling, mixing, both encoders, loss, gradients, clipping, Adam. The plain form is
the textbook's: four encoder passes and the B × B × D tensor of differences. Each form runs in a process of its own, in
turn, so that peak memory is its own and a machine whose speed drifts is fair to all. The floor is the step's matrix
products at the rate of one large matrix product, measured in the same run.
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

import main_numeric
from encoders import initialise
from latent_spaces import MisalignedLatents, seeded_generator
from running.optimisation import Adam
from running.training import GRADIENT_NORM, autocast, describe_device, matrix_precision, select_device

FORMS = {"cpu": ["plain", "fp32", "bf16"], "cuda": ["plain", "fp32", "tf32", "bf16"]}


def plain_loss(networks, latents, batch_size, generator):
    """Eq. 2 as a textbook writes it."""
    z, z_negative = latents.sample(batch_size, generator), latents.sample(batch_size, generator)
    g_x, g_t, f_x, f_t = (networks[name] for name in ("g_x", "g_t", "f_x", "f_t"))
    h_x, h_t = f_x(g_x(z.z_x)), f_t(g_t(z.z_t))
    n_x, n_t = f_x(g_x(z_negative.z_x)), f_t(g_t(z_negative.z_t))

    def anchor_loss(a, p, n):
        positive = ((a - p) ** 2).sum(dim=1)
        negative = ((a[:, None] - n[None]) ** 2).sum(dim=2)
        logits = torch.cat((-positive[:, None], -negative), dim=1)
        return (positive + torch.logsumexp(logits, dim=1) - torch.tensor(len(n) + 1.0).log()).mean()

    return (anchor_loss(h_x, h_t, n_x) + anchor_loss(h_t, h_x, n_t)) / 2


def set_up(form, device_name, small):
    """(networks, latents, args, device): the setting of the paper's runs, the same for every form."""
    flags = ["--precision", "fp32" if form == "plain" else form, "--seed", "0"] + (
        ["--no-cuda"] if device_name == "cpu" else []
    )
    if small:
        flags += ["--batch-size", "256", "--semantics-n", "4", "--theta-value", "14", "--modality-n", "2"]
    args, given = main_numeric.parse_flags(flags)
    main_numeric.apply_recipe(args, given, main_numeric.RECIPES)
    device = select_device(args)
    latents = MisalignedLatents(args.semantics_n, args.modality_n, args.theta_value, -1, 0, device=device)
    networks = main_numeric.build_networks(args, latents)
    generator = seeded_generator(0, "init")
    for name, network in networks.items():
        if name.startswith("f"):
            initialise(network.cpu(), "he", generator).to(device)
        else:  # any mixing serves for timing
            for layer in network.layers:
                nn.init.orthogonal_(layer.weight.cpu(), generator=generator)
    if form == "plain":
        for name in ("f_x", "f_t"):
            for position, layer in enumerate(networks[name]):
                if isinstance(layer, nn.LeakyReLU):
                    networks[name][position] = nn.LeakyReLU(0.01)
    return networks, latents, args, device


def time_form(form, device_name, steps, small):
    """Seconds of each of `steps` steps after two of warm-up, and peak memory in bytes: a dict for JSON."""
    networks, latents, args, device = set_up(form, device_name, small)
    parameters = [p for name in ("f_x", "f_t") for p in networks[name].parameters()]
    optimiser = torch.optim.Adam(parameters, lr=args.lr) if form == "plain" else Adam(parameters)
    generator = seeded_generator(0, "train", device)

    def synchronise():
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = []
    with matrix_precision(args.precision):
        for step in range(steps + 2):
            synchronise()
            started = time.perf_counter()
            optimiser.zero_grad()
            with autocast(device, args.precision):
                if form == "plain":
                    loss = plain_loss(networks, latents, args.batch_size, generator)
                else:
                    loss = main_numeric.batch_loss(networks, latents, args.batch_size, "independent", generator)
            loss.backward()
            loss = loss.detach()
            torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
            optimiser.step(*(() if form == "plain" else (args.lr,)))
            synchronise()
            if step > 1:
                times.append(time.perf_counter() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    return {"times": times, "memory": memory}


def gradient_error(small):
    """Relative difference of loss and gradients between the two forms in fp32, on the same pairs and negatives."""
    networks, latents, args, _ = set_up("fp32", "cpu", small)
    parameters = [p for name in ("f_x", "f_t") for p in networks[name].parameters()]

    class Replayed:
        """Latents that hand out the halves of one draw, as the plain form asks for them."""

        def __init__(self):
            self.whole = latents.sample(2 * args.batch_size, seeded_generator(0, "train"))
            self.calls = 0

        def sample(self, size, generator):
            if size == 2 * args.batch_size:
                return self.whole
            half = slice(self.calls * size, (self.calls + 1) * size)
            self.calls += 1
            parts = [getattr(self.whole, name)[half] for name in ("s", "s_tilde", "m_x", "m_t")]
            return type(self.whole)(*parts, self.whole.selected)

    results = []
    for compute in (lambda: main_numeric.batch_loss(networks, Replayed(), args.batch_size, "independent", None),
                    lambda: plain_loss(networks, Replayed(), args.batch_size, None)):  # fmt: skip
        loss = compute()
        gradients = torch.autograd.grad(loss, parameters)
        results.append((loss.item(), torch.cat([g.flatten() for g in gradients]).double()))
        del loss, gradients
    (loss, gradient), (plain, plain_gradient) = results
    return {
        "loss": abs(loss - plain) / abs(plain),
        "gradient": ((gradient - plain_gradient).norm() / plain_gradient.norm()).item(),
    }


def matrix_rate(form, device_name, small):
    """FLOP/s of one large product, the median of fifteen, in the precision of `form`."""
    networks, _, args, device = set_up(form, device_name, small)
    dtype = torch.bfloat16 if form == "bf16" else torch.float32
    width = networks["f_x"][4].in_features
    a = torch.randn(2 * args.batch_size, width, dtype=dtype, device=device)
    b = torch.randn(width, width, dtype=dtype, device=device)
    out = torch.empty_like(a)
    times = []
    for _ in range(17):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * len(a) * width**2 / statistics.median(times[2:])


def matrix_flops(small):
    """FLOPs of the encoders' matrix products in one step: forward, gradient of the weights, and of the inputs but the first."""
    networks, _, args, _ = set_up("fp32", "cpu", small)
    total = 0
    for name in ("f_x", "f_t"):
        layers = [layer for layer in networks[name] if isinstance(layer, nn.Linear)]
        total += sum(2 * layer.weight.numel() * (2 if layer is layers[0] else 3) for layer in layers)
    return total * 2 * args.batch_size


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each form, in turn (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps in each process (%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="time bf16 on a CPU that emulates it, too")
    parser.add_argument("--small", action="store_true", help="a small problem, to see that the benchmark runs")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work = {"rate": matrix_rate, "time": time_form}
        kind, form = args.worker.split(":")
        print(json.dumps(gradient_error(args.small) if kind == "check" else
                         work[kind](form, args.device, *([args.steps] if kind == "time" else []), args.small)))  # fmt: skip
        return
    forms = list(FORMS[args.device])
    native = "bf16" in forms and (args.bf16 or args.device == "cuda" or _cpu_has_bf16())
    if not native:
        forms.remove("bf16")
    measured = {form: [] for form in forms}
    rates = {form: [] for form in forms}
    for _ in range(args.rounds):
        for form in forms:
            measured[form].append(_in_process(f"time:{form}", args))
            rates[form].append(_in_process(f"rate:{form}", args))
    flops = matrix_flops(args.small)
    device = torch.device(args.device)
    print(f"{describe_device(device)}; torch {torch.__version__}")
    print(f"{args.rounds} processes of {args.steps} steps of each form, in turn")
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
    if args.device == "cpu":
        error = _in_process("check:fp32", args)
        print(
            f"fp32 against plain: loss within {error['loss']:.1e}, gradients within {error['gradient']:.1e} (relative)"
        )
    if not native:
        print("bf16 is left out: this CPU only emulates it (--bf16 times it all the same)")


def _cpu_has_bf16():
    from running.training import has_fast_bf16

    return has_fast_bf16(torch.device("cpu"))


def _in_process(work, args):
    command = [sys.executable, __file__, "--worker", work, "--device", args.device, "--steps", str(args.steps)]
    done = subprocess.run(command + (["--small"] if args.small else []), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
