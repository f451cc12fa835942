"""What test_ranks.py starts in several processes: calls of training scripts one after another, on small models.

    python -m tests.several_processes PLAN

PLAN: JSON, dict name → call, a dict: script; flags; flags_of_last, what the last process has beside them; in_last, what happens
in the last process: [step, name of a signal], or a text for a user's error when it opens its data, or {"data": fingerprint}.
Each process prints to stderr, for every call, the call's name, what the script writes, and the exit code.
"""

import json
import os
import signal
import sys

import torch
from torch import nn

import image_text
import latent_spaces
import main_mpi3dreal
import main_numeric
import mlp_probes
from encoders import TextEncoder
from running import ranks, training
from running.command_line import InputError, run_script

SCRIPTS = {"numeric": main_numeric, "mpi3d": main_mpi3dreal}


class SmallImageEncoder(nn.Module):
    """Stands for the ResNet-18, with its batch normalisation."""

    def __init__(self, encoding_size, mean, std, hidden_size=100):
        super().__init__()
        self.convolution, self.normalisation = nn.Conv2d(3, 4, 8, stride=8, bias=False), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4 * 64, encoding_size)

    def forward(self, images):
        x = images.permute(0, 3, 1, 2).float() / 255
        return self.linear(self.normalisation(self.convolution(x)).relu().flatten(1))


class FixedBiases(TextEncoder):
    """Its convolutions' biases have no gradient but that of rounding, which Adam would make whole steps of."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for layer in self.convolutions:
            if isinstance(layer, nn.Conv2d):
                layer.bias.requires_grad_(False)


def shorten():
    """Small encoders, few draws, short probes, no drawing."""
    torch.set_num_threads(1)
    main_numeric.EVAL_BATCH, latent_spaces.CONDITION_DRAWS, mlp_probes.MAX_EPOCHS = 300, 1000, 5
    image_text.PROBE_STEPS["paper"] = None
    image_text.ImageEncoder, image_text.TextEncoder = SmallImageEncoder, FixedBiases
    for script in SCRIPTS.values():
        script.plot_factor_scores = lambda tables, path, *_: path.write_bytes(b"drawn")


def call(script, flags, flags_of_last="", in_last=None):
    """Run a script as a user does; returns the exit code and [loss, norm of the gradient] of every step."""
    module, is_last, steps = SCRIPTS[script], ranks.rank() == ranks.size() - 1, []
    words, in_last = [*flags.split(), *(flags_of_last.split() if is_last else ())], in_last if is_last else None

    def noted(experiment, optimiser, share_done):
        if isinstance(in_last, list) and len(steps) == in_last[0]:
            os.kill(os.getpid(), signal.Signals[in_last[1]])
        loss, norm = training_step(experiment, optimiser, share_done)
        steps.append([loss.item(), norm.item()])
        return loss, norm

    def details(experiment):
        if isinstance(in_last, str):
            raise InputError(in_last)
        return real_details(experiment) | (in_last if isinstance(in_last, dict) else {})

    kind = main_numeric.NumericExperiment if script == "numeric" else main_mpi3dreal.Mpi3dExperiment
    training_step, real_details = training.training_step, kind.details
    training.training_step, kind.details = noted, details
    try:
        run_script(lambda: module.main(words))
    except SystemExit as ended:
        return ended.code, steps
    finally:
        training.training_step, kind.details = training_step, real_details


def main():
    """Carry out the plan; writes what the first process saw to stdout, as JSON: dict name → [exit code, steps]."""
    shorten()
    seen = {}
    with ranks.joined():
        for name, plan in json.loads(sys.argv[1]).items():
            print(f"call {name}", file=sys.stderr, flush=True)
            seen[name] = call(**plan)
            print(f"code {seen[name][0]}", file=sys.stderr, flush=True)
        code = seen[name][0]
        if ranks.rank() == 0:
            print(f"\n{json.dumps(seen)}", flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
