"""What tests of scripts and of the folders that they write and read share."""

import json

import pytest
from torch import nn

import image_text
import mlp_probes
from running import experiment
from running.command_line import run_script

# of a trained model of an experiment on images
IMAGE_TEXT_FILES = ["args.json", "checkpoint.pt", "encoder_img.pt", "encoder_txt.pt", "geometry.csv", "results.csv",
                    "results.png", "train_log.csv"]  # fmt: skip


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the program may catch it."""


class SmallImageEncoder(nn.Module):
    """Stands for the ResNet-18, with its batch normalisation, for images of 8 × side pixels: seconds instead of minutes."""

    def __init__(self, encoding_size, mean, std, hidden_size=100, side=8):
        super().__init__()
        self.convolution, self.normalisation = nn.Conv2d(3, 4, 8, stride=8), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4 * side**2, encoding_size)

    def forward(self, images):
        x = images.permute(0, 3, 1, 2).float() / 255
        return self.linear(self.normalisation(self.convolution(x)).relu().flatten(1))


def small_image_text_run(script, encoder, datapath, flags, tmp_path, capsys, monkeypatch):
    """run(flags) → (exit code, stdout, stderr) of a training script with a small encoder, short probes and no drawing."""
    monkeypatch.setattr(image_text, "ImageEncoder", encoder)
    monkeypatch.setattr(mlp_probes, "MAX_EPOCHS", 8)
    monkeypatch.setattr(script, "plot_factor_scores", lambda tables, path, *_: path.write_bytes(b"drawn"))

    def call(more="", model="m", base=flags):
        argv = ["--datapath", datapath, *base.split(), "--model-dir", tmp_path / "models", "--model-id", model]
        return outcome(capsys, script.main, *argv, *more.split())

    return call


def image_encoders_made(run, encoder, monkeypatch):
    """List of what a run of one step, which is not evaluated, makes its image encoders of: (size, mean, std, hidden size)."""
    made = []

    def noted(*arguments):
        made.append(arguments)
        return encoder(*arguments)

    monkeypatch.setattr(image_text, "ImageEncoder", noted)
    monkeypatch.setattr(experiment, "write_evaluation", lambda *_: {})
    monkeypatch.setattr(image_text.ImageTextExperiment, "monitor", lambda _: ({}, ""))
    assert run("--seed 1 --train-steps 1 --hidden-size 20")[0] == 0
    return made


def exit_code(main, *flags):
    """Exit code of a script's `main` with these flags, as a shell would see it."""
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: main([str(flag) for flag in flags]))
    return stopped.value.code or 0


def outcome(capsys, main, *flags):
    """(exit code, stdout, stderr) of a script's `main` with these flags."""
    capsys.readouterr()
    return exit_code(main, *flags), *capsys.readouterr()


def contents(folder):
    """Dict path within the folder → bytes of every file in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def forget_digests(directory):
    """Have args.json know no weights by their digest, as an earlier version left it."""
    stored = json.loads((directory / "args.json").read_text())
    stored.pop("weights")
    (directory / "args.json").write_text(json.dumps(stored))


def replace(path, content):
    """Put another file in the place of a linked one."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
