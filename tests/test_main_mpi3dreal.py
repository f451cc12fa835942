"""main_mpi3dreal.py as a user runs it: the files it writes, killing and resuming, and one line for whatever is wrong."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import encoders
import image_text
import main_mpi3dreal
import probes
from datasets import MPI3D_FILE, MPI3D_GRID, mpi3d_bias
from image_text import ImageTextExperiment
from losses import image_text_contrastive_loss, textbook_sigmoid_loss
from main_mpi3dreal import Mpi3dExperiment
from rendering_data.MPI3D.render_multimodal_mpi3d import render
from running import directory as store
from running import experiment
from running.directory import LATER_FLAGS
from running.schedules import temperature
from tests.scripts import IMAGE_TEXT_FILES, Killed, SmallImageEncoder, contents, image_encoders_made, small_image_text_run

ROOT = Path(main_mpi3dreal.__file__).parent
FLAGS = "--no-cuda --bias-id 1 --batch-size 12 --train-steps 12 --log-steps 5 --checkpoint-steps 4 --lr 0.01"


@pytest.fixture
def run(tmp_path, mpi3d, capsys, monkeypatch):
    """run(flags) → (exit code, stdout, stderr) of the script with a small encoder, short probes and no drawing."""
    return small_image_text_run(main_mpi3dreal, SmallImageEncoder, mpi3d, FLAGS, tmp_path, capsys, monkeypatch)


def test_a_run_writes_the_specified_files(run, tmp_path):
    code, out, err = run("--seed 1")
    assert code == 0, err
    directory = tmp_path / "models/m"
    assert sorted(contents(directory)) == IMAGE_TEXT_FILES
    results = pd.read_csv(directory / "results.csv")
    assert list(results.columns) == ["ix", "modality", "semantic_name", "mcc_logreg", "mcc_mlp"]
    assert list(zip(results.ix, results.semantic_name, strict=True)) == 2 * list(enumerate(MPI3D_GRID))
    assert results.modality.tolist() == ["image"] * 7 + ["text"] * 7
    assert results[["mcc_logreg", "mcc_mlp"]].abs().max(axis=None) <= 1
    log = pd.read_csv(directory / "train_log.csv")
    assert log.step.tolist() == [5, 10, 12] and {"loss", "image_OBJ_COLOR", "text_V_AXIS"} <= set(log.columns)
    for words in (
        "I_θ = {OBJ_COLOR, OBJ_SHAPE}; captions leave out {OBJ_SIZE, CAMERA, BACKGROUND, H_AXIS, V_AXIS}",
        "288 pairs to train, 96 to evaluate; images of 64 × 64",
        "text CNN → R^3",
        "OBJ_SHAPE *",
        "nonlinear MCC",
        "12 steps of 12 pairs",
    ):
        assert words in out
    stored = json.loads((directory / "args.json").read_text())
    assert stored["finished"] and stored["seed"] == 1 and stored["eval_seed"] == 2 and stored["bias_id"] == 1


def encoded(encoder, inputs, size, protocol):
    """(N, D) encodings: normalised by running statistics, or in training mode, `size` at a time, the last batch filled up."""
    encoder.train(protocol == "code")
    with torch.no_grad():
        if protocol == "paper":
            return encoder(inputs)
        whole = len(inputs) // size * size
        parts = [encoder(part) for part in inputs[:whole].split(size)]
        return torch.cat([*parts, encoder(inputs[-size:])[whole - len(inputs) :]])


@pytest.mark.parametrize("protocol", ["code", "paper"])
def test_results_are_the_probes_of_the_two_halves_of_test(run, tmp_path, mpi3d, protocol, monkeypatch):
    """Linear scores by scikit-learn, of encodings that are computed from the files of the run."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import matthews_corrcoef
    from sklearn.preprocessing import StandardScaler

    monkeypatch.setitem(image_text.PROBE_STEPS, "paper", 8)
    assert run(f"--seed 1 --train-steps 40 --batch-size 20 --protocol {protocol}")[0] == 0
    results = pd.read_csv(tmp_path / "models/m/results.csv").set_index(["modality", "semantic_name"]).mcc_logreg
    pairs, _ = main_mpi3dreal.load_mpi3d(mpi3d, "selection", 1)
    factors = pd.read_csv(mpi3d / "test/image_semantics.csv")
    half, rows = len(factors) // 2, torch.arange(len(factors))
    image, text = SmallImageEncoder(3, 0, 1), encoders.TextEncoder(len(pairs.vocabulary), pairs.length, 3)
    for encoder, file, inputs in (
        (image, "encoder_img.pt", pairs.images_of("test", rows)),
        (text, "encoder_txt.pt", pairs.tokens_of("test", rows)),
    ):
        encoder.load_state_dict(torch.load(tmp_path / "models/m" / file, weights_only=True))
        h = torch.cat([encoded(encoder, part, 20, protocol) for part in inputs.split(half)]).double().numpy()
        h = StandardScaler().fit(h[:half]).transform(h)
        for name in MPI3D_GRID:
            expected = 0.0
            if name != "V_AXIS":  # which is constant here
                model = LogisticRegression(max_iter=2000, tol=1e-6).fit(h[:half], factors[name][:half])
                expected = matthews_corrcoef(factors[name][half:], model.predict(h[half:]))
            modality = "image" if encoder is image else "text"
            assert results[modality, name] == pytest.approx(expected, abs=0.03), (modality, name)


@pytest.mark.parametrize("protocol", ["code", "paper"])
@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_changes_neither_statistics_nor_modes(mpi3d, protocol, training):
    flags = f"--datapath {mpi3d} --no-cuda --seed 1 --batch-size 20 --protocol {protocol}"
    model = Mpi3dExperiment(Mpi3dExperiment.parse_flags(flags.split())[0], torch.device("cpu"))
    model.modules["encoder_img"] = SmallImageEncoder(3, 0, 1)
    model.draw(None)
    for encoder in model.modules.values():
        encoder.train(training)
    before = {name: {key: value.clone() for key, value in state.items()} for name, state in model.weights().items()}
    rows = torch.arange(48)
    first = model.encode("test", rows)
    for name, state in model.weights().items():
        assert state.keys() == before[name].keys() and all(torch.equal(state[key], before[name][key]) for key in state)
        assert all(layer.training == training for layer in model.modules[name].modules())
    again, reversed_order = model.encode("test", rows), model.encode("test", rows.flip(0))
    for name, h in first.items():
        assert torch.equal(h, again[name])
        # whose batch a pair is in matters to its encoding under "code" alone
        change = (h - reversed_order[name].flip(0)).abs().max()
        assert (change > 1e-3) if protocol == "code" else (change < 1e-5)


def test_fewer_pairs_than_a_batch_are_one_batch_and_a_rest_of_one_is_no_batch():
    seen = []

    def encode(rows):
        seen.append(rows.tolist())
        return rows[:, None] + 0.0

    for count, batches in ((3, [[0, 1, 2]]), (9, [[0, 1, 2, 3], [4, 5, 6, 7], [5, 6, 7, 8]]), (4, [[0, 1, 2, 3]])):
        rows = torch.arange(count)
        assert torch.equal(image_text.encoded_by_batch(encode, rows, 4)[:, 0], rows + 0.0)
        assert seen == batches
        seen.clear()


def test_the_defaults_are_the_specified_ones():
    args, _ = Mpi3dExperiment.parse_flags([])
    defaults = {
        **{"datapath": "data/MPI3d_real_complex", "model_dir": "models", "model_id": None, "bias_type": "selection"},
        **{"bias_id": 4, "encoding_size": 0, "hidden_size": 100, "tau": 1.0, "lr": 1e-5, "batch_size": 256},
        **{"train_steps": 200001, "log_steps": 1000, "checkpoint_steps": 10000, "evaluate": False, "seed": None},
        **{"workers": 0, "no_cuda": False, "save_all_checkpoints": False, "load_args": False, "protocol": "code"},
        **{"loss": "infonce", "save_encodings": False},
        **{"init": "default", "lr_schedule": "constant", "precision": "fp32", "preconditioner": "none"},
        **{"layer_lr": "uniform", "text_lr_factor": 1.0, "first_tau": 0, "norm_penalty": 0, "final_batch_size": 0},
        **{"recipe": "paper", "whitening_pairs": 0, "optimiser": "adam", "spare_dimensions": 0},
        **{"first_batch_size": 0},
    }
    assert {name: getattr(args, name) for name in defaults} == defaults


@pytest.mark.parametrize(
    "flags, size",
    [("--bias-id 0", 3), ("--bias-id 4", 5), ("--bias-type perturbation --bias-id 0", 5),
     ("--bias-type perturbation --bias-id 1", 4), ("--bias-type perturbation --bias-id 4", 3), ("--encoding-size 1", 1)],
)  # fmt: skip
def test_the_size_of_the_encodings(flags, size):
    args, _ = Mpi3dExperiment.parse_flags(flags.split())
    unbiased = mpi3d_bias(args.bias_type, args.bias_id).unbiased
    assert (args.encoding_size or Mpi3dExperiment.default_encoding_size(len(unbiased))) == size


@pytest.mark.parametrize(
    "flags",
    ["--tau 0.5", "--encoding-size 2", "--protocol paper", "--init he", "--lr 0.02", "--batch-size 13", "--bias-id 2",
     "--bias-type perturbation", "--precision bf16", "--lr-schedule onecycle", "--final-batch-size 20", "--layer-lr fan-in",
     "--train-steps 6", "--seed 2", "--text-lr-factor 0.5", "--first-tau 0.1", "--norm-penalty 0.5",
     "--whitening-pairs 16", "--spare-dimensions 4", "--optimiser muon", "--first-batch-size 20", "--supervised"],
)  # fmt: skip
def test_every_flag_changes_what_is_trained(run, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(experiment, "write_evaluation", lambda *_: {})
    monkeypatch.setattr(ImageTextExperiment, "monitor", lambda _: ({}, ""))
    for model, extra in (("plain", ""), ("changed", flags)):
        code, _, err = run(f"--seed 1 --train-steps 5 {extra}", model)
        assert code == 0, err
    plain, changed = (contents(tmp_path / "models" / model) for model in ("plain", "changed"))
    assert plain["encoder_img.pt"] != changed["encoder_img.pt"]


@pytest.mark.parametrize("size", [1, 3])
def test_whitened_encodings_have_mean_zero_and_covariance_one(mpi3d, size):
    flags = f"--datapath {mpi3d} --no-cuda --seed 1 --batch-size 16 --bias-id 2 --encoding-size {size} --whitening-pairs 40"
    args, _ = Mpi3dExperiment.parse_flags(flags.split())
    model = Mpi3dExperiment(args, torch.device("cpu"))
    model.draw(None)
    encoders, pairs = model.modules, model.pairs
    rows = torch.randperm(len(pairs.splits["train"]), generator=torch.Generator().manual_seed(3))[:40]
    for encoder, inputs in (("encoder_img", pairs.images_of), ("encoder_txt", pairs.tokens_of)):
        image_text.whiten(encoders[encoder], inputs("train", rows))
        h = encoders[encoder](inputs("train", rows)).double()
        torch.testing.assert_close(h.mean(dim=0), torch.zeros(size).double(), rtol=0, atol=1e-4)
        covariance = torch.cov(h.T, correction=0).reshape(size, size)
        torch.testing.assert_close(covariance, torch.eye(size).double(), rtol=0, atol=1e-3)
        before = [parameter.clone() for parameter in encoders[encoder].parameters()]
        image_text.whiten(encoders[encoder], inputs("train", rows[:1].repeat(5)))  # nothing varies: nothing is stretched
        assert all((a == b).all() for a, b in zip(before, encoders[encoder].parameters(), strict=True))


def test_the_temperature_goes_to_tau_between_two_shares_of_the_steps():
    args = Namespace(tau=1.0, first_tau=0.2)
    temperatures = [temperature(args, share) for share in (0, 0.4, 0.55, 0.7, 1)]
    assert temperatures == pytest.approx([0.2, 0.2, 0.6, 1.0, 1.0])
    constant = Namespace(tau=0.3, first_tau=0)
    assert [temperature(constant, share) for share in (0, 0.37, 1)] == [0.3] * 3


@pytest.mark.parametrize(("flags", "sizes"), [("--first-batch-size 20", [20, 20, 16, 16, 16]),
                                              ("--first-batch-size 20 --final-batch-size 64", [20, 20, 28, 34, 56]),
                                              ("", [16] * 5)])  # fmt: skip
def test_the_first_batches_have_a_size_of_their_own(mpi3d, monkeypatch, flags, sizes):
    monkeypatch.setattr(image_text, "ImageEncoder", SmallImageEncoder)
    args, _ = Mpi3dExperiment.parse_flags([*f"--no-cuda --seed 1 --batch-size 16 {flags}".split(), "--datapath", str(mpi3d)])
    model, drawn = Mpi3dExperiment(args, torch.device("cpu")), []
    model.order = Namespace(next=lambda count: drawn.append(count) or torch.arange(count))
    for share in (0, 0.399, 0.4, 0.55, 0.9):
        model.loss(share)
    assert drawn == sizes


def test_spare_dimensions_count_in_the_loss_until_they_are_cut_off(mpi3d):
    flags = "--no-cuda --seed 1 --batch-size 16 --bias-id 2 --encoding-size 2 --spare-dimensions 3"
    args, _ = Mpi3dExperiment.parse_flags([*flags.split(), "--datapath", str(mpi3d)])
    model = Mpi3dExperiment(args, torch.device("cpu"))
    model.draw(None)
    both, pairs, rows = model.modules, model.pairs, torch.arange(16)
    h_x = both["encoder_img"](pairs.images_of("train", rows)).detach().double()
    h_t = both["encoder_txt"](pairs.tokens_of("train", rows)).detach().double()
    assert h_x.shape == h_t.shape == (16, 5)
    losses = {}
    for share, left in ((0, 1), (0.149, 1), (0.15, 0), (0.9, 0)):
        scale = torch.tensor([1, 1, left, left, left], dtype=torch.float64)
        expected = image_text_contrastive_loss(h_x * scale, h_t * scale, 1.0, "both")
        model.order = Namespace(next=lambda count: rows[:count])
        losses[share] = model.loss(share).item()
        assert losses[share] == pytest.approx(expected.item(), abs=1e-5), share
    assert losses[0] == losses[0.149] != losses[0.15] == losses[0.9]


def test_the_encoders_that_are_kept_have_no_spare_dimensions(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageTextExperiment, "monitor", lambda _: ({}, ""))
    flags = "--seed 1 --train-steps 5 --encoding-size 2 --spare-dimensions 3 --checkpoint-steps 2 --save-all-checkpoints"
    code, out, err = run(flags)
    assert code == 0 and "R^2 and 3 dimensions at first" in out, err
    for path in sorted((tmp_path / "models/m").glob("encoder_*.pt")):
        weights = torch.load(path, weights_only=True)
        assert len(weights["linear.weight"]) == len(weights["linear.bias"]) == 2, path
    first = pd.read_csv(tmp_path / "models/m/results.csv")
    assert run("--evaluate --seed 2", base="--no-cuda")[0] == 0  # with the probes' seed of the training's evaluation
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "models/m/results.csv"), first)


def test_the_penalty_is_of_relative_lengths_alone():
    h = torch.tensor([[3.0, 4.0], [0.0, 1.0], [1.8, -2.4]], requires_grad=True)  # lengths 5, 1, 3
    variance = image_text.length_variance(h, 3)
    assert variance.item() == pytest.approx(8 / 27, abs=1e-6)
    assert image_text.length_variance(100 * h, 3).item() == pytest.approx(8 / 27, abs=1e-6)
    variance.backward()
    expected = torch.tensor([[0.6, 0.8], [0.0, -1.0], [0.0, 0.0]]) * 4 / 27
    torch.testing.assert_close(h.grad, expected, rtol=0, atol=1e-6)


def test_how_often_is_logged_saved_and_read_by_how_many_changes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "write_evaluation", lambda *_: {})
    for model, flags in (("a", ""), ("b", "--log-steps 3 --checkpoint-steps 5 --save-all-checkpoints --workers 3")):
        assert run(f"--seed 1 {flags}", model)[0] == 0
    a, b = (contents(tmp_path / "models" / model) for model in "ab")
    assert a["encoder_img.pt"] == b["encoder_img.pt"] and a["encoder_txt.pt"] == b["encoder_txt.pt"]
    assert sorted(set(b) - set(a)) == [f"encoder_{m}_{step}.pt" for m in ("img", "txt") for step in (10, 5)]
    assert b["encoder_img_10.pt"] != b["encoder_img_5.pt"]


def test_encoders_are_saved_while_training_goes_on(run, tmp_path, monkeypatch):
    seen = {}
    real = ImageTextExperiment.loss

    def noted(*arguments):
        seen[len(seen)] = (tmp_path / "models/m/encoder_txt.pt").exists()
        return real(*arguments)

    monkeypatch.setattr(ImageTextExperiment, "loss", noted)
    monkeypatch.setattr(experiment, "write_evaluation", lambda *_: {})
    assert run("--seed 1")[0] == 0
    assert [seen[step] for step in range(12)] == [False] * 4 + [True] * 8


# --------------------------------------------------------------------------------------------------------------
# killed and resumed


def outcome(directory):
    files = contents(directory)
    log = pd.read_csv(directory / "train_log.csv").drop(columns="seconds").to_csv()
    return {name: files[name] for name in ("encoder_img.pt", "encoder_txt.pt", "results.csv")}, log


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--recipe fast --bias-type perturbation --train-steps 40",
        "--final-batch-size 40",
        "--preconditioner inputs",
        "--optimiser muon --spare-dimensions 4 --first-batch-size 20",
        "--supervised --encoding-size 3",
    ],
)
def test_a_run_killed_at_random_steps_ends_as_one_that_never_was(run, tmp_path, monkeypatch, flags):
    """24 batches make an epoch, so the kills and the checkpoints fall into several of them."""
    flags = f"--seed 3 --train-steps 60 {flags}"
    assert run(flags, "whole")[0] == 0
    rng, real = random.Random(flags), ImageTextExperiment.loss
    for _ in range(3):
        count, last = itertools.count(), rng.randrange(6, 13)

        def dying(*arguments, count=count, last=last):
            if next(count) == last:
                raise Killed
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(ImageTextExperiment, "loss", dying)
            with pytest.raises(Killed):
                run(f"{flags} --resume", "killed")
    code, out, err = run("--resume", "killed", base="--no-cuda")
    assert code == 0 and "resumed from step" in out, err
    assert outcome(tmp_path / "models/killed") == outcome(tmp_path / "models/whole")


def test_a_checkpoint_trained_on_other_pairs_is_refused(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(experiment, "write_evaluation", lambda *_: (_ for _ in ()).throw(Killed))
        run("--seed 3")
    directory = tmp_path / "models/m"
    content = store.load_torch(directory / "checkpoint.pt")
    assert content["run"]["data"] == json.loads((directory / "args.json").read_text())["data"]
    content["run"]["data"] = "another"
    for name in ("checkpoint.pt", "checkpoint_before.pt"):
        store.save_torch(content, directory / name)
    code, _, err = run("--resume", base="--no-cuda")
    assert code == 2 and "it is of data another, and args.json says" in err and err.count("\n") == 1


def test_a_signal_writes_a_checkpoint_and_the_run_goes_on_from_it(run, tmp_path, monkeypatch):
    assert run("--seed 3", "whole")[0] == 0
    real, count = ImageTextExperiment.loss, itertools.count()

    def signalled(*arguments):
        if next(count) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ImageTextExperiment, "loss", signalled)
        code, _, err = run("--seed 3", "stopped")
    assert code == 128 + signal.SIGTERM and "after step 7 of 12" in err and "--model-id stopped --resume" in err
    assert run("--resume", "stopped", base="--no-cuda")[0] == 0
    assert outcome(tmp_path / "models/stopped") == outcome(tmp_path / "models/whole")


def test_the_real_encoders_train_resume_and_are_evaluated_again(run, tmp_path, monkeypatch, capsys):
    """Once with the ResNet-18 itself, a few pairs and steps."""
    monkeypatch.setattr(image_text, "ImageEncoder", encoders.ImageEncoder)
    monkeypatch.setattr(ImageTextExperiment, "monitor", lambda _: ({}, ""))
    flags = "--seed 1 --batch-size 4 --train-steps 3 --log-steps 2 --hidden-size 20"
    real, count = ImageTextExperiment.loss, itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "write_evaluation", lambda *_: {})
        assert run(flags, "whole")[0] == 0

        def dying(*arguments):
            if next(count) == 2:
                raise Killed
            return real(*arguments)

        with monkeypatch.context() as inner:
            inner.setattr(ImageTextExperiment, "loss", dying)
            with pytest.raises(Killed):
                run(flags, "killed")
        assert run("--resume", "killed", base="--no-cuda")[0] == 0
    whole, killed = (contents(tmp_path / "models" / model) for model in ("whole", "killed"))
    assert whole["encoder_img.pt"] == killed["encoder_img.pt"] and whole["encoder_txt.pt"] == killed["encoder_txt.pt"]
    assert "module." not in "".join(torch.load(tmp_path / "models/whole/encoder_img.pt", weights_only=True))
    assert run("--evaluate --seed 5", "whole", base="--no-cuda")[0] == 0


# --------------------------------------------------------------------------------------------------------------
# --evaluate, --overwrite


@pytest.fixture
def trained(run, tmp_path):
    code, _, err = run("--seed 1")
    assert code == 0, err
    return tmp_path / "models/m"


def test_evaluation_again_probes_the_same_encodings(run, trained):
    before = contents(trained)
    assert run("--evaluate --seed 5", base="--no-cuda")[0] == 0
    after = contents(trained)
    assert after["results_seed2.csv"] == before["results.csv"]
    first, again = (pd.read_csv(trained / name) for name in ("results_seed2.csv", "results.csv"))
    assert (first.mcc_logreg == again.mcc_logreg).all() and (first.mcc_mlp != again.mcc_mlp).any()
    assert all(before[name] == after[name] for name in ("encoder_img.pt", "encoder_txt.pt", "checkpoint.pt", "train_log.csv"))
    assert run("--evaluate --seed 2", base="--no-cuda")[0] == 0
    assert contents(trained)["results.csv"] == before["results.csv"]


def test_encodings_are_kept_where_they_are_asked_for(run, trained, mpi3d):
    assert run("--evaluate --seed 5 --save-encodings", base="--no-cuda")[0] == 0
    with np.load(trained / "encodings.npz", allow_pickle=False) as file:
        kept = dict(file)
    assert set(kept) == {"h_image", "h_text", *MPI3D_GRID, "is_test", "seed"} and kept["seed"] == 5
    factors = pd.read_csv(mpi3d / "test/image_semantics.csv")
    assert len(factors) == len(kept["is_test"]) == len(kept["h_image"]) == len(kept["h_text"])
    for name in MPI3D_GRID:
        assert (kept[name] == factors[name]).all()
    scores = pd.read_csv(trained / "results.csv").set_index(["modality", "semantic_name"]).mcc_logreg
    fit, test = ~kept["is_test"], kept["is_test"]
    h = [torch.from_numpy(kept["h_image"][part]) for part in (fit, test)]
    targets = [{"OBJ_COLOR": torch.from_numpy(kept["OBJ_COLOR"][part])} for part in (fit, test)]
    first, second = probes.standardise(*h)
    assert probes.logistic_mcc(first, targets[0], second, targets[1])["OBJ_COLOR"] == pytest.approx(scores["image", "OBJ_COLOR"])


def test_a_model_of_an_earlier_version_with_fewer_flags_is_evaluated(run, trained):
    before = contents(trained)["results.csv"]
    args = json.loads((trained / "args.json").read_text())
    earlier = {name: value for name, value in args.items() if name not in LATER_FLAGS}
    (trained / "args.json").write_text(json.dumps(earlier))
    assert run("--evaluate --seed 2", base="--no-cuda")[0] == 0
    assert contents(trained)["results.csv"] == before


def test_a_run_that_is_not_trained_to_its_end_is_not_evaluated_but_resumed(run, tmp_path, monkeypatch):
    real, count = ImageTextExperiment.loss, itertools.count()

    def dying(*arguments):
        if next(count) == 7:  # the encoders of step 4 and the checkpoint of step 5 are there
            raise Killed
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ImageTextExperiment, "loss", dying)
        with pytest.raises(Killed):
            run("--seed 1")
    before = contents(tmp_path / "models/m")
    code, _, err = run("--evaluate --seed 5", base="--no-cuda")
    assert code == 2 and "is trained for 5 of 12 steps; --resume continues it" in err
    assert contents(tmp_path / "models/m") == before
    with monkeypatch.context() as patch:  # a run that only lacks its evaluation may be evaluated
        patch.setattr(ImageTextExperiment, "evaluate", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run("--resume", base="--no-cuda")
    assert run("--evaluate --seed 5", base="--no-cuda")[0] == 0
    assert "finished already" in run("--resume", base="--no-cuda")[1]


def test_weights_with_the_prefix_of_a_wrapper_are_evaluated_alike(run, trained):
    before = pd.read_csv(trained / "results.csv")
    for name in ("encoder_img.pt", "encoder_txt.pt"):
        state = torch.load(trained / name, weights_only=True)
        torch.save({f"module.{key}": value for key, value in state.items()}, trained / name)
    assert run("--evaluate --seed 5", base="--no-cuda")[0] == 0
    assert (pd.read_csv(trained / "results.csv").mcc_logreg == before.mcc_logreg).all()


def test_the_paper_s_protocol_probes_for_its_number_of_steps(run, monkeypatch):
    seen = []
    monkeypatch.setattr(image_text.probes, "mlp_mcc", lambda *call: seen.append(call[4:]) or REAL(*call[:4]))
    assert run("--seed 1 --protocol paper", "paper")[0] == 0 and run("--seed 1", "code")[0] == 0
    assert seen == [(10_000,), (None,)]  # no other rate


REAL = probes.mlp_mcc


def test_finished_models_are_safe(run, trained):
    before = contents(trained)
    for flags, words in (("--seed 2", "--overwrite trains it anew"), ("--resume --lr 0.5", "--lr 0.5 contradicts 0.01")):
        code, _, err = run(flags, base="--no-cuda")
        assert code == 2 and words in err and contents(trained) == before
    code, out, _ = run("--resume", base="--no-cuda")
    assert code == 0 and "finished already" in out and contents(trained) == before
    code, _, err = run("--evaluate --seed 5 --bias-id 2", base="--no-cuda")
    assert code == 2 and "--bias-id 2 contradicts 1" in err and contents(trained) == before
    assert run("--seed 2 --overwrite")[0] == 0 and contents(trained)["encoder_img.pt"] != before["encoder_img.pt"]


def test_other_captions_than_those_trained_on_are_refused(run, trained, mpi3d):
    before = contents(trained)
    path = mpi3d / "vocab_selection_1.json"
    words = list(json.loads(path.read_text())["w2i"])
    path.unlink()
    path.write_text(json.dumps({word: number for number, word in enumerate(words[:3] + words[:2:-1])}))
    code, _, err = run("--evaluate --seed 5", base="--no-cuda")
    assert code == 2 and "does not hold the images, captions" in err and contents(trained) == before


# --------------------------------------------------------------------------------------------------------------
# bad input: one line, exit code 2, nothing changed


def no_data(folder):
    shutil.rmtree(folder)


def no_images(folder):
    (folder / MPI3D_FILE).unlink()


def pickled(folder):
    (folder / MPI3D_FILE).unlink()
    np.savez(folder / MPI3D_FILE, images=np.array([{}], dtype=object))


def long_captions(folder):
    for split in ("train", "test"):
        path = folder / split / "text_selection_1.txt"
        lines = [f"{line} {'very ' * 164}\n" for line in path.read_text().splitlines()]
        path.unlink()
        path.write_text("".join(lines))


def short_captions(folder):
    for split in ("train", "test"):
        path = folder / split / "text_selection_1.txt"
        table = pd.read_csv(folder / split / "text_semantics_selection_1.csv")
        path.unlink()
        path.write_text("".join(f"{a} {b}\n" for a, b in table.to_numpy()))


def lasting(folder):
    """`contents` without what is kept beside the data and made again: tokens, and records of checksums."""
    return {name: content for name, content in contents(folder).items() if "tokens_" not in name and ".checked" not in name}


@pytest.mark.parametrize(
    "flags, damage, words",
    [
        ("--bias-id 5", None, "--bias-id 5 is out of range: settings are 0 … 4"),
        ("--bias-id -1", None, "--bias-id -1 is out of range"),
        ("--bias-id x", None, "--bias-id"),
        ("--bias-type omission", None, "--bias-type"),
        ("--encoding-size -1", None, "--encoding-size"),
        ("--hidden-size 0", None, "--hidden-size"),
        ("--tau 0", None, "--tau"),
        ("--checkpoint-steps 0", None, "--checkpoint-steps"),
        ("--workers -1", None, "--workers"),
        ("--whitening-pairs 1", None, "1 is too small, expected an integer of at least 2, or 0"),
        ("--batch-size 289", None, "a batch of 289 pairs"),
        ("--final-batch-size 300", None, "a batch of 300 pairs"),
        ("--first-batch-size 310", None, "lower --first-batch-size"),
        ("--datapath nowhere", None, "nowhere is no folder"),
        ("", no_data, "is no folder"),
        ("", no_images, "is missing: get it from"),
        ("", pickled, "pickled array"),
        ("", long_captions, "tokens, expected 4 to 164"),
        ("", short_captions, "captions of 3 tokens, expected 4 to 164"),
        ("--evaluate", None, "args.json is missing"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(run, tmp_path, mpi3d, flags, damage, words):
    if damage:
        damage(mpi3d)
    before = lasting(tmp_path)
    code, out, err = run(flags)
    assert code == 2, (out, err)
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: ") and words in err, err
    assert lasting(tmp_path) == before
    assert not (tmp_path / "models").exists()


def test_a_damaged_encoder_is_named(run, trained):
    (trained / "encoder_img.pt").write_bytes(b"damaged")
    code, _, err = run("--evaluate --seed 5", base="--no-cuda")
    assert code == 2 and "encoder_img.pt is damaged" in err


def test_training_may_not_go_on_without_its_data(run, tmp_path, mpi3d, monkeypatch):
    monkeypatch.setattr(ImageTextExperiment, "loss", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert run("--seed 1")[0] == 2
    before = contents(tmp_path / "models")
    shutil.rmtree(mpi3d)
    assert run("--resume", base="--no-cuda")[0] == 2 and contents(tmp_path / "models") == before


def test_the_script_explains_itself():
    done = subprocess.run([sys.executable, "main_mpi3dreal.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for words in ("setting: what the caption says of the image", "--save-all-checkpoints", "(paper 1e-05, fast"):
        assert words in " ".join(done.stdout.split())


# --------------------------------------------------------------------------------------------------------------
# what scores could have been


def test_supervised_encoders_learn_every_factor_that_images_show(run, tmp_path):
    """The block of captions says nothing: what they leave out is learned too."""
    flags = "--supervised --seed 1 --train-steps 120 --lr 0.006 --init he --bias-id 0 --encoding-size 12"
    code, out, err = run(flags, model="told")
    assert code == 0, err
    assert "labels of all factors" in out and "pattern of the theory" not in out
    assert sorted(contents(tmp_path / "models/told")) == IMAGE_TEXT_FILES
    scores = pd.read_csv(tmp_path / "models/told/results.csv").set_index(["modality", "semantic_name"]).mcc_logreg
    assert scores["image"][["OBJ_SHAPE", "BACKGROUND", "CAMERA"]].min() > 0.7, scores["image"]
    assert scores["text", "OBJ_COLOR"] > 0.95 and scores["text"].drop("OBJ_COLOR").max() < 0.4, "the caption tells no more"


def test_supervised_encodings_have_the_size_of_the_resnet_s_outputs_and_no_spare_dimensions(mpi3d):
    flags = f"--datapath {mpi3d} --seed 1 --supervised --hidden-size 17 --spare-dimensions 4"
    args, _ = Mpi3dExperiment.parse_flags(flags.split())
    model = Mpi3dExperiment(args, torch.device("cpu"))
    assert model.encoding_size == 17 == model.modules["encoder_txt"].linear.out_features


def test_floor_and_ceiling_stand_beside_the_scores(run, trained, tmp_path):
    assert run("--supervised --seed 3 --encoding-size 3", model="told")[0] == 0
    ceiling = tmp_path / "models/told"
    before = contents(trained)
    assert run("--evaluate --seed 7 --save-encodings", base="--no-cuda")[0] == 0
    with np.load(trained / "encodings.npz") as file:
        own = dict(file)
    code, _, err = run(f"--evaluate --seed 7 --save-encodings --floor --ceiling {ceiling}", base="--no-cuda")
    assert code == 0, err
    with np.load(trained / "encodings.npz") as file:
        assert all(np.array_equal(own[name], file[name]) for name in own), "of the trained encoders"
    table = pd.read_csv(trained / "references.csv")
    assert list(table.columns) == ["reference", "ix", "modality", "semantic_name", "mcc_logreg", "mcc_mlp"]
    of_told = table[table.reference == "ceiling"].drop(columns="reference").reset_index(drop=True)
    pd.testing.assert_frame_equal(of_told, pd.read_csv(ceiling / "results.csv"))
    assert len(table[table.reference == "floor"]) == 14
    assert contents(trained)["encoder_img.pt"] == before["encoder_img.pt"]


def test_a_ceiling_that_is_none_is_named_before_anything_is_computed(run, trained, tmp_path):
    before = contents(trained)
    for folder, words in ((trained, "is no finished model of --supervised"), (tmp_path / "none", "args.json")):
        code, _, err = run(f"--evaluate --seed 7 --ceiling {folder}", base="--no-cuda")
        assert code == 2 and err.count("\n") == 1 and words in err, err
    told = tmp_path / "models/told"
    assert run("--supervised --seed 3 --encoding-size 3", model="told")[0] == 0
    whole = (told / "results.csv").read_text()
    for damaged in (whole.replace("OBJ_SHAPE", "SHAPE"), whole[: len(whole) // 2], whole.replace("mcc_mlp", "r2_krreg")):
        (told / "results.csv").write_text(damaged)
        code, _, err = run(f"--evaluate --seed 7 --ceiling {told}", base="--no-cuda")
        assert code == 2 and err.count("\n") == 1 and str(told / "results.csv") in err, err
    code, _, err = run("--supervised --loss sigmoid", model="both")
    assert code == 2 and "--supervised has a loss of its own" in err and not (tmp_path / "models/both").exists()
    assert contents(trained) == before


def test_untrained_encoders_have_the_statistics_of_untrained_ones(mpi3d):
    flags = f"--datapath {mpi3d} --no-cuda --seed 1 --batch-size 20 --protocol paper"
    model = Mpi3dExperiment(Mpi3dExperiment.parse_flags(flags.split())[0], torch.device("cpu"))
    model.modules["encoder_img"] = SmallImageEncoder(3, 0, 1)
    model.draw(None)
    layers = [layer for encoder in model.modules.values() for layer in encoder.modules() if hasattr(layer, "running_mean")]
    for layer in layers:
        layer.running_mean.fill_(5.0), layer.running_var.fill_(7.0)
    with experiment.untrained(model):
        assert all((layer.running_mean == 0).all() and (layer.running_var == 1).all() for layer in layers)
    assert layers and all((layer.running_mean == 5).all() and (layer.running_var == 7).all() for layer in layers)


@pytest.mark.parametrize("spare", [0, 2])
def test_the_floor_of_images_is_that_of_the_training_whoever_evaluates(mpi3d, tmp_path, capsys, monkeypatch, spare):
    flags = (
        f"--no-cuda --seed 1 --train-steps 2 --log-steps 2 --batch-size 20 --recipe fast --first-batch-size 0 --precision fp32 "
        f"--whitening-pairs 16 --spare-dimensions {spare} --floor"
    )
    run = small_image_text_run(main_mpi3dreal, SmallImageEncoder, mpi3d, flags, tmp_path, capsys, monkeypatch)
    assert run()[0] == 0
    first = pd.read_csv(tmp_path / "models/m/references.csv")
    results = (tmp_path / "models/m/results.csv").read_bytes()
    assert run("--evaluate --seed 2 --floor --no-cuda", base="")[0] == 0
    assert (tmp_path / "models/m/results.csv").read_bytes() == results
    pd.testing.assert_frame_equal(first, pd.read_csv(tmp_path / "models/m/references.csv"))


def test_pixels_are_normalised_as_specified(run, monkeypatch):
    made = image_encoders_made(run, SmallImageEncoder, monkeypatch)
    assert made == [(3, (0.00888889, 0.00888889, 0.00830382), (0.08381344, 0.07622504, 0.06356431), 20)]


def model_of(mpi3d, flags, monkeypatch):
    monkeypatch.setattr(image_text, "ImageEncoder", SmallImageEncoder)
    args, _ = Mpi3dExperiment.parse_flags([*f"--no-cuda --seed 1 --batch-size 16 {flags}".split(), "--datapath", str(mpi3d)])
    model = Mpi3dExperiment(args, torch.device("cpu"))
    model.draw(None)
    return model


def test_the_penalty_grows_with_the_steps_and_is_of_both_encodings(mpi3d, monkeypatch):
    losses = {}
    for weight in (0, 0.5):
        model = model_of(mpi3d, f"--norm-penalty {weight}", monkeypatch)
        rows = torch.arange(16)
        model.order = Namespace(next=lambda count, rows=rows: rows[:count])
        losses[weight] = [model.loss(share).item() for share in (0, 0.5, 1)]
    h = (model.modules["encoder_img"](model.pairs.images_of("train", rows)),
         model.modules["encoder_txt"](model.pairs.tokens_of("train", rows)))  # fmt: skip
    penalty = 0.5 * sum(image_text.length_variance(part, 16).item() for part in h)
    added = [b - a for a, b in zip(*losses.values(), strict=True)]
    assert added == pytest.approx([0, penalty / 2, penalty], abs=1e-5)


def test_the_last_layers_of_both_encoders_are_whitened(mpi3d, monkeypatch):
    model = model_of(mpi3d, "--whitening-pairs 288", monkeypatch)  # all: whatever pairs are drawn
    rows = torch.arange(288)
    for encoder, inputs in (("encoder_img", model.pairs.images_of), ("encoder_txt", model.pairs.tokens_of)):
        h = model.modules[encoder](inputs("train", rows)).double()
        torch.testing.assert_close(torch.cov(h.T, correction=0), torch.eye(5).double(), rtol=0, atol=1e-2)


def test_the_seed_draws_the_order_and_the_encoders(mpi3d, monkeypatch):
    one, other = (model_of(mpi3d, f"--seed {seed}", monkeypatch) for seed in (1, 2))
    assert not torch.equal(one.order.next(16), other.order.next(16))
    for name, module in one.modules.items():
        assert not torch.equal(module.linear.weight, other.modules[name].linear.weight)


def test_the_text_encoder_alone_has_its_rate(mpi3d, monkeypatch):
    assert model_of(mpi3d, "--text-lr-factor 0.5", monkeypatch).rates == {"encoder_txt": 0.5}


def test_the_sigmoid_loss_is_of_cosines(mpi3d, monkeypatch):
    model, rows = model_of(mpi3d, "--loss sigmoid", monkeypatch), torch.arange(16)
    model.order = Namespace(next=lambda count: rows[:count])
    h = (model.modules["encoder_img"](model.pairs.images_of("train", rows)),
         model.modules["encoder_txt"](model.pairs.tokens_of("train", rows)))  # fmt: skip
    expected = textbook_sigmoid_loss(*(part.double() for part in h), torch.tensor(10.0), torch.tensor(-10.0), "cosine")
    assert model.loss(0.0).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("inside", "outside", "found"), [(0.96, 0.04, True), (0.96, 0.3, False), (0.5, 0.04, False)])
def test_the_verdict_and_the_tables_are_of_the_unbiased_block(inside, outside, found):
    bias, rows = mpi3d_bias("perturbation", 2), []
    for modality, name in itertools.product(("text", "image"), MPI3D_GRID):
        score = inside if name in ("OBJ_COLOR", "OBJ_SHAPE", "OBJ_SIZE") else outside
        rows.append((modality, name, score / 2, score))
    results = pd.DataFrame(rows, columns=["modality", "factor_name", "mcc_logreg", "mcc_mlp"])
    sentence = main_mpi3dreal.verdict(results, bias)
    assert sentence.startswith("Exactly the unbiased block is learned: " if found else "Not (yet) the pattern")
    assert f"{{OBJ_COLOR, OBJ_SHAPE, OBJ_SIZE}} has nonlinear MCC of at least {inside:.3f}, everything else at most" in sentence
    results.loc[results.modality == "image", "mcc_logreg"] += 0.01
    tables = main_mpi3dreal.score_tables(results)
    for title, share, more in (("linear MCC", 0.5, 0.01), ("nonlinear MCC", 1, 0)):
        assert list(tables[title].index) == ["image", "text"] and list(tables[title]) == list(MPI3D_GRID)
        assert tables[title].loc["image", "OBJ_SIZE"] == pytest.approx(share * inside + more)
        assert tables[title].loc["text", "CAMERA"] == pytest.approx(share * outside)


def test_what_is_misstated_has_no_mark_and_its_share_is_that_of_the_data(run, mpi3d):
    render(mpi3d, dict(zip(MPI3D_GRID, (4, 4, 2, 2, 3, 2, 1), strict=True)), train_ratio=0.75, seed=0, change_prob=0.2)
    image, text = (pd.read_csv(mpi3d / f"train/{name}.csv") for name in ("image_semantics", "text_semantics_perturbation_3"))
    code, out, err = run("--seed 1 --train-steps 1 --bias-type perturbation --bias-id 3")
    perturbed = ["CAMERA", "BACKGROUND", "OBJ_SIZE"]
    assert f", wrong in {(image[perturbed] != text[perturbed]).mean(axis=None):.0%} of captions" in out
    assert code == 0 and "OBJ_COLOR *" in out and "OBJ_SHAPE *" in out and "OBJ_SIZE" in out and "OBJ_SIZE *" not in out, err


def test_kept_encodings_and_the_log_are_of_either_modality_and_of_held_out_pairs(run, tmp_path):
    """The last line of the log, of fewer pairs than a progress line takes, has the scores of the evaluation."""
    code, _, err = run("--seed 1 --train-steps 30 --lr 0.01 --save-encodings")
    assert code == 0, err
    log, results = (pd.read_csv(tmp_path / "models/m" / name) for name in ("train_log.csv", "results.csv"))
    for row in results.itertuples():
        assert log[f"{row.modality}_{row.semantic_name}"].iloc[-1] == pytest.approx(row.mcc_logreg, abs=1e-4)
    with np.load(tmp_path / "models/m/encodings.npz", allow_pickle=False) as file:
        kept, test = dict(file), file["is_test"]
    targets = [{"OBJ_SHAPE": torch.from_numpy(kept["OBJ_SHAPE"][part])} for part in (~test, test)]
    scores = results.set_index(["modality", "semantic_name"]).mcc_logreg
    assert scores["image", "OBJ_SHAPE"] != scores["text", "OBJ_SHAPE"]
    for modality in ("image", "text"):
        fit_h, test_h = probes.standardise(*(torch.from_numpy(kept[f"h_{modality}"][part]) for part in (~test, test)))
        found = probes.logistic_mcc(fit_h, targets[0], test_h, targets[1])["OBJ_SHAPE"]
        assert found == pytest.approx(scores[modality, "OBJ_SHAPE"], abs=1e-4)


def test_an_exported_model_has_no_flag_that_only_we_have(run, tmp_path):
    assert run("--seed 1 --train-steps 1")[0] == 0
    code, _, err = run(f"--export-official {tmp_path / 'out'}", base="--no-cuda")
    assert code == 0, err
    shared = "bias_type bias_id encoding_size hidden_size tau lr batch_size train_steps seed datapath"
    assert json.loads((tmp_path / "out/args.json").read_text()).keys() == {*shared.split()}


def test_what_hardly_varies_is_stretched_by_100_times_more_than_the_widest():
    encoder, generator = torch.nn.Sequential(), torch.Generator().manual_seed(0)
    encoder.linear = torch.nn.Linear(2, 2)
    x = torch.randn(1000, 2, generator=generator) * torch.tensor([1.0, 1e-4])
    with torch.no_grad():
        encoder.linear.weight.copy_(torch.eye(2))
        image_text.whiten(encoder, x)
        variances = encoder(x).double().var(dim=0)
    assert variances.tolist() == pytest.approx([1, 1e-4], rel=0.15)
