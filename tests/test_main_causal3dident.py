"""main_causal3dident.py as a user runs it: the files it writes, killing and resuming, and one line for whatever is wrong."""

import functools
import hashlib
import itertools
import json
import random
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

import datasets
import encoders
import image_text
import main_causal3dident
import probes
from image_text import ImageTextExperiment
from main_causal3dident import Causal3dIdentExperiment
from reading import images as image_reading
from tests.scripts import (
    IMAGE_TEXT_FILES,
    Killed,
    SmallImageEncoder,
    contents,
    image_encoders_made,
    replace,
    small_image_text_run,
)

FLAGS = "--no-cuda --bias-id 3 --batch-size 12 --train-steps 12 --log-steps 5 --checkpoint-steps 4 --lr 0.01"
COLUMNS = ["Unnamed: 0", "ix", "modality", "factor_name", "factor_type", "r2_linreg", "r2_krreg", "mcc_logreg", "mcc_mlp"]
DISCRETE = ["object_shape", "object_xpos", "object_ypos"]
IMAGE = [*DISCRETE, "object_alpharot", "object_betarot", "object_gammarot", "spotlight_pos", "object_color",
         "spotlight_color", "background_color"]  # fmt: skip
TEXT = [*DISCRETE, "spotlight_pos", "text_phrasing"]  # of selections 3


SmallImageEncoder = functools.partial(SmallImageEncoder, side=3)  # images of 24 × 24 pixels


@pytest.fixture
def run(tmp_path, causal3dident, capsys, monkeypatch):
    """run(flags) → (exit code, stdout, stderr) of the script with a small encoder, short probes and no drawing."""
    return small_image_text_run(main_causal3dident, SmallImageEncoder, causal3dident, FLAGS, tmp_path, capsys, monkeypatch)


def test_a_run_writes_the_specified_files(run, tmp_path):
    code, out, err = run("--seed 1")
    assert code == 0, err
    directory = tmp_path / "models/m"
    assert sorted(contents(directory)) == IMAGE_TEXT_FILES
    results = pd.read_csv(directory / "results.csv")
    assert list(results.columns) == COLUMNS
    assert results.factor_name.tolist() == IMAGE + TEXT and results.ix.tolist() == [0, 1, 2, *range(4, 11), *range(5)]
    assert results[COLUMNS[0]].tolist() == [*range(15)]
    assert results.modality.tolist() == ["image"] * 10 + ["text"] * 5
    discrete = results.factor_name.isin([*DISCRETE, "text_phrasing"])
    assert (results.factor_type == discrete.map({True: "discrete", False: "continuous"})).all()
    assert (results[["r2_linreg", "r2_krreg"]].notna().all(axis=1) == ~discrete).all()
    assert (results[["mcc_logreg", "mcc_mlp"]].notna().all(axis=1) == discrete).all()
    assert results[["r2_linreg", "r2_krreg"]][discrete].isna().all(axis=None)
    log = pd.read_csv(directory / "train_log.csv")
    assert log.step.tolist() == [5, 10, 12]
    assert {"image_object_alpharot", "text_text_phrasing", "text_spotlight_pos"} <= set(log.columns)
    for words in (
        "I_θ = {object_shape, object_xpos, object_ypos, spotlight_pos}; captions leave out {object_alpharot,",
        "160 pairs to train, 40 to evaluate; images of 24 × 24",
        "text CNN → R^5",
        "object_shape * ",
        "12 steps of 12 pairs",
        "the rotations R² of at most",
    ):
        assert words in out
    stored = json.loads((directory / "args.json").read_text())
    assert stored["finished"] and stored["seed"] == 1 and stored["eval_seed"] == 2 and stored["bias_type"] == "selections"
    assert stored["encoding_size"] == 0 and stored["dimensions"] == 5


def test_data_of_the_other_protocol_are_named(run, tmp_path, causal3dident, monkeypatch):
    monkeypatch.setitem(image_text.PROBE_STEPS, "paper", 8)
    digest = hashlib.sha256((causal3dident / "latents_image.csv").read_bytes()).hexdigest()
    (causal3dident / "images.json").write_text(json.dumps({"latents": digest, "protocol": "code"}))
    said = "; images made with --protocol code\n"
    for protocol in ("paper", "code"):
        code, out, _ = run(f"--seed 1 --train-steps 1 --protocol {protocol} --overwrite")
        assert code == 0 and (said in out) == (protocol == "paper")
        assert json.loads((tmp_path / "models/m/args.json").read_text())["made_by"] == {"images": "code"}
    flags = "--seed 1 --train-steps 1 --protocol paper --overwrite --bias-type perturbations --bias-id 0"
    assert "; captions made with --protocol code; images made with --protocol code\n" in run(flags)[1]


def test_results_are_the_probes_fitted_on_one_split_and_tested_on_the_other(run, tmp_path, causal3dident):
    """Linear scores by scikit-learn, of encodings that are computed from the files of the run."""
    from sklearn.linear_model import LinearRegression, LogisticRegression
    from sklearn.metrics import matthews_corrcoef
    from sklearn.preprocessing import StandardScaler

    assert run("--seed 1 --train-steps 30 --log-steps 30")[0] == 0
    results = pd.read_csv(tmp_path / "models/m/results.csv").set_index(["modality", "factor_name"])
    pairs, _ = datasets.load_causal3dident(causal3dident, "selections", 3)
    tables = {"image": "latents_image.csv", "text": "latents_text_selections_3.csv"}
    networks = {
        "image": ("encoder_img.pt", SmallImageEncoder(5, 0, 1), pairs.images_of),
        "text": ("encoder_txt.pt", encoders.TextEncoder(len(pairs.vocabulary), pairs.length, 5), pairs.tokens_of),
    }
    for modality, (file, encoder, inputs) in networks.items():
        encoder.load_state_dict(torch.load(tmp_path / "models/m" / file, weights_only=True))
        # in training mode, batches of 12, of which the second begins within the first
        parts = [(split, torch.arange(start, start + 12)) for split in ("fit", "test") for start in (0, 8)]
        with torch.no_grad():
            h = [encoder(inputs(split, rows)).double().numpy() for split, rows in parts]
        fit, test = np.concatenate((h[0], h[1][4:])), np.concatenate((h[2], h[3][4:]))
        scaler = StandardScaler().fit(fit)
        fit, test = scaler.transform(fit), scaler.transform(test)
        factors = pd.read_csv(causal3dident / tables[modality])
        for name in IMAGE if modality == "image" else TEXT:
            fit_values, test_values = factors[name][160:180], factors[name][180:]
            row = results.loc[modality, name]
            if row.factor_type == "continuous":
                expected = LinearRegression().fit(fit, fit_values).score(test, test_values)
                assert row.r2_linreg == pytest.approx(expected, abs=1e-4), (modality, name)
            else:
                model = LogisticRegression(max_iter=2000, tol=1e-6).fit(fit, fit_values)
                expected = matthews_corrcoef(test_values, model.predict(test))
                assert row.mcc_logreg == pytest.approx(expected, abs=0.1), (modality, name)
    assert results.mcc_logreg["image"].nunique() > 2


def test_the_spotlight_s_colour_has_the_name_that_the_runs_gave_it(run, tmp_path):
    code, out, err = run("--seed 1 --train-steps 1 --bias-id 5")
    assert code == 0 and "\nspotlight_color_index *" in out, err
    results = pd.read_csv(tmp_path / "models/m/results.csv", index_col=0)
    assert results.factor_name[results.modality == "text"].tolist() == [
        *TEXT[:-1], "object_color_index", "splotlight_color_index", "text_phrasing"]  # fmt: skip
    assert results.ix[results.modality == "text"].tolist() == [*range(7)]
    assert "spotlight_color" in results.factor_name.tolist()


def test_each_factor_has_the_nonlinear_score_of_its_own_encoding_and_kind(run, tmp_path, monkeypatch):
    seen = []

    def marked(kind):
        def probe(encodings, fit_targets, test_targets, generator, steps):
            seen.append(steps)
            assert all(set(fit_targets) <= set(test_targets) for _ in encodings)
            return {(modality, name): (kind + len(modality)) / 10 + len(name) / 1000
                    for modality in encodings for name in fit_targets}  # fmt: skip

        return probe

    monkeypatch.setattr(probes, "mlp_r2", marked(1))
    monkeypatch.setattr(probes, "mlp_mcc", marked(-9))
    assert run("--seed 1 --train-steps 1 --protocol paper")[0] == 0
    assert seen == [10_000] * 4
    for row in pd.read_csv(tmp_path / "models/m/results.csv").itertuples():
        kind, value = (-9, row.mcc_mlp) if row.factor_type == "discrete" else (1, row.r2_krreg)
        assert value == pytest.approx((kind + len(row.modality)) / 10 + len(row.factor_name) / 1000)


def test_the_defaults_are_the_specified_ones():
    args, _ = Causal3dIdentExperiment.parse_flags([])
    defaults = {
        **{"datapath": "data/Causal3DIDent", "model_dir": "models", "model_id": None, "bias_type": "selections"},
        **{"bias_id": 6, "encoding_size": 0, "hidden_size": 100, "tau": 1.0, "lr": 1e-5, "batch_size": 256},
        **{"train_steps": 100001, "log_steps": 1000, "checkpoint_steps": 10000, "evaluate": False, "seed": None},
        **{"workers": 0, "no_cuda": False, "save_all_checkpoints": False, "load_args": False, "protocol": "code"},
        **{"loss": "infonce", "save_encodings": False},
        **{"init": "default", "lr_schedule": "constant", "precision": "fp32", "preconditioner": "none"},
        **{"layer_lr": "uniform", "text_lr_factor": 1.0, "first_tau": 0, "norm_penalty": 0, "final_batch_size": 0},
        **{"recipe": "paper", "whitening_pairs": 0, "optimiser": "adam", "spare_dimensions": 0},
        **{"first_batch_size": 0},
    }
    assert {name: getattr(args, name) for name in defaults} == defaults


def test_the_size_of_the_encodings():
    sizes = {}
    for bias_type, bias_id in itertools.product(("selections", "perturbations"), range(7)):
        unbiased = datasets.causal_bias(bias_type, bias_id).unbiased
        sizes.setdefault(bias_type, []).append(Causal3dIdentExperiment.default_encoding_size(len(unbiased)))
    assert sizes == {"selections": [3, 3, 4, 5, 5, 6, 7], "perturbations": [7, 6, 5, 5, 4, 3, 3]}


def test_pixels_are_normalised_as_specified(run, monkeypatch):
    made = image_encoders_made(run, SmallImageEncoder, monkeypatch)
    assert made == [(5, (0.4327, 0.2689, 0.2839), (0.1201, 0.1457, 0.1082), 20)]


# --------------------------------------------------------------------------------------------------------------
# killed and resumed, evaluated again


def test_a_run_killed_at_random_steps_ends_as_one_that_never_was(run, tmp_path, monkeypatch):
    """13 batches make an epoch, so the kills and the checkpoints fall into several of them."""
    monkeypatch.setattr(ImageTextExperiment, "monitor", lambda _: ({}, ""))
    flags = "--seed 3 --train-steps 20 --recipe fast --bias-id 1"
    assert run(flags, "whole")[0] == 0
    rng, real = random.Random(flags), ImageTextExperiment.loss
    for _ in range(2):
        count, last = itertools.count(), rng.randrange(6, 13)

        def dying(*arguments, count=count, last=last):
            if next(count) == last:
                raise Killed
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(ImageTextExperiment, "loss", dying)
            with pytest.raises(Killed):
                run(f"{flags} --resume", "killed")
    code, out, err = run("--resume --log-steps 5", "killed", base="--no-cuda")
    assert code == 0 and "resumed from step" in out, err
    whole, killed = (contents(tmp_path / "models" / model) for model in ("whole", "killed"))
    for name in ("encoder_img.pt", "encoder_txt.pt", "results.csv"):
        assert whole[name] == killed[name], name


def test_evaluation_again_draws_other_probes_and_keeps_the_first(run, tmp_path):
    assert run("--seed 1")[0] == 0
    before = contents(tmp_path / "models/m")
    assert run("--evaluate --seed 5", base="--no-cuda")[0] == 0
    after = contents(tmp_path / "models/m")
    assert after["results_seed2.csv"] == before["results.csv"] != after["results.csv"]
    first, again = (pd.read_csv(tmp_path / f"models/m/results{suffix}.csv") for suffix in ("_seed2", ""))
    assert first.r2_linreg.equals(again.r2_linreg) and first.mcc_logreg.equals(again.mcc_logreg)
    assert not first.r2_krreg.equals(again.r2_krreg)


def test_models_that_know_the_training_words_alone_go_on_with_them(run, tmp_path, causal3dident, monkeypatch):
    """As earlier versions trained them: evaluated again, and resumed, the text encoder has their words."""
    path = causal3dident / "text/selections_3/text_raw.txt"
    captions = path.read_text().splitlines()
    replace(path, "\n".join([*captions[:-1], captions[-1].replace("A ", "One ")]) + "\n")
    real = datasets.load_captions
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_captions", lambda *files, heard: real(*files))
        assert run("--seed 1", "whole")[0] == 0 and run("--seed 1", "stopped")[0] == 0
    words = len(torch.load(tmp_path / "models/whole/encoder_txt.pt", weights_only=True)["embedding.weight"].T)
    assert len(datasets.load_causal3dident(causal3dident, "selections", 3)[0].vocabulary) > words
    before = contents(tmp_path / "models/whole")
    args = json.loads(before["args.json"])
    (tmp_path / "models/stopped/args.json").write_text(json.dumps({**args, "finished": False, "model_id": "stopped"}))
    for flags, model in (("--evaluate --seed 2", "whole"), ("--resume", "stopped"), ("--evaluate --seed 2", "stopped")):
        code, _, err = run(flags, model, base="--no-cuda")
        assert code == 0, err
        after = contents(tmp_path / "models" / model)
        assert after["results.csv"] == before["results.csv"] and after["encoder_txt.pt"] == before["encoder_txt.pt"]
        assert json.loads(after["args.json"])["data"] == args["data"]
    replace(path, "\n".join([captions[0].replace("A ", "One "), *captions[1:]]) + "\n")
    code, _, err = run("--evaluate --seed 2", "whole", base="--no-cuda")
    assert code == 2 and "does not hold the images, captions and order" in err


def test_what_is_misstated_has_no_mark_and_each_score_its_name(run):
    code, out, err = run("--seed 1 --train-steps 1 --bias-type perturbations --bias-id 4")
    lines = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert code == 0, err
    for name, marked, score in (("object_shape", True, "MCC"), ("object_ypos", True, "MCC"), ("spotlight_pos", False, "R²"),
                                ("object_color", False, "R²"), ("object_color_index", False, "MCC")):  # fmt: skip
        assert (f"{name} *" in lines[name]) == marked and score in lines[name].split(), lines[name]


# --------------------------------------------------------------------------------------------------------------
# bad input


def cut_image(folder):
    path = folder / "images/120.png"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:700])


@pytest.mark.parametrize(
    "flags, damage, words",
    [
        ("--bias-id 7", None, "--bias-id 7 is out of range: settings are 0 … 6"),
        ("--bias-id -1", None, "--bias-id -1 is out of range"),
        ("--bias-id x", None, "--bias-id"),
        ("--bias-type selection", None, "--bias-type"),
        ("--batch-size 161", None, "a batch of 161 pairs, and"),
        ("--final-batch-size 200", None, "a batch of 200 pairs"),
        ("--datapath nowhere", None, "nowhere is no folder"),
        ("", shutil.rmtree, "is no folder, expected that of Causal3DIdent"),
        ("", cut_image, "images/120.png is damaged"),
        ("", lambda folder: (folder / "latents_text_selections_3.csv").unlink(), "latents_text_selections_3.csv is missing"),
        ("--evaluate", None, "args.json is missing"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_changes_nothing(run, tmp_path, causal3dident, flags, damage, words):
    if damage:
        damage(causal3dident)
    code, out, err = run(flags)
    assert code == 2, (out, err)
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: ") and words in err, err
    assert not (tmp_path / "models").exists()


def test_a_folder_without_write_permission_is_one_line(run, tmp_path, causal3dident, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", str(causal3dident))

    monkeypatch.setattr(image_reading, "replaced", refused)
    code, _, err = run()
    assert code == 2 and err.splitlines() == [f"error: {causal3dident} cannot be written, and the images are decoded into a "
                                              "file there, once; copy the folder to where you can write"]  # fmt: skip


FOUND = "is found, and what is the image's own is not: "


@pytest.mark.parametrize(
    ("shape", "x", "y", "rotation", "words"),
    [
        (0.9, 0.95, 0.85, 0.05, f"What is unbiased {FOUND}{{object_shape, object_xpos, object_ypos}} has nonlinear MCC "
         "of at least 0.850 in the"),
        (0.3, 0.95, 0.85, -1, f"Part of what is unbiased {FOUND}{{object_xpos, object_ypos}} has nonlinear MCC of at least "
         "0.850 in the image encoding, the rotations R² of at most 0.000; not (yet) {object_shape}, with at most 0.300."),
        (0.3, 0.5, 0.7, 0, "Not (yet) the pattern of the theory: {object_shape, object_xpos, object_ypos} has nonlinear MCC of "
         "at least 0.300"),
        (0.9, 0.9, 0.9, 0.2, "Not (yet) the pattern of the theory"),
    ],
)  # fmt: skip
def test_the_verdict_tells_what_is_found_from_what_is_not(shape, x, y, rotation, words):
    scores = pd.Series([shape, x, y, 0, rotation, 0, 0.9, 0.9, 0.9, 0.9])
    discrete = pd.Series([name in DISCRETE for name in IMAGE])
    types = discrete.map({True: "discrete", False: "continuous"})
    image = pd.DataFrame({"modality": "image", "factor_name": IMAGE, "factor_type": types,
                          "mcc_mlp": scores.where(discrete), "r2_krreg": scores.mask(discrete)})  # fmt: skip
    text = image.assign(modality="text", mcc_mlp=0.99, r2_krreg=0.99)
    sentence = main_causal3dident.verdict(pd.concat([text, image]), datasets.causal_bias("perturbations", 4))
    assert sentence.startswith(words)


def test_the_picture_has_both_encodings_with_their_own_factors(tmp_path, monkeypatch):
    rows = [("image", name, None, None, 0.5, 0.9) if name in DISCRETE else ("image", name, 0.1, 0.2, None, None)
            for name in IMAGE]  # fmt: skip
    rows += [("text", name, 0.3, 0.4, None, None) if name == "spotlight_pos" else ("text", name, None, None, 0.6, 0.7)
             for name in TEXT]  # fmt: skip
    results = pd.DataFrame(rows, columns=["modality", "factor_name", *COLUMNS[5:]])
    tables = main_causal3dident.score_tables(results)
    assert list(tables["image encoding"]) == IMAGE and list(tables["text encoding"]) == TEXT
    assert tables["image encoding"].loc["nonlinear", "object_xpos"] == 0.9
    assert tables["image encoding"].loc["linear", "object_color"] == 0.1
    assert tables["text encoding"]["spotlight_pos"].tolist() == [0.3, 0.4]
    main_causal3dident.plot_factor_scores(tables, tmp_path / "results.png", "title", {"object_xpos"})
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_the_script_explains_itself(capsys):
    with pytest.raises(SystemExit):
        Causal3dIdentExperiment.parse_flags(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("its setting k is --bias-id 7 − k", "0 = 3, 3, 4, 5, 5, 6, 7 for 1 … 7 unbiased", "paper 100001, fast"):
        assert words in shown


def test_encodings_are_kept_with_the_factors_of_either_modality(run, tmp_path):
    assert run("--seed 1 --save-encodings")[0] == 0
    with np.load(tmp_path / "models/m/encodings.npz", allow_pickle=False) as file:
        kept = dict(file)
    results = pd.read_csv(tmp_path / "models/m/results.csv")
    names = {f"{row.modality}_{row.factor_name}" for row in results.itertuples()}
    assert {name for name in kept if name.split("_")[0] in ("image", "text")} == names
    assert len({len(values) for name, values in kept.items() if name != "seed"}) == 1


def test_numbers_and_classes_have_a_floor_and_a_ceiling_under_their_own_names(run, tmp_path, monkeypatch):
    """Where all seven factors are told, the spotlight's colour has the runs' spelling in results.csv alone."""
    told = "--supervised --bias-id 6 --encoding-size 4 --seed 3 --train-steps 6"
    assert run(told, model="told")[0] == 0
    drawn = {}
    monkeypatch.setattr(main_causal3dident, "plot_factor_scores", lambda tables, path, title, unbiased, references: (
        drawn.update(tables=tables, references=references), path.write_bytes(b"drawn")))  # fmt: skip
    code, _, err = run(f"--bias-id 6 --seed 1 --train-steps 6 --floor --ceiling {tmp_path / 'models/told'}")
    assert code == 0, err
    table = pd.read_csv(tmp_path / "models/m/references.csv")
    expected = pd.read_csv(tmp_path / "models/told/results.csv").drop(columns=COLUMNS[0])
    ceiling = table[table.reference == "ceiling"].reset_index(drop=True)[COLUMNS[1:]]
    pd.testing.assert_frame_equal(ceiling, expected)
    assert set(drawn["references"]) == {"floor", "ceiling"}
    for references in drawn["references"].values():
        for title, scores in drawn["tables"].items():
            assert references[title].reindex_like(scores).notna().all(axis=None), title
    assert "spotlight_color_index" in drawn["references"]["ceiling"]["text encoding"]
