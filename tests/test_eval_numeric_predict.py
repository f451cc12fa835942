"""The downstream tasks against their definitions, the probes against plain autograd, and the script as a user runs it."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.cluster import KMeans

import eval_numeric_predict as downstream
import main_numeric
import mlp_probes
from benchmarks.numeric_downstream import initial_networks, plain_prediction, plain_scores, synthetic_samples, train_plain
from latent_spaces import MisalignedLatents, seeded_generator
from main_numeric import NumericExperiment
from running import pictures
from running.command_line import run_script
from running.directory import trained_args
from tests.scripts import contents, forget_digests

ROOT = Path(main_numeric.__file__).parent
RESULTS = ["downstream.png", "results_classify.csv", "results_predict.csv"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------------
# tasks


@pytest.mark.parametrize("protocol, factor", [("code", 0.6), ("paper", 0.4)])
@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_f_is_its_sums_over_pairs_and_triples(protocol, factor, size):
    v = 3 * normal(20, size)

    def f(row):
        pairs = sum(a * b for a, b in itertools.combinations(row, 2))
        triples = sum(a * b * c for a, b, c in itertools.combinations(row, 3))
        alone = sum(a**2 + 0.3 * a**3 + 0.7 * (math.sin(a) + math.cos(a)) + 0.4 * math.log(1 + abs(a)) for a in row)
        return alone + 0.5 * pairs + 0.2 * triples + factor * sum(math.exp(-abs(a)) for a in row)

    expected = torch.tensor([f(row) for row in v.tolist()], dtype=torch.float64)
    assert torch.allclose(downstream.downstream_function(v, protocol), expected, rtol=1e-10, atol=1e-10)


def test_the_tasks_are_prefixes():
    assert downstream.prefix_sizes(10) == (3, 5, 7, 9) and list(downstream.shifted_semantics(10)) == [8, 9]
    assert downstream.prefix_sizes(4) == (1, 2, 3, 4) and downstream.prefix_sizes(20) == (6, 10, 14, 18)
    for n in range(1, 30):
        sizes, moved = downstream.prefix_sizes(n), downstream.shifted_semantics(n)
        assert sizes[0] >= 1 and sorted(sizes) == list(sizes) and sizes[3] <= n
        assert len(moved) <= 2 and all(sizes[1] <= i < n for i in moved), "the shift leaves the classes alone"
    s = normal(50, 10)
    expected = [downstream.downstream_function(s[:, :size], "code") for size in (3, 5, 7, 9)]
    assert torch.equal(downstream.regression_targets(s, "code"), torch.stack(expected, dim=1))


def inertia(y, labels):
    return sum(((y[labels == label] - y[labels == label].mean()) ** 2).sum().item() for label in labels.unique())


@pytest.mark.parametrize("seed", range(3))
def test_two_means_are_those_of_scikit_learn(seed):
    y = downstream.regression_targets(normal(4096, 10, seed=seed), "code")[:, 1]
    labels = downstream.two_means(y)
    for tolerance in (1e-4, 0):
        kmeans = KMeans(2, n_init=10, tol=tolerance, random_state=seed).fit(y.numpy()[:, None])
        assert inertia(y, labels) <= kmeans.inertia_ * (1 + 1e-12)
        higher = torch.from_numpy(kmeans.labels_ == kmeans.cluster_centers_[:, 0].argmax())
        # scikit-learn's default tolerance stops a few samples early
        assert (higher != labels).sum() <= (8 if tolerance else 0)


def test_two_means_of_few_values_are_the_best_of_all_splits():
    for seed in range(50):
        y = (normal(7, seed=seed) * 2).round()  # with ties
        labels = downstream.two_means(y)
        best = min(inertia(y, y > threshold) for threshold in y.unique())
        assert inertia(y, labels) == pytest.approx(best, abs=1e-5)
        assert not labels.all() and (labels.any() or len(y.unique()) == 1)
        if labels.any():
            assert y[labels].min() > y[~labels].max()
    assert not downstream.two_means(torch.full((5,), 2.5)).any()
    assert downstream.two_means(1e6 + torch.tensor([0.0, 1.0, 10.0])).tolist() == [False, False, True]


def test_classes_of_the_code_are_two_means_of_each_batch(monkeypatch):
    monkeypatch.setattr(main_numeric, "EVAL_BATCH", 100)
    y = torch.cat((normal(100, seed=1), 50 + normal(100, seed=2))).double()
    labels = downstream.class_labels(y, y[:3], "code")
    assert torch.equal(labels, torch.cat((downstream.two_means(y[:100]), downstream.two_means(y[100:]))))
    assert 20 < labels[:100].sum() < 80 and 20 < labels[100:].sum() < 80


def test_classes_of_the_paper_are_split_at_the_median_of_the_fitting_set():
    fit, test = normal(1000, seed=1).double(), 1 + normal(1000, seed=2).double()
    assert downstream.class_labels(fit, fit, "paper").sum() == 500
    expected = test > np.sort(fit.numpy())[499]
    assert torch.equal(downstream.class_labels(test, fit, "paper"), expected) and expected.sum() > 700


def test_the_shift():
    s = 2 * normal(40_000, 10)
    before = s.clone()
    squared = 2 * s[:, 8:].sign() * s[:, 8:] ** 2
    paper = downstream.shift(s, "paper", None)
    assert torch.equal(s, before) and torch.equal(paper[:, :8], s[:, :8]) and torch.equal(paper[:, 8:], squared)
    code = downstream.shift(s, "code", torch.Generator().manual_seed(1))
    assert torch.equal(code[:, :8], s[:, :8])
    jumped = code[:, 8:] != squared
    assert torch.equal(code[:, 8:][jumped], 10 * s[:, 8:].sign()[jumped])
    assert (jumped.double().mean(dim=0) - 0.1).abs().max() < 0.01
    assert (jumped.all(dim=1).double().mean() - 0.01).abs() < 0.003, "each dimension has a coin of its own"


# --------------------------------------------------------------------------------------------------------------
# probes


@pytest.mark.parametrize("size, samples, chunk", [(1, 300, 1024), (4, 300, 128), (10, 301, 100)])
def test_training_together_takes_the_steps_of_plain_adam(monkeypatch, size, samples, chunk):
    monkeypatch.setattr(mlp_probes, "CHUNK", chunk)
    h = normal(samples, size)
    targets = torch.cat((normal(samples, 4, seed=1) + h.sum(dim=1, keepdim=True).square(), (h[:, :1] > 0.3).float()), dim=1)
    together = mlp_probes.FullBatchProbes(size, 4, 1, torch.Generator().manual_seed(2), "cpu")
    together.train(h, targets, 100)
    for i, initial in enumerate(initial_networks(size, torch.Generator().manual_seed(2))):
        plain = train_plain(initial, h.double(), targets[:, i], 100)
        expected = plain_prediction(plain, h.double())
        start = plain_prediction(train_plain(initial, h, targets[:, i], 0), h)
        moved = (expected - start).abs().max()
        assert moved > 0.1 and (together.predict(h)[:, i] - expected).abs().max() < 1e-3 * moved


def test_weights_are_xavier_uniform_and_biases_zero():
    hidden, output = mlp_probes.initial_network(10, 2, torch.Generator().manual_seed(0))
    assert hidden.shape == (100, 10) and output.shape == (2, 100)
    for weight, bound in ((hidden, math.sqrt(6 / 110)), (output, math.sqrt(6 / 102))):
        assert 0.95 * bound < weight.abs().max() <= bound and weight.var() == pytest.approx(bound**2 / 3, rel=0.2)
    probes = mlp_probes.FullBatchProbes(10, 0, 1, torch.Generator().manual_seed(0), "cpu")
    assert torch.equal(probes.hidden[:10, 0], hidden.T) and torch.equal(probes.output[0], (output[1] - output[0]) / 2)
    assert not probes.hidden[10].any() and not probes.bias.any()


def test_the_scores_are_those_of_networks_one_after_another(monkeypatch):
    monkeypatch.setattr(downstream, "STEPS", 300)
    samples = synthetic_samples(1000, 5, 0, "cpu")
    scores, plain = (
        function(*samples, "code", torch.Generator().manual_seed(1), *more)
        for function, more in ((downstream.score_tasks, ()), (plain_scores, (300,)))
    )
    for own, other in zip(scores, plain, strict=True):
        assert own.keys() == other.keys() and all(abs(own[task] - other[task]) < 0.01 for task in own)


@pytest.mark.parametrize("protocol", ["code", "paper"])
def test_semantics_score_near_one_and_noise_near_zero(monkeypatch, protocol):
    monkeypatch.setattr(downstream, "STEPS", 500)
    monkeypatch.setattr(mlp_probes, "LEARNING_RATE", 1e-2)
    # a whole batch: with fewer samples the 2-means of the sets differ, and so do their classes
    sets = [normal(4096, 4, seed=1 + seed) for seed in range(3)]
    sets[2] = downstream.shift(sets[2], protocol, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    regression, classification = downstream.score_tasks(*((s, s) for s in sets), protocol, generator)
    assert min(regression.values()) > 0.95 and classification["iid"] > 0.9
    # the probe of the two semantics behind the classes never saw values as large as the shifted ones of the others
    assert classification["ood"] < classification["iid"]
    monkeypatch.setattr(downstream, "STEPS", 50)
    monkeypatch.setattr(mlp_probes, "LEARNING_RATE", 1e-3)
    noise = [(normal(4096, 4, seed=10 + seed), s) for seed, s in enumerate(sets)]
    regression, classification = downstream.score_tasks(*noise, protocol, generator)
    assert max(regression.values()) < 0.05 and max(map(abs, classification.values())) < 0.1


def test_fast_probes_come_as_far_as_all_steps(monkeypatch):
    monkeypatch.setattr(downstream, "STEPS", 3000)
    samples = synthetic_samples(2048, 5, 0, "cpu")

    def scores(probes, *fast_steps):
        monkeypatch.setattr(downstream, "FAST_STEPS", fast_steps)
        return downstream.score_tasks(*samples, "code", torch.Generator().manual_seed(1), probes)

    exact, fast = scores("paper"), scores("fast", 12_000, 750)
    for own, other in zip(fast, exact, strict=True):
        assert own == pytest.approx(other, abs=0.05)
    as_short = scores("fast", 1_200, 75)
    assert as_short[0]["y4"] < exact[0]["y4"] - 0.1 and as_short == scores("fast", 1_200, 75)


def test_fast_probes_begin_with_the_weights_of_the_exact_ones(monkeypatch):
    for module, name, value in ((downstream, "STEPS", 3), (downstream, "FAST_STEPS", (3, 3)), (mlp_probes, "LEARNING_RATE", 0.0)):
        monkeypatch.setattr(module, name, value)
    samples = synthetic_samples(600, 5, 0, "cpu")
    exact, fast, other = (
        downstream.score_tasks(*samples, "code", torch.Generator().manual_seed(seed), probes)
        for seed, probes in ((1, "paper"), (1, "fast"), (2, "fast"))
    )
    assert fast[0] == pytest.approx(exact[0], abs=1e-4) and fast[1] == pytest.approx(exact[1], abs=0.02)
    assert all(abs(other[0][task] - exact[0][task]) > 1e-3 for task in exact[0])


def reference_network(size, outputs):
    """In float64, the network whose initial weights a probe of `size` dimensions takes from seed 0."""
    hidden, output = mlp_probes.initial_network(size, outputs, torch.Generator().manual_seed(0))
    network = torch.nn.Sequential(torch.nn.Linear(size, 100), torch.nn.ReLU(), torch.nn.Linear(100, outputs)).double()
    with torch.no_grad():
        for layer, weight in ((network[0], hidden), (network[2], output)):
            layer.weight.copy_(weight), layer.bias.zero_()
    return network


def test_longer_steps_are_those_of_torch_s_adam():
    """A learning rate of seven times the usual, a second moment that forgets seven times faster, and longer momentum."""
    h, target = normal(600, 3), normal(600, 1, seed=1)
    fast = mlp_probes.FullBatchProbes(3, 1, 0, torch.Generator().manual_seed(0), "cpu")
    fast.train(h, target, 40, rate=7.0)
    network = reference_network(3, 1)
    # (1 + β) / (1 − β) = 19 at β = 0.9 is 133 = 7 · 19 at 0.98507…
    optimiser = torch.optim.Adam(network.parameters(), lr=7e-3, betas=(132 / 134, 0.993))
    for _ in range(40):
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(network(h.double()), target.double()).backward()
        optimiser.step()
    assert torch.allclose(fast.predict(h).double(), network(h.double()).detach(), atol=1e-3)


def test_steps_in_parts_are_those_of_saga_and_adam():
    """The estimate written out: the gradients of all parts as they were last, the drawn one's change times their number."""
    h, target = normal(600, 3), normal(600, 1, seed=1)
    probe = mlp_probes.FullBatchProbes(3, 1, 0, torch.Generator().manual_seed(0), "cpu")
    probe.train_in_parts(h, target, 50, 0.5, torch.Generator().manual_seed(3))
    parts = torch.arange(len(h)).split(256)  # of 256, 256 and 88 samples

    def expected(corrected):
        network, rng, order = reference_network(3, 1), torch.Generator().manual_seed(3), []
        parameters = list(network.parameters())
        optimiser = torch.optim.Adam(parameters, lr=5e-4, betas=(0.9, 0.9995))

        def gradients(part):
            loss = torch.nn.functional.mse_loss(network(h[part].double()), target[part].double(), reduction="sum") / len(h)
            return torch.autograd.grad(loss, parameters)

        kept = [gradients(part) for part in parts]
        for _ in range(50):
            order = order or torch.randperm(3, generator=rng).tolist()
            drawn = order.pop()
            new = gradients(parts[drawn])
            for index, parameter in enumerate(parameters):
                change = new[index] - kept[drawn][index]
                parameter.grad = sum(old[index] for old in kept) + 3 * change if corrected else 3 * new[index]
            kept[drawn] = new
            optimiser.step()
        return network(h.double()).detach()

    found = probe.predict(h).double()
    assert torch.allclose(found, expected(corrected=True), atol=1e-4)
    assert (found - expected(corrected=False)).abs().max() > 1e-2  # minibatches


def test_one_part_of_all_samples_is_a_full_batch():
    h, target = normal(200, 3), normal(200, 2, seed=1)
    one, other = (mlp_probes.FullBatchProbes(3, 2, 0, torch.Generator().manual_seed(0), "cpu") for _ in range(2))
    one.train(h, target, 30)
    other.train_in_parts(h, target, 30, 1.0, torch.Generator())
    assert torch.allclose(one.predict(h), other.predict(h), atol=1e-4)


def test_a_training_that_diverges_is_an_error():
    probes = mlp_probes.FullBatchProbes(2, 1, 0, torch.Generator().manual_seed(0), "cpu")
    with pytest.raises(ValueError, match="diverged"):
        probes.train(normal(50, 2), torch.full((50, 1), 1e38), 30)


def test_the_picture_shows_the_scores(tmp_path):
    sizes = []
    for score in (0.1, 0.9):
        pictures.plot_downstream_scores({"y1": score, "y2": -3.0}, {"iid": score, "ood": 2.0}, tmp_path / "p.png", "title")
        pixels = pictures.plt.imread(tmp_path / "p.png")[..., :3]
        sizes.append((np.abs(pixels - [31 / 255, 119 / 255, 180 / 255]).max(axis=2) < 0.05).sum())
    assert sizes[1] > 1.5 * sizes[0] > 0


# --------------------------------------------------------------------------------------------------------------
# the script


@pytest.fixture
def predict(capsys, monkeypatch):
    """predict(directories, flags) → (exit code, stdout, stderr) of eval_numeric_predict.py with short fits, no drawing."""
    monkeypatch.setattr(downstream, "STEPS", 30)
    monkeypatch.setattr(downstream, "plot_downstream_scores", lambda *arguments: arguments[2].write_bytes(b"drawn"))

    def call(directories, flags="", base="--no-cuda --num-eval-batches 1"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_script(lambda: downstream.main(["--model-id", *map(str, directories), *base.split(), *flags.split()]))
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def model(run, tmp_path):
    """Directory of a trained model of three semantics, seed 1."""
    code, _, err = run("--seed 1")
    assert code == 0, err
    return tmp_path / "models/m"


def fails(result, words, lines=1):
    code, out, err = result
    assert code == 2, (out, err)
    assert len(err.strip().splitlines()) == lines and "Traceback" not in err
    assert all(line.startswith("error: ") for line in err.strip().splitlines()) and words in err, err


def test_a_model_is_evaluated(predict, model):
    before = contents(model)
    code, out, err = predict([model])
    assert code == 0 and err == ""
    after = contents(model)
    assert sorted(after.keys() - before.keys()) == RESULTS
    assert {**after, "args.json": 0} == {**after, **before, "args.json": 0}
    predicted = pd.read_csv(model / "results_predict.csv")
    assert list(predicted.columns) == ["task", "metric_scores"] and predicted.task.tolist() == ["y1", "y2", "y3", "y4"]
    classified = pd.read_csv(model / "results_classify.csv")
    assert list(classified.columns) == ["iid", "ood"] and len(classified) == 1
    assert np.isfinite(predicted.metric_scores).all() and classified.abs().le(1).all(axis=None)
    stored, old = json.loads(after["args.json"]), json.loads(before["args.json"])
    record = stored.pop("downstream")
    assert stored.pop("files").items() >= old.pop("files").items()
    assert stored == old and record["seed"] == 2 and record["protocol"] == "code"
    for words in ("training seed 1, evaluation seed 2", "{s_0, s_1}", "F of the first 1, 2, 2, 3 semantics, code protocol"):
        assert words in out


def test_one_seed_one_result(predict, model):
    seen = []
    for seed in (5, 6, 5):
        assert predict([model], f"--overwrite --seed {seed}")[0] == 0
        seen.append([contents(model)[name] for name in RESULTS[1:]])
    assert seen[0] == seen[2] != seen[1]


def test_existing_results_need_overwrite(predict, model):
    for name in RESULTS:
        (model / name).write_text("mine")
        before = contents(model)
        fails(predict([model]), f"{name} already; --overwrite")
        assert contents(model) == before
        (model / name).unlink()
    assert predict([model])[0] == 0
    before = contents(model)
    fails(predict([model], "--seed 9"), "--overwrite")
    assert contents(model) == before
    assert predict([model], "--seed 9 --overwrite")[0] == 0
    assert all(contents(model)[name] != before[name] for name in RESULTS[1:])


def test_a_loop_that_is_run_again_leaves_evaluated_models_as_they_are(predict, model):
    assert predict([model])[0] == 0
    before = contents(model)
    for flags in ("", "--seed 2", "--protocol code --precision fp32"):
        code, out, err = predict([model], flags)
        assert code == 0 and err == "" and "evaluated already with seed 2" in out
        assert contents(model) == before
    for flags in ("--protocol paper", "--num-eval-batches 2", "--precision bf16", "--probes fast"):
        fails(predict([model], flags), "--overwrite replaces it, made otherwise or incomplete")
        assert contents(model) == before
    stored = json.loads((model / "args.json").read_text())
    del stored["downstream"]["probes"]
    (model / "args.json").write_text(json.dumps(stored))
    assert "evaluated already" in predict([model])[1], "a record of an earlier version, which had one kind of probes"
    (model / RESULTS[0]).unlink()
    assert predict([model])[0] == 0, "what is not complete is made again"
    assert {**contents(model), "args.json": 0} == {**before, "args.json": 0}
    for name in RESULTS:
        (model / name).write_bytes(before[name][:-6])
        assert predict([model])[0] == 0, "what is damaged likewise"
        assert {**contents(model), "args.json": 0} == {**before, "args.json": 0}


def test_the_training_seed_is_refused(predict, model):
    before = contents(model)
    fails(predict([model], "--seed 1"), "--seed 1 is its training seed")
    assert contents(model) == before


def test_several_directories_in_one_call(predict, run, model, tmp_path, monkeypatch):
    assert run("--seed 2", model="n")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(
            main_numeric.NumericExperiment, "evaluate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        assert run("--seed 3", model="stopped")[0] == 2
    (tmp_path / "models/notes").mkdir()
    (tmp_path / "models/file").write_text("x")
    names = ["stopped", "notes", "file", "gone", "m", "n"]
    result = predict([f"{tmp_path / 'models' / name}/" for name in names])
    fails(result, "notes is skipped: it holds no finished model", lines=4)
    for words in ("stopped is skipped: it holds no finished", "file is skipped: a file", "gone is skipped: no such"):
        assert words in result[2]
    assert "evaluated 2 of 6 directories" in result[1]
    for name in names[-2:]:
        assert set(RESULTS) <= contents(tmp_path / "models" / name).keys()
    assert contents(tmp_path / "models/notes") == {}


@pytest.mark.parametrize("flags", ["", "--causal-dependence --protocol paper", "--theta-value 6 --beta-value 0"])
def test_the_latents_are_those_of_the_training_whatever_the_protocol_of_the_tasks(predict, run, tmp_path, monkeypatch, flags):
    assert run(f"--seed 1 {flags}")[0] == 0
    used, built = [], MisalignedLatents.__init__

    def noted(latents, *arguments, **options):
        built(latents, *arguments, **options)
        used.append(latents)

    monkeypatch.setattr(MisalignedLatents, "__init__", noted)
    assert run("--seed 7 --evaluate", base="--no-cuda")[0] == 0
    scores = []
    for protocol in ("code", "paper"):
        code, out, _ = predict([tmp_path / "models/m"], f"--overwrite --protocol {protocol}")
        assert code == 0 and f"{protocol} protocol" in out
        scores.append(contents(tmp_path / "models/m")["results_predict.csv"])
    assert scores[0] != scores[1]
    assert len(used) == 3
    for latents in used[1:]:
        assert latents.unbiased == used[0].unbiased
        for name, covariance in used[0].covariances.items():
            assert np.array_equal(latents.covariances[name], covariance)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("--semantics-n 3", "--semantics-n 10"),
        ("--modality-n 1", "--modality-n 0"),
        ("--theta-value 3", "--theta-value 1022"),
        ("--beta-value -1", "--beta-value 0"),
        ("--change-prob 0.75", "--change-prob 0.5"),
        ("", "--causal-dependence"),
        ("--margin-param 1", "--margin-param 2"),
        ("--cond-param 1.0", "--cond-param 0.5"),
        ("--n-mixing-layer 3", "--n-mixing-layer 2"),
        ("--encoding-size 0", "--encoding-size 1"),
        ("--encoding-size 2", "--encoding-size 3"),  # of the unbiased block, {s_0, s_1}
    ],
)
def test_flags_of_the_setting_must_agree_with_the_model(predict, model, right, wrong):
    before = contents(model)
    code, _, err = predict([model], wrong)
    flag, *value = wrong.split()
    assert code == 2 and f"{flag} {value[0] if value else True}" in err and "contradicts" in err and err.count("\n") == 1
    assert contents(model) == before
    assert predict([model], right)[0] == 0 and set(RESULTS) <= contents(model).keys()
    assert predict([model], wrong)[0] == 2, "also where nothing is left to do"


def test_the_shifted_samples_alone_are_shifted(predict, model, monkeypatch):
    kept, encode = [], downstream.encode

    def noted(*arguments):
        kept.append(encode(*arguments))
        return kept[-1]

    monkeypatch.setattr(downstream, "encode", noted)
    assert predict([model], "--num-eval-batches 2")[0] == 0
    assert [tuple(s.shape) for _, s in kept] == [(600, 3)] * 3 and [tuple(h.shape) for h, _ in kept] == [(600, 2)] * 3
    jumps = [(s.abs() == 10).sum(dim=0).tolist() for _, s in kept]
    assert jumps[:2] == [[0, 0, 0]] * 2 and jumps[2][:2] == [0, 0] and 30 < jumps[2][2] < 90
    assert not torch.equal(kept[0][1], kept[1][1])


@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("args.json", None, "it holds no finished model"),
        ("args.json", b'{"seed": 1,', "args.json is damaged"),
        ("args.json", b'{"finished": true}', "args.json is damaged"),
        ("args.json", b'{"seed": 1, "finished": true}', "args.json has no '"),
        ("f_x.pt", None, "f_x.pt is missing"),
        ("f_x.pt", b"PK", "f_x.pt is damaged"),
        ("g_x.pt", b"", "g_x.pt is damaged"),
    ],
)
def test_damaged_models(predict, model, name, damage, words):
    if damage is None:
        (model / name).unlink()
    else:
        (model / name).write_bytes(damage)
    before = contents(model)
    fails(predict([model]), words)
    assert contents(model) == before


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("semantics_n", -3, "--semantics-n"),
        ("semantics_n", "three", "--semantics-n"),
        ("semantics_n", 4, "the weights are of another setting"),
        ("theta_value", 99, "--theta-value 99 is out of range"),
        ("causal_dependence", 1, "1 is no value of --causal-dependence"),
        ("change_prob", None, "--change-prob"),
        ("protocol", "text", "--protocol"),
    ],
)
def test_settings_that_cannot_be(predict, model, name, value, words):
    stored = json.loads((model / "args.json").read_text())
    (model / "args.json").write_text(json.dumps({**stored, name: value}))
    fails(predict([model]), words)


@pytest.mark.parametrize("place", ["encode", "score_tasks"])
def test_too_little_memory_is_one_line_and_keeps_the_model(predict, model, monkeypatch, place):
    before = contents(model)
    with monkeypatch.context() as patch:
        patch.setattr(downstream, place, lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
        fails(predict([model]), "too little memory on CPU")
    assert contents(model) == before
    assert predict([model])[0] == 0


def test_weights_that_are_not_finite(predict, model):
    state = torch.load(model / "f_x.pt")
    torch.save({name: value * torch.nan for name, value in state.items()}, model / "f_x.pt")
    forget_digests(model)
    fails(predict([model]), "not finite")
    assert not set(RESULTS) & contents(model).keys()


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_failure_while_writing_keeps_what_was_there(predict, model, monkeypatch, written):
    assert predict([model])[0] == 0
    before, room = contents(model), iter(range(written))

    def on_a_disk_that_fills(write):
        def attempt(*arguments):
            if next(room, None) is None:
                raise OSError(28, "No space left on device", "somewhere")
            write(*arguments)

        return attempt

    for name in ("write_csv", "plot_downstream_scores"):
        monkeypatch.setattr(downstream, name, on_a_disk_that_fills(getattr(downstream, name)))
    fails(predict([model], "--seed 9 --overwrite"), "No space left on device: somewhere")
    assert contents(model) == before


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--num-eval-batches 0", "--num-eval-batches"),
        ("--seed -1", "--seed"),
        ("--precision tf32", "--precision tf32 needs a CUDA device"),
        ("--precision fp64", "--precision"),
        ("--protocol text", "--protocol"),
        ("--no-such-flag", "--no-such-flag"),
    ],
)
def test_bad_flags(predict, tmp_path, flags, words):
    fails(predict([tmp_path], flags), words)


def test_precision_bf16_encodes_in_bfloat16(predict, model):
    seen = []
    for precision in ("fp32", "bf16"):
        assert predict([model], f"--overwrite --precision {precision}")[0] == 0
        seen.append(pd.read_csv(model / "results_predict.csv").metric_scores)
    assert 0 < np.abs(seen[0] - seen[1]).max() < 0.1


def test_help_says_what_the_protocols_are(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: downstream.main(["--help"]))
    assert not stopped.value.code and "2-means of y2 in each batch of 4096" in capsys.readouterr().out


def test_the_command_line():
    done = subprocess.run([sys.executable, "eval_numeric_predict.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == "error: the following arguments are required: --model-id (see --help)"


def test_encodings_are_those_of_the_semantics_that_come_with_them(run, tmp_path):
    assert run("--seed 1")[0] == 0
    setting, _ = trained_args(tmp_path / "models/m", NumericExperiment)
    model = NumericExperiment(setting, torch.device("cpu"))
    model.load(tmp_path / "models/m")
    for protocol in (None, "code", "paper"):
        h, s = downstream.encode(model, 1, seeded_generator(3, "downstream"), "fp32", protocol)
        z = model.latents.sample(main_numeric.EVAL_BATCH, seeded_generator(3, "downstream"))
        assert torch.equal(s, z.s) == (protocol is None)
        with torch.no_grad():
            expected = model.networks["f_x"](model.networks["g_x"](torch.cat((s, z.m_x), dim=1)))
        torch.testing.assert_close(h, expected)


def test_the_tasks_are_those_of_the_model_s_own_flags(predict, run, tmp_path, monkeypatch):
    monkeypatch.setattr(downstream, "FAST_STEPS", (20, 20))
    assert run("--seed 1 --probes fast --protocol paper")[0] == 0
    model = tmp_path / "models/m"
    code, out, err = predict([model])
    assert code == 0 and "paper protocol" in out, err
    own = contents(model)
    record = json.loads(own["args.json"])["downstream"]
    assert record["protocol"] == "paper" and record["probes"] == "fast"
    assert predict([model], "--overwrite --protocol paper --probes fast")[0] == 0
    assert contents(model)["results_predict.csv"] == own["results_predict.csv"]


def test_the_shifted_samples_are_others_than_the_test_samples(predict, run, tmp_path, monkeypatch):
    assert run("--seed 1")[0] == 0
    kept, encode = [], downstream.encode
    monkeypatch.setattr(downstream, "encode", lambda *arguments: kept.append(encode(*arguments)) or kept[-1])
    assert predict([tmp_path / "models/m"])[0] == 0
    first = [set(s[:, 0].tolist()) for _, s in kept]  # which no shift moves
    assert all(not a & b for a, b in itertools.combinations(first, 2))


def test_all_classes_of_the_paper_are_split_at_the_fitting_set_s_median(monkeypatch):
    monkeypatch.setattr(downstream, "STEPS", 1)
    seen, real = [], downstream.class_labels
    monkeypatch.setattr(downstream, "class_labels", lambda *call: seen.append(call) or real(*call))
    sets = [(torch.randn(50, 4, generator=torch.Generator().manual_seed(seed)),) * 2 for seed in range(3)]
    downstream.score_tasks(*sets, "paper", torch.Generator().manual_seed(0))
    fit, test, shifted = (downstream.regression_targets(s, "paper")[:, 1] for _, s in sets)
    for (y2, fit_y2, protocol), own in zip(seen, (fit, test, shifted), strict=True):
        assert torch.equal(y2, own) and torch.equal(fit_y2, fit) and protocol == "paper"


def test_the_probes_initial_weights_follow_the_evaluation_s_seed(predict, run, tmp_path, monkeypatch):
    assert run("--seed 1")[0] == 0
    seen, real = [], downstream.score_tasks
    monkeypatch.setattr(downstream, "score_tasks", lambda *call: seen.append(call[4].initial_seed()) or real(*call))
    for seed in (5, 6, 5):
        assert predict([tmp_path / "models/m"], f"--overwrite --seed {seed}")[0] == 0
    assert seen[0] == seen[2] != seen[1]
