"""Every script on the stand-in for a CUDA device: nothing mixes devices, and no step of a training waits for it.

Where there is a GPU, `benchmarks/gpu.py` and the scripts themselves say more.
"""

import argparse
import collections
import functools
import io
import json
import shutil
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import eval_numeric_predict
import image_text
import kernel_ridge
import latent_spaces
import main_causal3dident
import main_mpi3dreal
import main_numeric
import mlp_probes
import probes
from benchmarks import numeric_step
from latent_spaces import seeded_generator
from running import optimisation, training
from tests.cuda_device import AMPLE, CPU, CudaTensor, cuda_device
from tests.scripts import Killed, SmallImageEncoder, outcome

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the stand-in would hide it"),
    pytest.mark.skipif(
        not hasattr(torch._C, "_ensureCUDADeviceGuardSet"), reason="this PyTorch is too old for the stand-in device"
    ),
]

NUMERIC = (
    "--semantics-n 3 --modality-n 1 --theta-value 5 --beta-value 1 --batch-size 20 --train-steps 12 --log-steps 6 "
    "--num-eval-batches 1 --seed 1"
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few samples, short fits and no drawing."""
    for module, name, value in (
        (main_numeric, "EVAL_BATCH", 200),
        (latent_spaces, "CONDITION_DRAWS", 1000),
        (mlp_probes, "MAX_EPOCHS", 3),
        (main_numeric, "FAST_PROBES", (5, 10.0)),
        (eval_numeric_predict, "FAST_STEPS", (5, 5)),
        (eval_numeric_predict, "STEPS", 5),
        (probes, "LOGISTIC_ITERATIONS", 5),
    ):
        monkeypatch.setattr(module, name, value)
    for module in (main_numeric, main_mpi3dreal, main_causal3dident):
        monkeypatch.setattr(module, "plot_factor_scores", lambda tables, path, *_: path.write_bytes(b"drawn"))
    monkeypatch.setattr(eval_numeric_predict, "plot_downstream_scores", lambda *given: given[2].write_bytes(b"drawn"))


@pytest.fixture
def call(tmp_path, capsys):
    """call(script, flags, model) → (exit code, stdout, stderr)."""

    def run(script, flags, model="m"):
        return outcome(capsys, script.main, "--model-dir", tmp_path / "models", "--model-id", model, *flags.split())

    return run


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def waits_of_steps(monkeypatch):
    """waits_of_steps(device, script, argv): list of Counters, what was waited for from each step to the next, on a terminal.

    The last one holds all that follows the training.
    """

    def run(device, script, argv):
        begins, step = [], training.training_step
        with monkeypatch.context() as patch:
            patch.setattr(training, "training_step", lambda *given: (begins.append(device.waits.copy()), step(*given))[1])
            patch.setattr(training, "tqdm", functools.partial(tqdm, mininterval=0, miniters=1))
            patch.setattr(sys, "stderr", Terminal())
            assert script.main([str(word) for word in argv]) == 0
        return [after - before for before, after in zip(begins, [*begins[1:], device.waits], strict=True)]

    return run


def directory_of(tmp_path, model="m"):
    return tmp_path / "models" / model


# --------------------------------------------------------------------------------------------------------------
# the stand-in


def test_the_stand_in_refuses_what_a_gpu_refuses():
    with cuda_device():
        x, on_cpu = torch.ones(3, 2, device="cuda"), torch.ones(3, 2)
        generator = torch.Generator("cuda").manual_seed(1)
        assert x.device.type == "cuda" and x.is_cuda and (x + torch.tensor(1.0)).is_cuda and not x.cpu().is_cuda
        mixtures = (
            lambda: x + on_cpu,
            lambda: on_cpu.add_(x),
            lambda: x.T @ on_cpu,
            lambda: torch.cat((x, on_cpu)),
            lambda: on_cpu[torch.zeros(1, dtype=torch.long, device="cuda")],
            lambda: torch.nn.Linear(2, 2)(x),
            lambda: torch.randn(2, device="cuda", generator=torch.Generator()),
            lambda: torch.randn(2, generator=generator),
            lambda: torch.nn.init.uniform_(on_cpu, generator=generator),
            lambda: mlp_probes.adam_step([x], [on_cpu], [x.clone()], [x.clone()], 1),
            lambda: mlp_probes.adam_step([x], [x.T.contiguous().T], [x.clone()], [x.clone()], 1),
        )
        for mixture in mixtures:
            with pytest.raises(RuntimeError):
                mixture()
        with pytest.raises(TypeError):
            x.numpy()


def test_the_stand_in_counts_what_the_host_waits_for():
    with cuda_device() as device:
        x, mask = torch.arange(6.0, device="cuda").view(3, 2), torch.tensor([True, False, True]).to("cuda")
        pinned = torch.empty(3, pin_memory=True).fill_(1)
        waiting = {
            "item": lambda: x.sum().item(),
            "truth": lambda: bool((x > 0).all()),
            "list": lambda: x.tolist(),
            "host": lambda: x.cpu(),
            "mask": lambda: x[mask],
            "indices": lambda: x[[0, 2]],
            "set indices": lambda: x.__setitem__([0, 2], 1.0),
            "unique": lambda: x.unique(),
            "pageable": lambda: torch.ones(3).to("cuda", non_blocking=True),
            "values": lambda: torch.tensor([1.0, 2.0], device="cuda"),
            "into": lambda: x[0].copy_(torch.ones(2)),
            "pinned": lambda: pinned.to("cuda"),
            "factor": lambda: torch.linalg.cholesky(torch.eye(2, device="cuda")),
            "print": lambda: pinned.copy_(x[:, 0]),
        }
        for name, act in waiting.items():
            device.waits.clear()
            act()
            assert device.waits.total() >= 1, name
        device.waits.clear()
        pinned.to("cuda", non_blocking=True)
        x[mask] = 0.0
        x.masked_fill_(x > 1, 0.0)
        torch.full((), 2.0, device="cuda") * x.index_select(0, torch.arange(2, device="cuda"))
        assert not device.waits


def test_a_generator_of_the_stand_in_has_states_of_its_own():
    with cuda_device():
        generator, other = torch.Generator("cuda").manual_seed(3), torch.Generator().manual_seed(3)
        first, state = torch.randn(20, device="cuda", generator=generator), generator.get_state()
        assert torch.equal(first.cpu(), torch.randn(20, generator=other))
        assert len(state) == 16 != len(other.get_state())
        second = torch.randn(20, device="cuda", generator=generator).cpu()
        generator.set_state(state)
        assert torch.equal(second, torch.randn(20, device="cuda", generator=generator).cpu())
        with pytest.raises((RuntimeError, TypeError)):
            other.set_state(state)
        with pytest.raises(RuntimeError):
            generator.set_state(other.get_state())


# --------------------------------------------------------------------------------------------------------------
# the scripts


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--recipe fast --precision bf16 --mlp-eval --spare-dimensions 2",
        "--recipe fast --precision tf32 --negatives independent",
        "--optimiser muon --causal-dependence --protocol paper --theta-value 0 --beta-value -1",
    ],
)
def test_numeric_training_waits_for_nothing_and_all_that_follows_stays_on_the_device(tmp_path, waits_of_steps, call, flags):
    argv = [*NUMERIC.split(), "--model-dir", tmp_path / "models", "--model-id", "m", *flags.split()]
    with cuda_device() as device:
        steps = waits_of_steps(device, main_numeric, argv)
        assert call(main_numeric, "--evaluate --seed 5")[0] == 0
        assert eval_numeric_predict.main(["--model-id", str(directory_of(tmp_path)), "--num-eval-batches", "1"]) == 0
    assert len(steps) == 12 and all(steps[step] for step in (5, 11))
    assert not any(steps[:5] + steps[6:11]), steps
    assert json.loads((directory_of(tmp_path) / "args.json").read_text())["device"] == "a stand-in for CUDA"


IMAGES = "--seed 1 --train-steps 4 --log-steps 2 --checkpoint-steps 100"


@pytest.mark.parametrize(
    "free, flags, whole_encoder",
    [
        (AMPLE, "--batch-size 150", False),
        (10**9, "--batch-size 150 --recipe fast --first-batch-size 30 --precision bf16", False),
        (10**9, "--batch-size 150 --workers 2 --protocol paper", False),
        (AMPLE, "--batch-size 150 --recipe fast --precision tf32 --optimiser muon --preconditioner inputs", False),
        (AMPLE, "--batch-size 12 --recipe fast --first-batch-size 16 --precision bf16", True),
    ],
    ids=["resident", "on-disk", "on-disk-workers", "muon", "resnet"],
)
def test_training_on_images_waits_for_nothing(mpi3d, tmp_path, monkeypatch, waits_of_steps, call, free, flags, whole_encoder):
    monkeypatch.setitem(image_text.PROBE_STEPS, "paper", 10)
    if not whole_encoder:
        monkeypatch.setattr(image_text, "ImageEncoder", SmallImageEncoder)
    argv = ["--datapath", mpi3d, "--model-dir", tmp_path / "models", "--model-id", "m", *IMAGES.split(), *flags.split()]
    with cuda_device(free) as device:
        steps = waits_of_steps(device, main_mpi3dreal, argv)
        assert call(main_mpi3dreal, f"--datapath {mpi3d} --evaluate --seed 5")[0] == 0
    assert len(steps) == 4 and not steps[0] and not steps[2], steps  # the third step begins an epoch, or may


def test_causal3dident_trains_and_is_evaluated_on_the_device(causal3dident, tmp_path, monkeypatch, waits_of_steps, call):
    monkeypatch.setattr(image_text, "ImageEncoder", functools.partial(SmallImageEncoder, side=3))
    flags = "--recipe fast --batch-size 60 --first-batch-size 16 --bias-type perturbations --bias-id 3"
    argv = ["--datapath", causal3dident, "--model-dir", tmp_path / "models", "--model-id", "m", *IMAGES.split()]
    with cuda_device() as device:
        steps = waits_of_steps(device, main_causal3dident, [*argv, *flags.split()])
        assert call(main_causal3dident, f"--datapath {causal3dident} --evaluate --seed 5")[0] == 0
    assert len(steps) == 4 and not steps[0] and not steps[2], steps  # the third step begins an epoch, or may


# --------------------------------------------------------------------------------------------------------------
# the same results


# of the way that weights go in three steps; the whitened gradients of the fast recipe carry rounding further, and its
# covariances over a part of the rows alone would give 0.7
@pytest.mark.parametrize("recipe, tolerance", [("paper", 1e-4), ("fast", 0.05)])
def test_a_gpu_trains_as_a_cpu_does(tmp_path, call, recipe, tolerance):
    flags = f"{NUMERIC} --recipe {recipe} --precision fp32 --batch-size 600 --final-batch-size 0 --train-steps 3"
    flags += " --spare-dimensions 0"  # after three steps any direction agrees as well as another
    assert call(main_numeric, f"{flags} --no-cuda", "cpu")[0] == 0
    with cuda_device():
        assert call(main_numeric, flags, "gpu")[0] == 0
    args, _ = main_numeric.NumericExperiment.parse_flags(f"{flags} --no-cuda".split())
    untrained = main_numeric.NumericExperiment(args, CPU)
    untrained.draw(tmp_path)
    for encoder in ("f_x", "f_t"):
        cpu, gpu = (torch.load(directory_of(tmp_path, model) / f"{encoder}.pt") for model in ("cpu", "gpu"))
        for name, start in untrained.modules[encoder].state_dict().items():
            assert (cpu[name] - gpu[name]).norm() <= tolerance * (cpu[name] - start).norm(), name


def test_whitening_takes_all_rows_on_either_device(monkeypatch):
    encoder = main_numeric.MLPEncoder(3, 2)
    inputs = torch.randn(1300, 3, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, 1300)[:, None]

    def covariance(device):
        module = torch.nn.Sequential(encoder).to(device)
        whitening = optimisation.InputWhitening({"f": module})
        whitening.before_forward(0)
        module(inputs.to(device)).square().sum().backward()
        whitening.precondition()
        return whitening.state_dict()["f.0.0"][0].cpu()

    expected = inputs.T @ inputs / len(inputs)
    assert torch.allclose(covariance("cpu"), expected, rtol=1e-4)
    with cuda_device():
        assert torch.allclose(covariance("cuda"), expected, rtol=1e-4)


def test_precision_is_lowered_in_the_encoders_alone(mpi3d, tmp_path, monkeypatch, call):
    numeric = f"{NUMERIC} --train-steps 2 --log-steps 2"
    for recipe in ("paper", "fast"):
        with cuda_device() as device:
            assert call(main_numeric, f"{numeric} --recipe {recipe} --precision tf32", recipe)[0] == 0
        assert device.lowered.keys() == {"encoders.py:forward", "optimisation.py:training_step"}
        assert {"latent_spaces.py:forward", "losses.py:_squared_distance_gradients", "encoders.py:forward"} <= device.full.keys()
        assert ("optimisation.py:precondition" in device.full) == (recipe == "fast")
        with cuda_device() as device:
            assert call(main_numeric, f"{numeric} --recipe {recipe} --precision fp32", f"{recipe}-full")[0] == 0
        assert not device.lowered
    monkeypatch.setattr(image_text, "ImageEncoder", SmallImageEncoder)
    flags = f"--datapath {mpi3d} {IMAGES} --batch-size 20 --train-steps 2 --recipe fast --optimiser muon --precision tf32"
    with cuda_device() as device:
        assert call(main_mpi3dreal, flags, "images")[0] == 0
    # the small encoder is the test's, and is called from the loss
    assert device.lowered.keys() == {"encoders.py:forward", "image_text.py:loss", "optimisation.py:training_step"}
    assert {"losses.py:_cosine_loss", "optimisation.py:orthogonalised", "mlp_probes.py:_backpropagate"} <= device.full.keys()


def test_the_benchmark_of_a_step_starts_from_the_same_weights():
    def weights(device):
        options = argparse.Namespace(device=device, small=True, flags=[])
        model = numeric_step.set_up("fp32", options)
        states = {name: network.state_dict() for name, network in model.networks.items()}
        return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}

    cpu = weights("cpu")
    with cuda_device():
        gpu = weights("cuda")
        assert cpu.keys() == gpu.keys() and all(value.is_cuda for value in gpu.values())
        gpu = {name: value.cpu() for name, value in gpu.items()}
    assert all(torch.equal(cpu[name], gpu[name]) for name in cpu)


# --------------------------------------------------------------------------------------------------------------
# resuming


def killed_at(step, monkeypatch):
    """A patch: the run is killed as it begins that step."""
    left, real = iter(range(step - 1)), training.training_step

    def dying(*given):
        if next(left, None) is None:
            raise Killed
        return real(*given)

    monkeypatch.setattr(training, "training_step", dying)


@pytest.mark.parametrize("flags", ["", "--recipe fast --precision fp32"])
def test_a_run_that_goes_on_on_its_kind_of_device_ends_with_the_same_bits(tmp_path, monkeypatch, call, flags):
    with cuda_device():
        assert call(main_numeric, f"{NUMERIC} {flags}", "whole")[0] == 0
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(9, patch)
            call(main_numeric, f"{NUMERIC} {flags}", "killed")
        code, out, err = call(main_numeric, "--resume", "killed")
    assert code == 0 and "resumed from step 6" in out and "other random numbers" not in out, err
    whole, killed = (directory_of(tmp_path, model) for model in ("whole", "killed"))
    for name in ("f_x.pt", "f_t.pt", "results.csv"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


def test_images_go_on_with_the_same_bits(mpi3d, tmp_path, monkeypatch, call):
    monkeypatch.setattr(image_text, "ImageEncoder", SmallImageEncoder)
    flags = f"--datapath {mpi3d} {IMAGES} --batch-size 150 --recipe fast --first-batch-size 30 --optimiser muon"
    with cuda_device(10**9):
        assert call(main_mpi3dreal, flags, "whole")[0] == 0
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(4, patch)
            call(main_mpi3dreal, flags, "killed")
        assert call(main_mpi3dreal, f"--datapath {mpi3d} --resume", "killed")[0] == 0
    whole, killed = (directory_of(tmp_path, model) for model in ("whole", "killed"))
    for name in ("encoder_img.pt", "encoder_txt.pt", "results.csv"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


def test_a_run_moves_to_the_cpu_only_where_it_is_told_to(tmp_path, monkeypatch, call):
    with cuda_device(), monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(9, patch)
        call(main_numeric, f"{NUMERIC} --recipe fast --precision fp32", "moved")
    before = (directory_of(tmp_path, "moved") / "checkpoint.pt").read_bytes()
    code, _, err = call(main_numeric, "--resume", "moved")
    assert code == 2 and err.count("\n") == 1
    assert all(words in err for words in ("was trained on a stand-in for CUDA", "--no-cuda", "the CPU"))
    assert (directory_of(tmp_path, "moved") / "checkpoint.pt").read_bytes() == before
    code, out, err = call(main_numeric, "--resume --no-cuda", "moved")
    assert code == 0 and "resumed from step 6" in out and "other random numbers" in out, err
    args = json.loads((directory_of(tmp_path, "moved") / "args.json").read_text())
    devices = [machine["device"] for machine in args["machines"]]
    assert args["finished"] and len(devices) == 2 and devices[0] == "a stand-in for CUDA" and devices[1].startswith("CPU ")


def test_steps_of_adam_come_to_the_host_in_one_copy_and_load_from_any_checkpoint():
    def adam(device):
        parameters = [torch.full((2, size), 1.0, device=device, requires_grad=True) for size in (1, 2, 3)]
        return optimisation.Adam(parameters)

    with cuda_device() as device:
        optimiser = adam("cuda")
        for parameter in optimiser.parameters[:2]:
            parameter.grad = torch.ones_like(parameter)
        for _ in range(3):
            optimiser.update(0.1)
        device.waits.clear()
        state = optimiser.state_dict()
        assert device.waits.total() == 1
        assert [(step.shape, step.item()) for step in state["steps"]] == [((), 3), ((), 3), ((), 0)]
        stored = {name: [tensor.detach().cpu().clone() for tensor in tensors] for name, tensors in state.items()}
        for target in ("cpu", "cuda"):
            other = adam(target)
            other.load_state_dict(stored)
            assert [step.item() for step in other.steps] == [3, 3, 0]
            assert other.momentum[0].device.type == target
            with pytest.raises(ValueError):
                other.load_state_dict({**stored, "momentum": stored["momentum"][:2]})


# --------------------------------------------------------------------------------------------------------------
# probes


class Made(TorchDispatchMode):
    """Counts what operators make anew, by the number of its elements; views and what is written in place are not new."""

    def __init__(self):
        super().__init__()
        self.sizes = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def storage(tensor):
            return (tensor.numbers if isinstance(tensor, CudaTensor) else tensor).untyped_storage().data_ptr()

        result = func(*args, **(kwargs or {}))
        known = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and storage(leaf) not in known:
                self.sizes[leaf.numel()] += 1
        return result


def samples(count, seed):
    """(h, targets): encodings (count, 3) of which one target is a smooth function and one, of two outputs, is none."""
    h = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed + 50))
    return h, {"smooth": (h[:, 0] * h[:, 1]).sin() + h[:, 2].square(), "noise": noise}


@pytest.mark.parametrize("direct", [4096, 100], ids=["direct", "shared"])
def test_kernel_ridge_on_a_gpu_scores_as_on_a_cpu(monkeypatch, direct):
    monkeypatch.setattr(kernel_ridge, "DIRECT_SIZE", direct)
    monkeypatch.setattr(kernel_ridge, "KERNEL_ROWS", 64)
    precisions, real = [], kernel_ridge._precision
    monkeypatch.setattr(kernel_ridge, "_precision", lambda *given: (precisions.append(real(*given)), precisions[-1])[1])
    (fit_h, fit_targets), (test_h, test_targets) = samples(420, 1), samples(300, 2)
    expected, best = kernel_ridge.kernel_ridge_r2(fit_h, fit_targets, test_h, test_targets, return_best=True)
    on_cpu = precisions.copy()
    precisions.clear()
    with cuda_device() as device, Made() as made:
        fit, test = ({name: target.to("cuda") for name, target in part.items()} for part in (fit_targets, test_targets))
        given = fit_h.to("cuda"), fit, test_h.to("cuda"), test
        device.waits.clear()
        made.sizes.clear()
        scores, found = kernel_ridge.kernel_ridge_r2(*given, return_best=True)
    assert found == best and expected["smooth"] > 0.9
    assert all(abs(scores[name] - expected[name]) < 1e-4 for name in expected)
    assert precisions == on_cpu and (set(precisions) == {torch.float32, torch.float64}) == (direct == 100)
    # a factor takes the place of its kernel: one tensor of 280 × 280 for each of a fold's factorisations
    factorisations = kernel_ridge.FOLDS * len(kernel_ridge.GAMMAS) * (len(kernel_ridge.ALPHAS) if direct == 4096 else 1)
    assert made.sizes[280**2] == factorisations
    # and the grid is not waited for, only whether a factor failed, its precision, and a few checks
    assert device.waits.total() <= 2 * (factorisations + len(kernel_ridge.ALPHAS)) + 20


def test_a_factor_that_fails_in_float32_on_a_gpu_is_made_in_float64():
    h = samples(200, 1)[0]
    with cuda_device():
        wanted = torch.ones(200, 1, dtype=torch.float64, device="cuda")
        given = h.double().to("cuda") / 1000  # all samples are alike
        solve = kernel_ridge._ridge_solver(given, 0.01, 1e-9, torch.float32)
        kernel = kernel_ridge._kernel_block(given, given, 0.01, torch.float64)
        residual = kernel @ solve(wanted) + 1e-9 * solve(wanted) - wanted
        assert residual.abs().max().item() < 1e-4
        with pytest.raises(torch.linalg.LinAlgError):
            kernel_ridge._ridge_solver(given, 0.01, -1.0, torch.float32)


def test_probes_wait_once_an_epoch_and_score_as_on_a_cpu(monkeypatch):
    monkeypatch.setattr(mlp_probes, "MAX_EPOCHS", 40)
    monkeypatch.setattr(mlp_probes, "TOLERANCE", 1e-2)  # networks stop at different epochs
    (fit_h, fit_targets), (test_h, test_targets) = samples(500, 1), samples(300, 2)
    classes = [{f"{k}": (h[:, 0] * k).round().long() for k in (1, 2)} for h in (fit_h, test_h)]

    def score(device):
        h, other = fit_h.to(device), test_h.to(device)
        fit, test, *kinds = ({k: v.to(device) for k, v in part.items()} for part in (fit_targets, test_targets, *classes))
        generator = seeded_generator(1, "probe")
        scores = probes.mlp_r2({"h": (h, other)}, fit, test, generator)
        scores |= probes.mlp_mcc({"h": (h, other)}, *kinds, generator)
        scores |= probes.linear_r2(h, fit, other, test)
        return scores | {f"logistic {k}": v for k, v in probes.logistic_mcc(h, kinds[0], other, kinds[1]).items()}

    expected = score("cpu")
    with cuda_device() as device:
        scores = score("cuda")
    assert scores.keys() == expected.keys() and all(abs(scores[name] - expected[name]) < 1e-3 for name in scores)
    epochs = 40 * 4  # at most, for each of the shapes of networks
    trained = {key: n for key, n in device.waits.items() if "mlp_probes.py" in key[1]}
    assert sum(n for (what, _), n in trained.items() if what == "copy to the host") <= epochs
    assert not [key for key in trained if "index by a mask" in key], trained
    # a gradient of the logistic regression comes in one copy with its loss, and classes are counted on the host
    scoring = collections.Counter()
    for (what, line), n in device.waits.items():
        scoring[what] += n * line.startswith("probes.py")
    assert scoring["_local_scalar_dense"] == scoring["bincount"] == 0 and scoring["_unique2"] == 4, scoring


# --------------------------------------------------------------------------------------------------------------
# memory


ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.12 GiB."),
    "context": RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
    ),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried …"),
    "numpy": MemoryError("Unable to allocate 3.12 GiB for an array"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_an_evaluation_without_memory_keeps_the_model_and_says_how_to_go_on(tmp_path, monkeypatch, call, error):
    def fail(*_):
        raise ERRORS[error]

    def train(flags):
        with monkeypatch.context() as patch:
            patch.setattr(main_numeric, "kernel_ridge_r2", fail)
            return call(main_numeric, flags)

    flags = f"{NUMERIC} --num-eval-batches 2"
    if error in ("gpu", "context", "cublas"):
        with cuda_device():
            code, _, err = train(flags)
    else:
        code, _, err = train(f"{flags} --no-cuda")
    assert code == 2 and err.count("\n") == 1, err
    assert all(
        words in err for words in ("too little memory", "is kept", "--resume and --num-eval-batches below 2 or --mlp-eval")
    )
    assert ("--no-cuda" in err) == (error in ("gpu", "context", "cublas"))
    directory = directory_of(tmp_path)
    trained = (directory / "f_x.pt").read_bytes()
    assert not (directory / "results.csv").exists()
    for way in ("--num-eval-batches 1", "--mlp-eval", ""):
        shutil.copytree(directory, directory_of(tmp_path, "copy"), dirs_exist_ok=True)
        code, out, err = call(main_numeric, f"--resume --no-cuda {way}", "copy")
        assert code == 0 and "step 12" not in out.replace("step 12 of 12", ""), err
        assert (directory_of(tmp_path, "copy") / "f_x.pt").read_bytes() == trained
        shutil.rmtree(directory_of(tmp_path, "copy"))
    # of a finished model
    assert call(main_numeric, "--resume --no-cuda")[0] == 0
    results = (directory / "results.csv").read_bytes()
    code, _, err = train("--evaluate --seed 9 --no-cuda")
    assert code == 2 and "--evaluate --seed 9 and --num-eval-batches below 2 or --mlp-eval" in err
    assert (directory / "results.csv").read_bytes() == results


def test_other_errors_of_an_evaluation_are_not_taken_for_a_lack_of_memory(monkeypatch, call):
    def fail(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(main_numeric, "kernel_ridge_r2", fail)
    code, _, err = call(main_numeric, f"{NUMERIC} --no-cuda")
    assert code == 1 and "Traceback" in err and "RuntimeError: mat1 and mat2" in err and "too little memory" not in err


@pytest.mark.parametrize(
    "script_flags",
    ["--evaluate --seed 2", "--overwrite --seed 1 --whitening-pairs 16 --train-steps 2 --log-steps 2 --batch-size 20"],
)
def test_convolutions_are_computed_in_full_where_no_training_has_come_before(mpi3d, tmp_path, capsys, monkeypatch, script_flags):
    monkeypatch.setattr(image_text, "ImageEncoder", SmallImageEncoder)
    monkeypatch.setattr(mlp_probes, "MAX_EPOCHS", 3)
    monkeypatch.setattr(main_mpi3dreal, "plot_factor_scores", lambda tables, path, *_: path.write_bytes(b"drawn"))
    place = ["--datapath", mpi3d, "--model-dir", tmp_path, "--model-id", "m"]
    training = ["--seed", "1", "--train-steps", "2", "--log-steps", "2", "--batch-size", "20"]
    with cuda_device() as device:
        assert outcome(capsys, main_mpi3dreal.main, *place, *training)[0] == 0
        torch.backends.cudnn.allow_tf32 = True  # as PyTorch starts
        device.lowered.clear()
        assert outcome(capsys, main_mpi3dreal.main, *place, *script_flags.split())[0] == 0
    assert not device.lowered, device.lowered


def test_a_run_in_tf32_moves_to_the_cpu(tmp_path, monkeypatch, call):
    """Which is what the message of an evaluation without memory advises; it goes on in full."""

    def fail(*_):
        raise ERRORS["gpu"]

    with cuda_device(), monkeypatch.context() as patch:
        patch.setattr(main_numeric, "kernel_ridge_r2", fail)
        assert "--no-cuda" in call(main_numeric, f"{NUMERIC} --num-eval-batches 2 --precision tf32")[2]
    code, out, err = call(main_numeric, "--resume --no-cuda")
    assert code == 0 and "threads, fp32" in out, err
    assert json.loads((directory_of(tmp_path) / "args.json").read_text())["precision"] == "tf32"
