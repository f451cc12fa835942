"""main_numeric.py as a user runs it: every flag, the files it writes, and one line for whatever is wrong."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import eval_numeric_predict as downstream
import main_numeric
import mlp_probes
import probes
from latent_spaces import MisalignedLatents, seeded_generator
from losses import textbook_multimodal_loss
from main_numeric import NumericExperiment
from running import devices, experiment
from running import directory as model_directory
from running.geometry import geometry
from running.staging import digest
from tests.conftest import TINY
from tests.scripts import Killed, contents, forget_digests

ROOT = Path(main_numeric.__file__).parent
FILES = [
    "args.json",
    "checkpoint.pt",
    "f_t.pt",
    "f_x.pt",
    "g_t.pt",
    "g_x.pt",
    "geometry.csv",
    "results.csv",
    "results.png",
    "train_log.csv",
]


@pytest.fixture
def trained(run, tmp_path):
    """A trained model: its directory, and what the run printed."""
    code, out, err = run("--seed 1")
    assert code == 0, err
    return tmp_path / "models/m", out


def test_a_run_writes_the_specified_files(trained):
    directory, _out = trained
    assert sorted(contents(directory)) == FILES
    results = pd.read_csv(directory / "results.csv")
    assert list(results.columns) == ["encoding", "predicted_factors", "r2_linear", "r2_nonlinear"]
    factors = ["s_0", "s_1", "s_2", "s_inv", "m_x", "m_t"]
    assert next(iter(results.itertuples(index=False, name=None)))[:2] == ("hz_x", "s_0")
    assert results.predicted_factors.tolist() == factors * 2
    assert results.encoding.tolist() == ["hz_x"] * 6 + ["hz_t"] * 6
    assert np.isfinite(results[["r2_linear", "r2_nonlinear"]]).all(axis=None)
    log = pd.read_csv(directory / "train_log.csv")
    assert log.step.tolist() == [10, 20, 30, 40]
    assert {"loss", "seconds", "hz_x_s_0", "hz_t_m_t"} <= set(log.columns)


def test_a_run_says_in_words_what_it_does(trained):
    directory, out = trained
    for words in (
        "I_θ = {s_0, s_1}",
        "the text leaves out {s_2}",
        "I_θ \\ I_ρ = {s_0, s_1}",
        "R^4 and R^3 → R^2",
        "CPU",
        "40 steps of 16 pairs",
    ):
        assert words in out
    assert sum(line.startswith("step ") for line in out.splitlines()) == 4
    assert "s_0 *" in out and "nonlinear R²" in out and "\r" not in out
    assert out.endswith(f"picture      {directory / 'results.png'}\n")


def test_the_perturbed_factors_are_evaluated(run, tmp_path):
    assert run("--seed 1 --beta-value 3 --theta-value 6")[0] == 0
    results = pd.read_csv(tmp_path / "models/m/results.csv")
    assert results.predicted_factors.tolist()[:9] == ["s_0", "s_1", "s_2", "s_inv", "tilde_s_0", "tilde_s_1", "m_x", "m_t", "s_0"]


@pytest.mark.parametrize("flags", ["", "--causal-dependence --protocol paper --theta-value 6", "--semantics-n 1 --theta-value 0"])
def test_without_modality_specific_latents_their_rows_are_left_out(run, tmp_path, flags):
    code, out, err = run(f"--seed 1 --modality-n 0 {flags}")
    assert code == 0 and "nan" not in out and "semantics, 0 + 0 modality-specific" in out, err
    directory = tmp_path / "models/m"
    n = 1 if "--semantics-n" in flags else 3
    factors = [*(f"s_{i}" for i in range(n)), "s_inv"]
    results = pd.read_csv(directory / "results.csv")
    assert results.predicted_factors.tolist() == 2 * factors and np.isfinite(results.r2_nonlinear).all()
    columns = [f"{h}_{name}" for h in ("hz_x", "hz_t") for name in factors]
    assert pd.read_csv(directory / "train_log.csv").columns.tolist() == ["step", "loss", "lr", "seconds", *columns]
    args, _ = NumericExperiment.parse_flags(f"{TINY} --modality-n 0 {flags}".split())
    expected = [(row["encoding"], row["predicted_factors"]) for row in NumericExperiment.result_rows(args)]
    assert expected == list(zip(results.encoding, results.predicted_factors, strict=True))
    assert run("--evaluate --seed 2", base="--no-cuda")[0] == 0
    pd.testing.assert_frame_equal(pd.read_csv(directory / "results.csv"), results)


def test_encoders_have_the_hidden_layers_that_are_asked_for(run, tmp_path):
    assert run("--seed 1 --hidden-sizes 7,5")[0] == 0
    directory = tmp_path / "models/m"
    state = torch.load(directory / "f_x.pt", weights_only=True)
    assert [tuple(state[f"{i}.weight"].shape) for i in (0, 2, 4)] == [(7, 4), (5, 7), (2, 5)] and len(state) == 6
    results = (directory / "results.csv").read_bytes()
    assert json.loads((directory / "args.json").read_text())["hidden_sizes"] == "7,5"
    code, _, err = run("--evaluate --seed 2", base="--no-cuda")
    assert code == 0 and (directory / "results.csv").read_bytes() == results, err
    fails(run, "--evaluate --seed 3 --hidden-sizes 5,7", "--hidden-sizes 5,7 contradicts 7,5", base="--no-cuda")


def test_spare_dimensions_are_there_until_the_training_ends(run, tmp_path, monkeypatch):
    sizes = []
    real = NumericExperiment.encode
    monkeypatch.setattr(NumericExperiment, "encode", lambda model, *call: (
        sizes.append(model.modules["f_x"][-1].out_features) or real(model, *call)))  # fmt: skip
    code, out, _ = run("--seed 1 --spare-dimensions 3 --floor")
    directory = tmp_path / "models/m"
    assert code == 0 and "→ R^2 and 3 more until trained" in out
    assert set(sizes) == {2}, "the monitor, the evaluation and untrained encoders have none"
    checkpoint = torch.load(directory / "checkpoint.pt", weights_only=True)["modules"]
    for name in ("f_x", "f_t"):
        state = torch.load(directory / f"{name}.pt", weights_only=True)
        last = list(state)[-2]
        narrow, wide = state[last].double(), checkpoint[name][last].double()
        assert len(narrow) == 2 and len(wide) == 5
        kept = narrow @ torch.linalg.pinv(wide)
        torch.testing.assert_close(kept @ wide, narrow, atol=1e-5, rtol=0)
        torch.testing.assert_close(kept @ kept.T, torch.eye(2, dtype=torch.float64), atol=1e-4, rtol=0)
    before = contents(directory)
    assert run("--evaluate --seed 2", base="--no-cuda")[0] == 0 and contents(directory)["results.csv"] == before["results.csv"]
    assert contents(directory)["references.csv"] == before["references.csv"]
    model = NumericExperiment(model_directory.trained_args(directory, NumericExperiment)[0], torch.device("cpu"))
    model.load(directory)  # as the downstream tasks do
    assert model.modules["f_x"][-1].out_features == 2


@pytest.mark.parametrize(
    "flags, expected",
    [("", "fp32"), ("--hidden-sizes paper", "bf16"), ("--hidden-sizes 20,499", "fp32"), ("--hidden-sizes 500", "bf16"),
     ("--hidden-sizes paper --semantics-n 3 --theta-value 0", "fp32")],
)  # fmt: skip
def test_the_fast_recipe_takes_bf16_for_wide_encoders_alone(flags, expected, monkeypatch):
    monkeypatch.setattr(devices, "has_fast_bf16", lambda device: True)
    args, _ = NumericExperiment.parse_flags(f"--recipe fast {flags}".split())
    widest = NumericExperiment.widest_layer(args)
    assert devices.settled_precision(args.precision, torch.device("cpu"), widest) == expected
    assert devices.settled_precision("auto", torch.device("cpu")) == "bf16"  # of images
    monkeypatch.setattr(devices, "has_fast_bf16", lambda device: False)
    assert devices.settled_precision(args.precision, torch.device("cpu"), widest) == "fp32"


def test_one_seed_one_result(run, tmp_path):
    for model, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(f"--seed {seed} --model-id {model}")[0] == 0
    a, b, c = (contents(tmp_path / "models" / model) for model in "abc")
    for name in ("f_x.pt", "f_t.pt", "g_x.pt", "g_t.pt", "results.csv"):
        assert a[name] == b[name] != c[name]


def test_how_often_progress_is_logged_changes_nothing(run, tmp_path):
    for model, steps in (("a", 10), ("b", 7)):
        assert run(f"--seed 1 --model-id {model} --log-steps {steps}")[0] == 0
    a, b = (contents(tmp_path / "models" / model) for model in "ab")
    assert a["f_x.pt"] == b["f_x.pt"] and a["results.csv"] == b["results.csv"]


@pytest.mark.parametrize(
    "flags",
    [
        *("--beta-value 0 --change-prob 0.2", "--causal-dependence", "--margin-param 2", "--beta-value 0 --cond-param 3"),
        *("--n-mixing-layer 2", "--encoding-size 4", "--init he", "--lr-schedule onecycle", "--lr 0.01"),
        *("--negatives batch", "--protocol paper", "--precision bf16", "--batch-size 20", "--train-steps 41"),
        *("--preconditioner inputs", "--layer-lr fan-in", "--final-batch-size 30"),
        *("--modality-n 2", "--semantics-n 4", "--spare-dimensions 2", "--latents laplace", "--omission-prob 0.3"),
        *("--loss sigmoid", "--optimiser muon"),
    ],
)
def test_every_flag_changes_what_is_trained(run, tmp_path, monkeypatch, flags):
    base = "--seed 1" + (" --beta-value 0" if "beta" in flags else "")
    monkeypatch.setattr(experiment, "write_evaluation", lambda *_: {})
    for model, extra in (("plain", ""), ("changed", flags)):
        code, _, err = run(f"{base} {extra} --model-id {model}")
        assert code == 0, err
    plain, changed = (contents(tmp_path / "models" / model) for model in ("plain", "changed"))
    assert plain["f_x.pt"] != changed["f_x.pt"]


def test_the_recipe_sets_what_is_not_given(run, tmp_path):
    argv = "--recipe fast --no-cuda --seed 1 --lr 0.002 --model-dir x"
    args, _ = NumericExperiment.parse_flags(argv.split())
    fast = main_numeric.RECIPES["fast"]
    assert args.lr == 0.002 and args.init == "he" and args.batch_size == fast["batch_size"] and args.negatives == "batch"
    args, _ = NumericExperiment.parse_flags([])
    defaults = {
        **{"model_dir": "models", "model_id": None, "encoding_size": 0, "semantics_n": 10, "modality_n": 5},
        **{"theta_value": 1022, "beta_value": -1, "change_prob": 0.75, "causal_dependence": False, "margin_param": 1.0},
        **{"cond_param": 1.0, "n_mixing_layer": 3, "seed": None, "batch_size": 6144, "lr": 1e-4, "train_steps": 100001},
        **{"log_steps": 1000, "evaluate": False, "num_eval_batches": 5, "mlp_eval": False, "no_cuda": False},
        **{"load_args": False, "protocol": "code", "init": "default", "lr_schedule": "constant", "precision": "fp32"},
        **{"preconditioner": "none", "layer_lr": "uniform", "final_batch_size": 0},
        "negatives": "independent",
        "spare_dimensions": 0,
    }
    assert {name: getattr(args, name) for name in defaults} == defaults


def settled(flags):
    """The flags of a command line, with what its recipe leaves "auto"."""
    args, _ = NumericExperiment.parse_flags(flags.split())
    NumericExperiment.settle(args)
    return args


def test_the_fast_recipe_takes_larger_batches_for_larger_encodings(run, tmp_path, monkeypatch):
    monkeypatch.setitem(main_numeric.AUTO_BATCH, "fast", (10, 5))
    base = f"{TINY} --recipe fast"
    for flags, size in (("", 20), ("--encoding-size 4", 30), ("--beta-value 0", 16), ("--final-batch-size 17", 17)):
        assert run(f"{flags} --seed 1 --overwrite", base=base)[0] == 0
        assert json.loads((tmp_path / "models/m/args.json").read_text())["final_batch_size"] == size
    code, _, err = run("--final-batch-size 20 --resume", base=base)
    assert code == 2 and "--final-batch-size 20 contradicts 17" in err


def test_the_fast_recipe_takes_its_steps_from_the_size_of_the_encoding(run, tmp_path, monkeypatch):
    assert all(steps[0][0] == 1 for steps in main_numeric.AUTO_STEPS.values())  # there is no smaller encoding
    monkeypatch.setitem(main_numeric.AUTO_STEPS, "fast", ((1, 9), (3, 5), (5, 8)))
    base = TINY.replace("--train-steps 40", "--recipe fast")
    for flags, steps in (("--beta-value 0", 9), ("", 7), ("--encoding-size 5", 8), ("--encoding-size 9", 8),
                         ("--train-steps 6", 6)):  # fmt: skip
        assert run(f"{flags} --seed 1 --overwrite", base=base)[0] == 0
        assert json.loads((tmp_path / "models/m/args.json").read_text())["train_steps"] == steps
    found = [settled(flags).train_steps for flags in (
        "--recipe fast", "--recipe fast --causal-dependence", "--recipe fast --causal-dependence --train-steps 30",
        "--recipe wide", "--recipe wide --causal-dependence", "--recipe paper --causal-dependence")]  # fmt: skip
    assert found == [8, 12, 30, 7000, 7000, 100_001], "dependent semantics take longer"


def test_the_fast_recipe_has_spare_dimensions_where_the_size_of_the_encodings_is_not_given():
    found = [settled(flags).spare_dimensions for flags in (
        "--recipe fast", "--recipe fast --spare-dimensions 2", "--recipe fast --encoding-size 3",
        "--recipe fast --omission-prob 0.1", "--recipe fast --encoding-size 3 --spare-dimensions 2", "--recipe wide",
        "--recipe paper")]  # fmt: skip
    assert found == [5, 2, 0, 0, 2, 0, 0]


def test_no_model_id_and_no_seed_are_made_printed_and_stored(tmp_path, capsys, run):
    argv = [*TINY.split(), "--model-dir", str(tmp_path)]
    for _ in range(2):
        assert main_numeric.main(argv) == 0
    out = capsys.readouterr().out
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["numeric_theta3_beta-1", "numeric_theta3_beta-1-2"]
    seeds = [json.loads((tmp_path / name / "args.json").read_text())["seed"] for name in names]
    assert seeds[0] != seeds[1] and all(f"{tmp_path / name}, seed {seed}" in out for name, seed in zip(names, seeds, strict=True))


def test_kernel_ridge_is_the_nonlinear_probe_without_mlp_eval(run, tmp_path, trained):
    directory, _ = trained
    mlp = pd.read_csv(directory / "results.csv")
    base = TINY.replace("--mlp-eval", "")
    assert run("--seed 1", model="k", base=base)[0] == 0
    ridge = pd.read_csv(tmp_path / "models/k/results.csv")
    assert np.allclose(mlp.r2_linear, ridge.r2_linear) and not np.allclose(mlp.r2_nonlinear, ridge.r2_nonlinear)
    assert ridge.r2_nonlinear.max() > 0.3


# --------------------------------------------------------------------------------------------------------------
# the parts, one by one


def drawn_model(flags, tmp_path):
    """NumericExperiment of command line flags, all weights drawn."""
    args, _ = NumericExperiment.parse_flags([*TINY.split(), "--seed", "1", *flags.split()])
    NumericExperiment.settle(args)
    model = NumericExperiment(args, torch.device("cpu"))
    model.draw(tmp_path)
    return model


@torch.no_grad()
def test_negatives_are_encodings_of_independent_latents(run, tmp_path):
    model = drawn_model("--beta-value 0 --init he --batch-size 30", tmp_path)
    networks, latents = model.networks, model.latents
    z = latents.sample(60, seeded_generator(4, "train"))
    h_x, h_t = networks["f_x"](networks["g_x"](z.z_x)), networks["f_t"](networks["g_t"](z.z_t))
    expected = textbook_multimodal_loss(*(h.double() for h in (h_x[:30], h_t[:30], h_x[30:], h_t[30:])))
    model.generators["train"] = seeded_generator(4, "train")
    assert model.loss(0.0).item() == pytest.approx(expected.item(), abs=1e-6)


def test_image_and_text_are_mixed_by_networks_of_their_own(run, tmp_path):
    networks = drawn_model("--theta-value 6", tmp_path).networks
    mixings, encoders = ([networks[name].state_dict() for name in names] for names in (("g_x", "g_t"), ("f_x", "f_t")))
    for image, text in (mixings, encoders):
        assert all(not torch.equal(image[name], text[name]) for name in image)


def test_targets_are_the_latents_behind_the_encodings(run, tmp_path):
    model = drawn_model("--theta-value 6 --beta-value 2 --encoding-size 5", tmp_path)
    networks, latents = model.networks, model.latents
    encodings, targets = model.encode(2, seeded_generator(4, "evaluate"))
    generator = seeded_generator(4, "evaluate")
    batches = [latents.sample(main_numeric.EVAL_BATCH, generator) for _ in range(2)]
    s, s_tilde, m_x, m_t = (torch.cat([getattr(z, name) for z in batches]) for name in ("s", "s_tilde", "m_x", "m_t"))
    expected = {"s_0": s[:, :1], "s_1": s[:, 1:2], "s_2": s[:, 2:], "s_inv": s[:, :2], "tilde_s_2": s_tilde[:, 2:]}
    expected |= {"m_x": m_x, "m_t": m_t}
    assert list(targets) == list(expected) and all(torch.equal(targets[name], expected[name]) for name in expected)
    inputs = {"x": torch.cat((s, m_x), dim=1), "t": torch.cat((s_tilde, m_t), dim=1)}
    with torch.no_grad():
        for name, z in inputs.items():
            h = networks[f"f_{name}"](networks[f"g_{name}"](z))
            assert h.shape == (600, 5) and torch.allclose(encodings[f"hz_{name}"], h, atol=1e-6)


def test_probes_are_scored_on_other_samples_than_they_are_fitted_on(run, tmp_path, monkeypatch):
    model = drawn_model("--num-eval-batches 2", tmp_path)
    seen, real = [], main_numeric.probes.linear_r2
    monkeypatch.setattr(main_numeric.probes, "linear_r2", lambda *data: seen.append(data) or real(*data))
    model.evaluate(7)
    for fit_h, fit_targets, test_h, test_targets in seen:
        assert fit_h.shape == test_h.shape == (600, 2)
        assert not set(fit_targets["s_0"].flatten().tolist()) & set(test_targets["s_0"].flatten().tolist())
        assert torch.allclose(fit_h.mean(dim=0), torch.zeros(2), atol=1e-6)


@pytest.mark.parametrize(
    "inside, outside, dependent, words",
    [
        (0.96, 0.04, False, "Exactly the unbiased block is learned: the unbiased block {s_0, s_1} has nonlinear R² of"),
        (0.96, 0.5, False, "Not (yet) the pattern of the theory"),
        (0.96, 0.5, True, "The unbiased block is learned"),
        (0.7, -0.1, True, "Not (yet) the pattern of the theory"),
    ],
)
def test_the_verdict_is_about_the_worst_factors(inside, outside, dependent, words):
    latents = MisalignedLatents(3, 1, 6, 2, 0)
    scores = {"s_0": inside, "s_1": 0.99, "s_inv": 0.98, "s_2": -0.2, "tilde_s_2": outside, "m_x": 0.0, "m_t": 0.0}
    rows = [(name, factor, 0.0, score) for name in ("hz_x", "hz_t") for factor, score in scores.items()]
    results = pd.DataFrame(rows, columns=["encoding", "predicted_factors", "r2_linear", "r2_nonlinear"])
    sentence = main_numeric.verdict(results, latents, dependent)
    assert sentence.startswith(words) and f"at least {inside:.3f}" in sentence
    assert f"at most {max(outside, 0):.3f}" in sentence


# --------------------------------------------------------------------------------------------------------------
# --evaluate, --load-args


def test_evaluation_again_has_the_same_model_and_latents_but_other_samples(run, trained):
    directory, _ = trained
    before = contents(directory)
    code, out, err = run("--evaluate --seed 5", base="--no-cuda")
    assert code == 0, err
    after = contents(directory)
    for name in ("f_x.pt", "f_t.pt", "g_x.pt", "g_t.pt", "checkpoint.pt", "train_log.csv"):
        assert before[name] == after[name]
    assert after["results_seed2.csv"] == before["results.csv"] != after["results.csv"], "the earlier results are kept"
    first, again = pd.read_csv(directory / "results_seed2.csv"), pd.read_csv(directory / "results.csv")
    assert np.abs(first.r2_linear - again.r2_linear).max() < 0.2, "the same model and the same latents"
    stored = json.loads(after["args.json"])
    assert stored["seed"] == 1 and stored["eval_seed"] == 5 and stored["finished"] and stored["dimensions"] == 2
    assert "I_θ = {s_0, s_1}" in out
    # and back: the evaluation's seed alone decides
    assert run("--evaluate --seed 2", base="--no-cuda")[0] == 0
    assert contents(directory)["results.csv"] == before["results.csv"]


def test_dependent_latents_are_evaluated_with_the_covariances_of_the_training(run, tmp_path, monkeypatch):
    assert run("--seed 1 --causal-dependence")[0] == 0
    seen = []
    real = NumericExperiment.evaluate

    def noted(model, seed):
        seen.append(model.latents.sample(5, seeded_generator(0, "train")).s)
        return real(model, seed)

    monkeypatch.setattr(NumericExperiment, "evaluate", noted)
    assert run("--evaluate --seed 9", base="--no-cuda")[0] == 0
    expected = MisalignedLatents(3, 1, 3, -1, 1, causal_dependence=True).sample(5, seeded_generator(0, "train")).s
    assert torch.equal(seen[0], expected)


def test_an_evaluation_killed_before_its_end_is_not_taken_for_another(run, trained, monkeypatch):
    directory, _ = trained
    before = contents(directory)
    with monkeypatch.context() as patch:

        def dying(*_):
            raise KeyboardInterrupt

        patch.setattr(experiment, "write_json", dying)
        assert run("--evaluate --seed 7", base="--no-cuda")[0] == 130
    assert contents(directory) == before
    assert run("--evaluate --seed 8", base="--no-cuda")[0] == 0
    after = contents(directory)
    assert after["results_seed2.csv"] == before["results.csv"] != after["results.csv"] and "results_seed7.csv" not in after


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_evaluation_says_how_to_resume(run, tmp_path, monkeypatch, number):
    assert run("--seed 1", "whole")[0] == 0
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(NumericExperiment, "evaluate", lambda *_: os.kill(os.getpid(), number))
        code, _, err = run("--seed 1", "stopped")
    assert code == 128 + number and len(err.splitlines()) == 1
    assert f"stopped by {number.name} in the evaluation" in err and "--model-id stopped --resume" in err
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert run("--resume", "stopped", base="--no-cuda")[0] == 0
    whole, stopped = (contents(tmp_path / "models" / name) for name in ("whole", "stopped"))
    assert all(stopped[name] == whole[name] for name in ("f_x.pt", "f_t.pt", "results.csv"))


def test_a_flag_that_contradicts_args_json_is_named_with_both_values(run, trained):
    directory, _ = trained
    before = contents(directory)
    code, out, err = run("--evaluate --seed 5 --theta-value 2", base="--no-cuda")
    assert code == 2 and "--theta-value 2 contradicts 3" in err and len(err.splitlines()) == 1
    assert contents(directory) == before
    code, out, _ = run("--evaluate --seed 5 --theta-value 2 --load-args", base="--no-cuda")
    assert code == 0 and "--theta-value 3 is taken from" in out and "I_θ = {s_0, s_1}" in out
    code, _, err = run("--resume --lr 0.5", base="--no-cuda")
    assert code == 2 and "--lr 0.5 contradicts 0.0001" in err


def test_evaluation_may_change_its_own_flags(run, trained):
    directory, _ = trained
    assert run("--evaluate --seed 5 --num-eval-batches 2", base="--no-cuda")[0] == 0
    assert json.loads(contents(directory)["args.json"])["num_eval_batches"] == 2


def test_evaluation_needs_no_device_that_has_the_precision_of_the_training(run, trained):
    directory, _ = trained
    stored = json.loads((directory / "args.json").read_text())
    (directory / "args.json").write_text(json.dumps({**stored, "precision": "tf32"}))
    code, out, err = run("--evaluate --seed 5", base="--no-cuda")
    assert code == 0 and "threads, fp32" in out, err
    assert json.loads((directory / "args.json").read_text())["precision"] == "tf32"


def test_evaluation_without_a_seed_draws_one_that_is_not_the_training_s(run, trained, monkeypatch):
    directory, _ = trained
    drawn = iter([1, 1, 77])
    monkeypatch.setattr(model_directory, "drawn_seed", lambda: next(drawn))
    assert run("--evaluate", base="--no-cuda")[0] == 0
    assert json.loads(contents(directory)["args.json"])["eval_seed"] == 77


@pytest.mark.parametrize("flags, schedule", [("--probes fast", (5, 10.0)), ("--probes paper", ())])
def test_the_evaluation_takes_the_probes_of_the_flag(run, tmp_path, monkeypatch, flags, schedule):
    monkeypatch.setattr(main_numeric, "FAST_PROBES", (5, 10.0))
    seen, real = [], probes.mlp_r2
    monkeypatch.setattr(probes, "mlp_r2", lambda *call: seen.append(call[4:]) or real(*call))
    drawn_model(flags, tmp_path).evaluate(7)
    assert seen == [schedule]


def test_the_verdict_is_about_images_alone_where_texts_omit_at_random():
    latents = MisalignedLatents(3, 1, 3, -1, 0, omission_prob=0.25)
    scores = {"s_0": 0.95, "s_1": 0.95, "s_inv": 0.95, "s_2": 0.0, "m_x": 0.0, "m_t": 0.0}
    rows = [(h, name, 0.0, score * share) for h, share in (("hz_x", 1), ("hz_t", 0.75)) for name, score in scores.items()]
    results = pd.DataFrame(rows, columns=["encoding", "predicted_factors", "r2_linear", "r2_nonlinear"])
    assert main_numeric.verdict(results, latents, False).startswith("Exactly the unbiased block is learned")
    told = MisalignedLatents(3, 1, 3, -1, 0)
    assert main_numeric.verdict(results, told, False).startswith("Not (yet)")


def test_the_monitor_scores_other_samples_than_it_fits_on(run, tmp_path, monkeypatch):
    seen, real = [], probes.linear_r2
    monkeypatch.setattr(probes, "linear_r2", lambda *data: seen.append(data) or real(*data))
    drawn_model("", tmp_path).monitor()
    assert len(seen) == 2
    for _, fit_targets, _, test_targets in seen:
        assert not set(fit_targets["s_0"].flatten().tolist()) & set(test_targets["s_0"].flatten().tolist())


def test_the_sigmoid_loss_begins_with_the_odds_of_a_batch(run, tmp_path):
    model = drawn_model("--loss sigmoid --batch-size 30", tmp_path)
    assert model.objective.similarity == "distance" and model.objective.bias.item() == pytest.approx(-math.log(30))


def test_the_batch_grows_while_the_training_goes_on(run, tmp_path, monkeypatch):
    for flags, passes in (("--negatives batch", 1), ("--negatives independent", 2), ("--loss sigmoid", 1)):
        model, drawn = drawn_model(f"--batch-size 10 --final-batch-size 40 {flags}", tmp_path), []
        real = model.latents.sample
        monkeypatch.setattr(
            model.latents, "sample", lambda count, g, real=real, drawn=drawn: drawn.append(count) or real(count, g)
        )
        for share in (0, 0.5, 0.999):
            model.loss(share)
        assert drawn == [10 * passes, 20 * passes, 40 * passes], flags


def test_the_paper_s_recipe_is_the_specified_one():
    args, _ = NumericExperiment.parse_flags([])
    defaults = {"recipe": "paper", "hidden_sizes": "paper", "optimiser": "adam", "probes": "paper", "loss": "infonce",
                "latents": "gaussian", "omission_prob": 0.0}  # fmt: skip
    assert {name: getattr(args, name) for name in defaults} == defaults


def test_geometry_is_of_the_test_samples_in_the_metric_of_the_loss(run, tmp_path):
    assert run("--seed 1 --save-encodings")[0] == 0
    directory = tmp_path / "models/m"
    with np.load(directory / "encodings.npz") as kept:
        h_x, h_t = (torch.from_numpy(kept[name][kept["is_test"]]) for name in ("hz_x", "hz_t"))
    found = pd.read_csv(directory / "geometry.csv").iloc[0].to_dict()
    assert found == pytest.approx(geometry(h_x, h_t, "distance"), rel=1e-6)


def test_the_paper_s_numbers_of_samples_and_steps():
    assert main_numeric.EVAL_BATCH == 4096 and downstream.STEPS == 10_000 and mlp_probes.MAX_EPOCHS == 10_000


@pytest.mark.parametrize("inside, outside", [(0.89, 0.04), (0.96, 0.11)])
def test_the_verdict_has_the_bounds_of_the_specification(inside, outside):
    latents = MisalignedLatents(3, 1, 6, 2, 0)
    scores = {"s_0": inside, "s_1": 0.99, "s_inv": 0.98, "s_2": outside}
    rows = [(name, factor, 0.0, score) for name in ("hz_x", "hz_t") for factor, score in scores.items()]
    results = pd.DataFrame(rows, columns=["encoding", "predicted_factors", "r2_linear", "r2_nonlinear"])
    assert main_numeric.verdict(results, latents, False).startswith("Not (yet)")


def test_the_mlp_probes_follow_the_evaluation_s_seed(run, tmp_path, monkeypatch):
    model, seen, real = drawn_model("", tmp_path), [], probes.mlp_r2
    monkeypatch.setattr(probes, "mlp_r2", lambda *call: seen.append(call[3].initial_seed()) or real(*call))
    for seed in (5, 6, 5):
        model.evaluate(seed)
    assert seen[0] == seen[2] != seen[1]


@torch.no_grad()
def test_what_is_kept_of_spare_dimensions_is_chosen_by_both_modalities(run, tmp_path, monkeypatch):
    model, seen, real = drawn_model("--spare-dimensions 2", tmp_path), [], main_numeric.narrowed
    monkeypatch.setattr(main_numeric, "narrowed", lambda *call: seen.append(call) or real(*call))
    _, h_x, h_t = model.sample(main_numeric.EVAL_BATCH, seeded_generator(1, "narrow"))
    model.complete()
    ((_, (x, t), size),) = seen
    assert torch.equal(x, h_x) and torch.equal(t, h_t) and size == 2


def test_initial_weights_and_batches_follow_the_training_seed(run, tmp_path):
    (tmp_path / "other").mkdir()
    one, other = drawn_model("", tmp_path), drawn_model("--seed 2", tmp_path / "other")
    for name in ("g_x", "g_t", "f_x", "f_t"):
        pairs = zip(one.networks[name].parameters(), other.networks[name].parameters(), strict=True)
        assert all(not torch.equal(a, b) for a, b in pairs), name
    assert one.generators["train"].initial_seed() != other.generators["train"].initial_seed()


def test_the_samples_follow_the_evaluation_s_seed(run, tmp_path):
    model, seen = drawn_model("", tmp_path), []
    for seed in (5, 6, 5):
        model.evaluate(seed)
        seen.append(model.evaluated["test"]["s_0"])
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


def test_memory_is_limited_before_a_training_and_an_evaluation_on_a_cpu(run, monkeypatch):
    limited, real = [], NumericExperiment.__init__
    monkeypatch.setattr(experiment, "limit_memory", lambda: limited.append("limited"))
    monkeypatch.setattr(NumericExperiment, "__init__", lambda *given: (limited.append("built"), real(*given))[1])
    assert run("--seed 1")[0] == 0 and limited == ["limited", "built"]
    assert run("--evaluate --seed 5", base="--no-cuda")[0] == 0 and limited == 2 * ["limited", "built"]


def test_what_an_evaluation_leaves_alone_stays_known_by_its_digest(run, trained):
    directory, _ = trained
    assert run("--evaluate --seed 5 --save-encodings", base="--no-cuda")[0] == 0
    stored = json.loads((directory / "args.json").read_text())
    (directory / "args.json").write_text(json.dumps({**stored, "save_encodings": False}))
    assert run("--evaluate --seed 6", base="--no-cuda")[0] == 0
    recorded = json.loads((directory / "args.json").read_text())["files"]
    assert recorded["encodings.npz"] == digest(directory / "encodings.npz")


def test_a_model_whose_weights_are_not_written_yet_is_not_evaluated(run, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(model_directory, "save_weights", lambda *_: (_ for _ in ()).throw(Killed()))
        run("--seed 1")
    code, _, err = run("--evaluate --seed 5", base="--no-cuda")
    assert code == 2 and "is trained, but its weights are not written yet; --resume does that" in err


def test_an_evaluation_with_the_same_seed_keeps_no_copy(run, trained):
    directory, _ = trained
    assert run("--evaluate --seed 2 --num-eval-batches 2", base="--no-cuda")[0] == 0
    assert not list(directory.glob("results_seed*"))


def test_a_model_whose_evaluation_was_killed_can_be_evaluated_with_another_seed(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(NumericExperiment, "evaluate", lambda *_: (_ for _ in ()).throw(Killed()))
        run("--seed 1")
    code, _, err = run("--evaluate --seed 5", base="--no-cuda")
    assert code == 0, err
    assert json.loads((tmp_path / "models/m/args.json").read_text())["finished"]


# --------------------------------------------------------------------------------------------------------------
# finished models are safe


def test_a_finished_model_is_not_overwritten_without_overwrite(run, trained):
    directory, _ = trained
    before = contents(directory)
    code, _, err = run("--seed 2")
    assert code == 2 and "--overwrite" in err and contents(directory) == before
    code, out, _ = run("--resume")
    assert code == 0 and "finished already" in out and contents(directory) == before
    assert run("--seed 2 --overwrite")[0] == 0
    after = contents(directory)
    assert sorted(after) == FILES and after["f_x.pt"] != before["f_x.pt"]


@pytest.mark.parametrize("finished", [True, False])
def test_load_args_alone_overwrites_nothing(run, trained, finished):
    directory, _ = trained
    stored = json.loads((directory / "args.json").read_text())
    (directory / "args.json").write_text(json.dumps({**stored, "finished": finished}))
    before = contents(directory)
    code, _, err = run("--load-args", base="--no-cuda")
    assert code == 2 and "--overwrite" in err and contents(directory) == before


def test_an_unfinished_run_is_not_overwritten_either(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(NumericExperiment, "evaluate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert run("--seed 1")[0] == 2
    before = contents(tmp_path / "models/m")
    code, _, err = run("--seed 2")
    assert code == 2 and "--resume" in err and contents(tmp_path / "models/m") == before


def test_a_directory_with_a_damaged_args_json_can_be_overwritten(run, trained):
    directory, _ = trained
    (directory / "args.json").write_text("{")
    assert run("--seed 2 --overwrite")[0] == 0 and sorted(contents(directory)) == FILES


def test_encodings_are_kept_where_they_are_asked_for(run, trained):
    directory, _ = trained
    assert "encodings.npz" not in contents(directory)
    assert run("--evaluate --seed 5 --save-encodings", base="--no-cuda")[0] == 0
    with np.load(directory / "encodings.npz", allow_pickle=False) as file:
        kept = dict(file)
    assert set(kept) == {"hz_x", "hz_t", "s_0", "s_1", "s_2", "s_inv", "m_x", "m_t", "is_test", "seed"}
    assert kept["seed"] == 5 and kept["hz_x"].shape == (2 * kept["is_test"].sum(), 2)
    results = pd.read_csv(directory / "results.csv").set_index(["encoding", "predicted_factors"]).r2_linear
    test = kept["is_test"]
    for encoding in ("hz_x", "hz_t"):
        h = np.c_[kept[encoding].astype(float), np.ones(len(test))]
        for factor in ("s_0", "s_2", "m_x"):
            weights = np.linalg.lstsq(h[~test], kept[factor][~test].astype(float), rcond=None)[0]
            target = kept[factor][test].astype(float)
            r2 = 1 - ((target - h[test] @ weights) ** 2).sum(0) / ((target - target.mean(0)) ** 2).sum(0)
            assert results[encoding, factor] == pytest.approx(r2.mean(), abs=1e-5)
    assert run("--overwrite --seed 1")[0] == 0
    assert "encodings.npz" not in contents(directory), "of the model that was given up"


def test_the_sigmoid_loss_finds_the_same_block_with_a_scale_that_it_learns(run, tmp_path):
    setting = "--semantics-n 4 --modality-n 2 --theta-value 11 --beta-value 3 --num-eval-batches 1 --mlp-eval --no-cuda"
    code, out, err = run(
        f"--loss sigmoid --recipe fast --batch-size 256 --train-steps 350 --log-steps 350 --seed 1 {setting}", base=""
    )
    assert code == 0, err
    assert "350 steps of 256 to 400 pairs" in out and "sigmoid loss" in out
    assert "Exactly the unbiased block is learned: the unbiased block {s_0, s_1}" in out
    learned = torch.load(tmp_path / "models/m/checkpoint.pt", weights_only=True)["modules"]["objective"]
    assert set(learned) == {"log_scale", "bias"}
    assert abs(learned["bias"] + np.log(256)) > 0.5 and learned["log_scale"] != 0, "both have moved"
    assert run("--evaluate --seed 5", base="--no-cuda")[0] == 0
    assert sorted(path.name for path in (tmp_path / "models/m").glob("*.pt")) == [
        "checkpoint.pt", "f_t.pt", "f_x.pt", "g_t.pt", "g_x.pt"]  # fmt: skip


@pytest.mark.parametrize("removals", [0, 3, 7])
def test_a_run_killed_while_it_overwrites_is_the_earlier_one(run, trained, monkeypatch, removals):
    directory, _ = trained
    before = contents(directory)
    real, count = Path.unlink, iter(range(100))

    def dying(path):
        if next(count) == removals:
            raise KeyboardInterrupt
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying)
        assert run("--seed 2 --overwrite")[0] == 130
    monkeypatch.setattr(experiment, "write_evaluation", lambda *_: {})
    assert run("--resume", base="--no-cuda")[0] == 0
    after = contents(directory)
    assert all(after[name] == before[name] for name in ("f_x.pt", "f_t.pt", "g_x.pt", "g_t.pt"))
    assert json.loads(after["args.json"])["seed"] == 1


def test_resume_starts_what_never_began(run, tmp_path):
    assert run("--seed 1 --resume", "fresh")[0] == 0
    assert sorted(contents(tmp_path / "models/fresh")) == FILES


def test_resume_goes_on_from_no_checkpoint_whose_flags_are_lost(run, trained):
    directory, _ = trained
    (directory / "args.json").unlink()
    before = contents(directory)
    fails(run, "--seed 2 --resume", "holds files but no args.json")
    assert contents(directory) == before


def test_what_a_killed_process_left_half_written_is_cleared_away(run, tmp_path):
    directory = tmp_path / "models/m"
    directory.mkdir(parents=True)
    for name in (".args.json.x7a.json", ".checkpoint.pt.k2_.pt", ".results.png.99b.png"):
        (directory / name).write_text("{")
    assert run("--seed 1 --resume")[0] == 0 and sorted(contents(directory)) == FILES


# --------------------------------------------------------------------------------------------------------------
# bad input: one line, exit code 2, nothing changed


def fails(run, flags, words, **options):
    code, out, err = run(flags, **options)
    assert code == 2, (out, err)
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: ") and "Traceback" not in err
    assert words in err, err


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--omission-prob 0.2 --spare-dimensions 2", "with --omission-prob image and text agree on no direction alone"),
        ("--omission-prob 1", "--omission-prob: 1 is out of range, expected a number of at least 0 and below 1"),
        ("--semantics-n 1000000000000", "--semantics-n: 1000000000000 is too large"),
        ("--theta-value 7", "--theta-value 7 is out of range: 3 semantics have the subsets 0 … 6"),
        ("--theta-value -1", "--theta-value: -1 is too small"),
        ("--beta-value 7", "--beta-value 7 is out of range: 3 semantics have the subsets -1 … 6"),
        ("--beta-value -2", "--beta-value"),
        ("--theta-value 3 --beta-value 3", "no unbiased semantics are left"),
        ("--theta-value 0 --beta-value 6", "no unbiased semantics are left"),
        ("--semantics-n 0", "--semantics-n"),
        ("--semantics-n -3", "--semantics-n"),
        ("--modality-n -1", "--modality-n"),
        ("--batch-size 0", "--batch-size"),
        ("--train-steps 0", "--train-steps"),
        ("--log-steps -1", "--log-steps"),
        ("--encoding-size -1", "--encoding-size"),
        ("--n-mixing-layer 0", "--n-mixing-layer"),
        ("--num-eval-batches 0", "--num-eval-batches"),
        ("--change-prob 1.5", "--change-prob"),
        ("--change-prob -0.1", "--change-prob"),
        ("--change-prob nan", "--change-prob"),
        ("--hidden-sizes 7,0", "--hidden-sizes"),
        ("--hidden-sizes 7,,5", "--hidden-sizes"),
        ("--hidden-sizes wide", "--hidden-sizes"),
        ("--lr 0", "--lr"),
        ("--lr inf", "--lr"),
        ("--lr nan", "--lr"),
        ("--final-batch-size 1", "--final-batch-size: 1 is too small, expected an integer of at least 2, or 0"),
        ("--margin-param 0", "--margin-param"),
        ("--latents laplace --causal-dependence", "leave out --causal-dependence"),
        ("--latents cauchy", "--latents"),
        ("--margin-param 1e-200", "--margin-param"),
        ("--cond-param 1e200", "--cond-param"),
        ("--cond-param -1", "--cond-param"),
        ("--seed -1", "--seed"),
        ("--seed x", "--seed"),
        ("--precision fp64", "--precision"),
        ("--precision tf32", "--precision tf32 needs a CUDA device"),
        ("--init xavier", "--init"),
        ("--recipe slow", "--recipe"),
        ("--protocol text", "--protocol"),
        ("--no-such-flag", "--no-such-flag"),
        ("--resume --overwrite", "exclude each other"),
        ("--evaluate --export-official there", "exclude each other"),
        ("--evaluate", "args.json is missing"),
        ("--load-args", "args.json is missing"),
        ("--export-official=", "holds no finished model"),
    ],
)
def test_bad_flags(run, tmp_path, flags, words):
    fails(run, flags, words)
    assert not (tmp_path / "models").exists()


def test_an_update_that_makes_encodings_explode_is_one_line_where_they_are_scored(run):
    """The loss of its step was finite."""
    fails(run, "--seed 1 --lr 1e30 --train-steps 2 --log-steps 1", "the encodings after step 1 cannot be scored: ")


def test_evaluation_with_the_training_seed(run, trained):
    before = contents(trained[0])
    fails(run, "--evaluate --seed 1", "--seed 1 is the training seed", base="--no-cuda")
    assert contents(trained[0]) == before


@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("args.json", None, "args.json is missing"),
        ("args.json", b'{"seed": 1,', "args.json is damaged"),
        ("args.json", b"[]", "args.json is damaged"),
        ("args.json", b'{"theta_value": 3}', "args.json is damaged"),
        ("args.json", b'{"seed": 1}', "args.json has no"),
        ("f_x.pt", None, "f_x.pt is missing"),
        ("f_t.pt", b"PK", "f_t.pt is damaged"),
        ("g_x.pt", b"", "g_x.pt is damaged"),
    ],
)
def test_damaged_model_directories(run, trained, name, damage, words):
    directory, _ = trained
    if damage is None:
        (directory / name).unlink()
    else:
        (directory / name).write_bytes(damage)
    before = contents(directory)
    fails(run, "--evaluate --seed 5", words, base="--no-cuda")
    assert contents(directory) == before


@pytest.mark.parametrize(
    "name, value",
    [
        *(("seed", True), ("seed", -1), ("theta_value", "3"), ("modality_n", 2.5), ("semantics_n", 0)),
        *(("change_prob", "x"), ("protocol", "text"), ("batch_size", None), ("num_eval_batches", 0), ("lr", "x")),
        *(("mlp_eval", "no"), ("train_steps", "9"), ("init", "q"), ("causal_dependence", 1)),
    ],
)
def test_args_json_with_a_value_that_no_flag_has(run, tmp_path, name, value):
    directory = tmp_path / "models/m"
    directory.mkdir(parents=True)
    args, _ = NumericExperiment.parse_flags([*TINY.split(), "--seed", "1"])
    (directory / "args.json").write_text(json.dumps({**vars(args), name: value}))
    for flags in ("--evaluate --seed 5", "--resume"):
        fails(run, flags, "args.json is damaged", base="--no-cuda")
    assert [path.name for path in directory.iterdir()] == ["args.json"]


def test_a_truncated_weight_file_and_one_of_another_shape(run, trained):
    directory, _ = trained
    whole = (directory / "f_x.pt").read_bytes()
    (directory / "f_x.pt").write_bytes(whole[: len(whole) // 2])
    fails(run, "--evaluate --seed 5", "f_x.pt is damaged", base="--no-cuda")
    (directory / "f_x.pt").write_bytes((directory / "f_t.pt").read_bytes())
    fails(run, "--evaluate --seed 5", "expected (40, 4)", base="--no-cuda")


def test_weights_that_are_not_finite(run, trained):
    directory, _ = trained
    state = model_directory.load_torch(directory / "f_x.pt")
    model_directory.save_torch({name: value * float("nan") for name, value in state.items()}, directory / "f_x.pt")
    forget_digests(directory)
    before = contents(directory)
    fails(run, "--evaluate --seed 5", "cannot be evaluated: the fitting encoding holds values", base="--no-cuda")
    assert contents(directory) == before


def test_a_damaged_checkpoint_is_named_and_kept(run, tmp_path, trained):
    directory, _ = trained
    stored = json.loads((directory / "args.json").read_text())
    (directory / "args.json").write_text(json.dumps({**stored, "finished": False}))
    checkpoint = (directory / "checkpoint.pt").read_bytes()
    for damaged in (checkpoint[:1000], b""):
        (directory / "checkpoint.pt").write_bytes(damaged)
        before = contents(directory)
        fails(run, "--resume", "checkpoint.pt is damaged", base="--no-cuda")
        after = contents(directory)
        assert {**before, "args.json": 0} == {**after, "args.json": 0}
    for other in ({"progress": {}}, [1, 2], {"modules": {"f_x": {"0.weight": 1}}}):
        model_directory.save_torch(other, directory / "checkpoint.pt")
        fails(run, "--resume", "checkpoint.pt is not a checkpoint of this run", base="--no-cuda")


def test_places_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("x")
    fails(run, "", "file", model_dir=tmp_path / "file")
    fails(run, "", "file is a file", model="file", model_dir=tmp_path)
    assert (tmp_path / "file").read_text() == "x"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.csv").write_text("x")
    fails(run, "", "holds files but no args.json", model="notes", model_dir=tmp_path)
    fails(run, "--overwrite", "it is no model", model="notes", model_dir=tmp_path)
    assert (tmp_path / "notes/a.csv").read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_write_permission(run, tmp_path):
    (tmp_path / "models").mkdir(mode=0o555)
    fails(run, "", "Permission denied")


def test_a_full_disk_loses_nothing(run, tmp_path, monkeypatch):
    """A limit on the size of files stands for the full disk: the checkpoint is the first file that does not fit."""
    directory, real = tmp_path / "models/m", NumericExperiment.monitor

    def dying(model):
        if (directory / "checkpoint_before.pt").exists():
            raise Killed
        return real(model)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(NumericExperiment, "monitor", dying)
        run("--seed 1")
    before = contents(directory)
    command = [
        sys.executable,
        "main_numeric.py",
        "--no-cuda",
        "--resume",
        "--model-dir",
        str(tmp_path / "models"),
        "--model-id",
        "m",
    ]
    limit = len(before["checkpoint.pt"]) // 2
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))  # fmt: skip
    message = f"error: File too large: {directory / 'checkpoint.pt'}; nothing that was complete has been lost\n"
    assert (done.returncode, done.stderr) == (2, message)
    after = contents(directory)
    assert {**before, "args.json": 0} == {**after, "args.json": 0}, "no half-written file, and the checkpoint as it was"
    assert run("--resume", base="--no-cuda")[0] == 0


def test_starting_on_a_full_disk_changes_nothing(run, trained, monkeypatch):
    directory, _ = trained
    before = contents(directory)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))
    try:
        fails(run, "--seed 2 --overwrite", f"File too large: {directory}")
        fails(run, "--seed 2", "File too large", model="new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(directory) == before and [path.name for path in directory.parent.iterdir()] == ["m"]


def test_help_groups_the_flags_and_needs_nothing():
    done = subprocess.run([sys.executable, "main_numeric.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for words in (
        "setting: what the text says of the image",
        "evaluation",
        "selection bias θ",
        "perturbation bias ρ",
        "(paper 6144, fast",
    ):
        assert words in done.stdout


def test_what_texts_omit_at_random_is_learned_by_the_image_encoder_and_known_of_the_text_by_a_mask(run, tmp_path):
    setting = "--semantics-n 3 --modality-n 1 --theta-value 3 --num-eval-batches 10 --mlp-eval --no-cuda"
    code, out, err = run(f"--recipe fast --batch-size 256 --train-steps 220 --omission-prob 0.25 --seed 1 {setting}", base="")
    assert code == 0, err
    assert "I_θ = {s_0, s_1}; the text leaves out {s_2}, and each of I_θ with probability 0.25" in out
    directory = tmp_path / "models/m"
    weights = torch.load(directory / "f_t.pt", weights_only=True)
    assert next(iter(weights.values())).shape[1] == 2 + 1 + 2, "selected, modality-specific, mask"
    scores = pd.read_csv(directory / "results.csv").set_index(["encoding", "predicted_factors"]).r2_nonlinear
    image, text = scores["hz_x"], scores["hz_t"]
    assert image[["s_0", "s_1"]].min() > 0.8 and image[["s_2", "m_x"]].max() < 0.05
    assert 0.5 < text[["s_0", "s_1"]].min() <= text[["s_0", "s_1"]].max() < 0.78, "at most what the text still tells, 0.75"
    again = run("--evaluate --seed 2", base="--no-cuda")
    assert again[0] == 0 and pd.read_csv(directory / "results.csv").r2_linear.notna().all()


def test_the_floor_is_what_the_probes_find_of_the_encoders_as_they_were_drawn(run, trained, tmp_path):
    directory, _ = trained
    before = contents(directory)
    assert run("--evaluate --seed 5 --save-encodings", base="--no-cuda")[0] == 0
    plain = contents(directory)
    code, _, err = run("--evaluate --seed 5 --floor --save-encodings", base="--no-cuda")
    assert code == 0, err
    after = contents(directory)
    assert after["results.csv"] == plain["results.csv"] and after["f_x.pt"] == before["f_x.pt"], "the model's own scores stay"
    floor = pd.read_csv(directory / "references.csv")
    assert set(floor.reference) == {"floor"}
    # one step at a rate of next to nothing leaves the encoders as they were drawn
    assert run("--seed 1 --train-steps 1 --lr 1e-30", model="drawn")[0] == 0
    assert run("--evaluate --seed 5", base="--no-cuda", model="drawn")[0] == 0
    drawn = pd.read_csv(tmp_path / "models/drawn/results.csv")
    assert floor.drop(columns="reference").equals(drawn) and not drawn.equals(pd.read_csv(directory / "results.csv"))
    (directory / "before.npz").write_bytes(plain["encodings.npz"])
    with np.load(directory / "encodings.npz") as kept, np.load(directory / "before.npz") as trained_ones:
        assert all(np.array_equal(kept[name], trained_ones[name]) for name in trained_ones.files), "of the trained encoders"
    assert plain["geometry.csv"] == after["geometry.csv"]


def test_a_floor_that_cannot_be_evaluated_is_one_line_and_leaves_the_results(run, trained, monkeypatch):
    directory, _ = trained
    before = contents(directory)

    def failing(model):
        raise MemoryError

    monkeypatch.setattr(NumericExperiment, "draw_encoders", failing)
    code, _, err = run("--evaluate --seed 5 --floor", base="--no-cuda")
    assert code == 2 and err.count("\n") == 1 and "too little memory for the evaluation" in err, err
    assert contents(directory) == before
