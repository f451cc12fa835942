"""Models of the code behind the paper's figures, read and written: the names of their weights, and their args.json."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import encoders
import main_mpi3dreal
import mlp_probes
from latent_spaces import MixingNetwork
from running.directory import load_weights, read_weights
from running.official import official_names
from tests.scripts import outcome
from tests.test_eval_numeric_predict import predict  # noqa: F401

# their numeric args.json, as the specification names the flags
NUMERIC = {
    **{"model_dir": "models", "model_id": "theirs", "encoding_size": 0, "semantics_n": 3, "modality_n": 1, "theta_value": 3},
    **{"beta_value": -1, "change_prob": 0.75, "causal_dependence": False, "margin_param": 1.0, "cond_param": 1.0},
    **{"n_mixing_layer": 3, "seed": 1, "batch_size": 16, "lr": 1e-4, "train_steps": 40, "log_steps": 10, "evaluate": False},
    **{"num_eval_batches": 1, "mlp_eval": True, "no_cuda": True, "load_args": False},
}
IMAGES = {
    **{"model_dir": "models", "model_id": "theirs", "bias_type": "selection", "bias_id": 1, "encoding_size": 0},
    **{"hidden_size": 100, "tau": 1.0, "lr": 1e-5, "batch_size": 12, "train_steps": 12, "log_steps": 5, "seed": 1},
    **{"checkpoint_steps": 4, "evaluate": False, "workers": 0, "no_cuda": True, "load_args": False},
}


def plain_mixing(size, layers=3):
    """Their mixing network."""
    parts = [part for _ in range(layers) for part in (nn.Linear(size, size, bias=False), nn.LeakyReLU(0.2))]
    return nn.Sequential(*parts[:-1])


def written(directory, states, args):
    directory.mkdir(parents=True)
    for name, state in states.items():
        torch.save(state, directory / f"{name}.pt")
    (directory / "args.json").write_text(json.dumps(args))
    return directory


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_mixing_network_computes_what_theirs_does(tmp_path):
    theirs = plain_mixing(5, 4)
    torch.save(theirs.state_dict(), tmp_path / "g_x.pt")
    z = torch.randn(20, 5)
    assert torch.equal(load_weights(MixingNetwork(5, 4), tmp_path / "g_x.pt")(z), theirs(z))


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_encoders_compute_what_theirs_do(tmp_path, wrapper):
    theirs = nn.Sequential(resnet18(num_classes=7), nn.LeakyReLU(), nn.Linear(7, 2)).eval()
    torch.save({wrapper + name: value for name, value in theirs.state_dict().items()}, tmp_path / "encoder_img.pt")
    ours = encoders.ImageEncoder(2, (0, 0, 0), (1 / 255,) * 3, hidden_size=7)
    load_weights(ours, tmp_path / "encoder_img.pt").eval()
    images = torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images.permute(0, 3, 1, 2).float()), rtol=1e-4, atol=1e-4)
    text = encoders.TextEncoder(9, 16, 2)
    state = {wrapper + name.replace("convolutions.", "convnet."): value for name, value in text.state_dict().items()}
    assert f"{wrapper}convnet.0.weight" in state
    torch.save(state, tmp_path / "encoder_txt.pt")
    assert same(load_weights(encoders.TextEncoder(9, 16, 2), tmp_path / "encoder_txt.pt").state_dict(), text.state_dict())


@pytest.mark.parametrize(
    ("network", "module", "name"),
    [
        ("g_x", MixingNetwork(3, 12), "22.weight"),
        ("f_t", encoders.MLPEncoder(3, 2), "12.bias"),
        ("encoder_img", encoders.ImageEncoder(2, (0, 0, 0), (1, 1, 1), 5), "module.0.layer4.1.bn2.running_var"),
        ("encoder_img", encoders.ImageEncoder(2, (0, 0, 0), (1, 1, 1), 5), "module.2.bias"),
        ("encoder_txt", encoders.TextEncoder(9, 16, 2), "module.convnet.4.running_mean"),
        ("encoder_txt", encoders.TextEncoder(9, 16, 2), "module.embedding.weight"),
    ],
)
def test_there_and_back_every_weight_has_its_bits_and_its_name(tmp_path, network, module, name):
    state = module.state_dict()
    theirs = official_names(network, state)
    assert name in theirs
    torch.save(theirs, tmp_path / f"{network}.pt")
    assert same(read_weights(tmp_path / f"{network}.pt"), state)


# --------------------------------------------------------------------------------------------------------------
# numeric


@pytest.fixture
def theirs(run, tmp_path):
    """A directory as their code leaves it, its weights those of a model that was trained here, `m`."""
    code, _, err = run("--seed 1")
    assert code == 0, err
    states = {}
    for name in ("g_x", "g_t", "f_x", "f_t"):
        own = torch.load(tmp_path / f"models/m/{name}.pt", weights_only=True)
        states[name] = own
        if name in ("g_x", "g_t"):
            network = plain_mixing(len(own["layers.0.weight"]))
            network.load_state_dict(dict(zip(network.state_dict(), own.values(), strict=True)))
            states[name] = network.state_dict()
    return written(tmp_path / "models/theirs", states, NUMERIC)


def test_their_numeric_model_is_evaluated_as_ours(run, theirs, tmp_path):
    expected = pd.read_csv(tmp_path / "models/m/results.csv")
    for seed, name in ((2, "results.csv"), (3, "results_seed2.csv"), (2, "results.csv")):  # more than once
        code, _, err = run(f"--evaluate --seed {seed}", "theirs", base="--no-cuda")
        assert code == 0, err
        pd.testing.assert_frame_equal(pd.read_csv(theirs / name), expected)
    code, _, err = run("--evaluate --seed 1", "theirs", base="--no-cuda")
    assert code == 2 and "is the training seed" in err
    code, out, _ = run("--resume", "theirs", base="--no-cuda")
    assert code == 0 and "finished already" in out


def test_their_numeric_model_has_its_downstream_tasks(theirs, tmp_path, predict):  # noqa: F811
    for name in ("m", "theirs", "theirs"):
        code, _, err = predict([tmp_path / "models" / name])
        assert code == 0, err
    first, second = (pd.read_csv(tmp_path / "models" / name / "results_predict.csv") for name in ("m", "theirs"))
    pd.testing.assert_frame_equal(first, second)


def test_their_dependent_latents_are_refused_in_one_line(run, theirs, predict):  # noqa: F811
    (theirs / "args.json").write_text(json.dumps(NUMERIC | {"causal_dependence": True}))
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}
    for code, _, err in (run("--evaluate --seed 2", "theirs", base="--no-cuda"), predict([theirs])):
        assert code == 2 and err.count("\n") == 1 and "its seed draws other covariances there" in err
    assert before == {path.name: path.read_bytes() for path in theirs.iterdir()}


def test_their_args_without_a_flag_of_the_setting_is_named(run, theirs):
    args = {name: value for name, value in NUMERIC.items() if name != "theta_value"}
    (theirs / "args.json").write_text(json.dumps(args))
    code, _, err = run("--evaluate --seed 2", "theirs", base="--no-cuda")
    assert code == 2 and "has no 'theta_value'" in err


def test_an_exported_model_is_theirs_and_comes_back_with_its_bits(run, tmp_path):
    assert run("--seed 1")[0] == 0
    model, out = tmp_path / "models/m", tmp_path / "out/m"
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    code, said, err = run(f"--export-official {out}", base="--no-cuda")
    assert code == 0 and str(out) in said, err
    assert before == {path.name: path.read_bytes() for path in model.iterdir()}
    args = json.loads((out / "args.json").read_text())
    assert args == {name: args[name] for name in NUMERIC if name in args}, "no flag that only we have"
    assert args["theta_value"] == 3 and args["seed"] == 1 and args["encoding_size"] == 2 and args["lr"] == 1e-4
    network = plain_mixing(4)
    network.load_state_dict(torch.load(out / "g_x.pt", weights_only=True))
    for name in ("g_x", "g_t", "f_x", "f_t"):
        assert same(read_weights(out / f"{name}.pt"), torch.load(model / f"{name}.pt", weights_only=True))
    assert run("--evaluate --seed 2", "m", base="--no-cuda", model_dir=out.parent)[0] == 0
    assert (out / "results.csv").read_bytes() == before["results.csv"]
    code, _, err = run(f"--export-official {out}", base="--no-cuda")
    assert code == 2 and "exists already" in err


@pytest.mark.parametrize(
    "flags", ["--causal-dependence", "--protocol paper", "--omission-prob 0.3", "--latents uniform", "--hidden-sizes 7,5"]
)
def test_what_their_code_could_not_evaluate_is_not_exported(run, tmp_path, flags):
    assert run(f"--seed 1 {flags}")[0] == 0
    code, _, err = run(f"--export-official {tmp_path / 'out'}", base="--no-cuda")
    assert code == 2 and err.count("\n") == 1 and "could not evaluate this model" in err
    assert not (tmp_path / "out").exists()
    code, _, err = run(f"--export-official {tmp_path / 'out'}", "unknown", base="--no-cuda")
    assert code == 2 and "holds no finished model" in err


# --------------------------------------------------------------------------------------------------------------
# images with captions


@pytest.mark.parametrize("size", [0, 3])
def test_their_model_of_images_is_evaluated_more_than_once(tmp_path, mpi3d, capsys, monkeypatch, size):
    """Where their flag says 0, the encodings have a dimension for each unbiased semantics: two, where ours have three."""
    monkeypatch.setattr(mlp_probes, "MAX_EPOCHS", 8)
    monkeypatch.setattr(main_mpi3dreal, "plot_factor_scores", lambda tables, path, *_: path.write_bytes(b"drawn"))
    pairs, _ = main_mpi3dreal.load_mpi3d(mpi3d, "selection", 1)
    image = nn.Sequential(resnet18(num_classes=100), nn.LeakyReLU(), nn.Linear(100, size or 2))
    text = encoders.TextEncoder(len(pairs.vocabulary), pairs.length, size or 2)
    states = {
        "encoder_img": {f"module.{name}": value for name, value in image.state_dict().items()},
        "encoder_txt": {f"module.{n}".replace("convolutions", "convnet"): v for n, v in text.state_dict().items()},
    }
    args = {**IMAGES, "encoding_size": size, "datapath": str(mpi3d)}
    directory = written(tmp_path / "models/theirs", states, args)
    flags = ["--model-dir", tmp_path / "models", "--model-id", "theirs", "--no-cuda", "--evaluate"]
    results = []
    for seed in (5, 6):
        code, out, err = outcome(capsys, main_mpi3dreal.main, *flags, "--seed", seed)
        assert code == 0 and f"→ R^{size or 2}, " in out, err
        results.append(pd.read_csv(directory / "results.csv"))
    assert np.array_equal(results[0].mcc_logreg, results[1].mcc_logreg)
    code, _, err = outcome(capsys, main_mpi3dreal.main, *flags[:5], "--export-official", tmp_path / "out")
    assert code == 0, err
    for name, state in states.items():
        assert same(torch.load(tmp_path / "out" / f"{name}.pt", weights_only=True), state)
    assert json.loads((tmp_path / "out/args.json").read_text())["encoding_size"] == (size or 2)


def test_an_exported_model_has_all_of_their_flags(run, tmp_path):
    assert run("--seed 1")[0] == 0 and run(f"--export-official {tmp_path / 'out'}", base="--no-cuda")[0] == 0
    own = {"evaluate", "load_args", "log_steps", "model_dir", "model_id", "no_cuda"}  # of a call, not of a model
    args = json.loads((tmp_path / "out/args.json").read_text())
    assert NUMERIC.keys() - args.keys() == own
