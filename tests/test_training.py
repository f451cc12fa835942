"""A run can be killed at any moment: it resumes bit for bit, and nothing that was complete is lost."""

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from torch import nn

import encoders
import latent_spaces
import losses
import main_numeric
from main_numeric import NumericExperiment
from running import devices, experiment, files, optimisation, ranks, schedules, training
from running.command_line import InputError
from running.devices import encoder_precision, matrix_precision, select_device
from running.directory import load_torch, load_weights, save_torch, save_weights
from tests.conftest import TINY
from tests.scripts import Killed

ROOT = Path(training.__file__).parents[1]
SEED = "--seed 3"


def outcome(directory):
    """Everything a run computes, as bytes; durations left out."""
    weights = {name: (directory / name).read_bytes() for name in ("f_x.pt", "f_t.pt", "g_x.pt", "g_t.pt")}
    log = pd.read_csv(directory / "train_log.csv").drop(columns="seconds")
    return weights, (directory / "results.csv").read_bytes(), log.to_csv()


def killed_after(monkeypatch, steps):
    """Have the run die in the middle of a step once `steps` steps were done in this process."""
    real, count = main_numeric.NumericExperiment.loss, iter(range(10**9))

    def dying(*arguments):
        loss = real(*arguments)
        if next(count) == steps:
            raise Killed
        return loss

    monkeypatch.setattr(main_numeric.NumericExperiment, "loss", dying)


@pytest.mark.parametrize("recipe", ["paper", "fast", "fast --loss sigmoid", "fast --spare-dimensions 3"])
def test_a_run_killed_at_random_steps_ends_as_one_that_never_was(run, tmp_path, monkeypatch, recipe):
    flags = f"{SEED} --recipe {recipe} --beta-value 0"
    assert run(flags, "whole")[0] == 0
    rng = random.Random(recipe.split()[0])
    for _ in range(3):
        with monkeypatch.context() as patch:
            killed_after(patch, rng.randrange(18))
            with pytest.raises(Killed):
                run(f"{flags} --resume", "killed")
    code, out, _ = run("--resume", "killed", base="")
    assert code == 0 and "resumed from step" in out
    assert outcome(tmp_path / "models/killed") == outcome(tmp_path / "models/whole")


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_lower_precision_is_the_training_encoders_alone(run, monkeypatch, precision):
    """Sampling, mixing, losses, their gradients and probes are computed in full, whatever the training is."""
    seen = {}

    def noting(place, name):
        function = getattr(place, name)

        def call(*arguments, **options):
            lower = torch.backends.cuda.matmul.allow_tf32 or torch.is_autocast_enabled("cpu")
            seen.setdefault((place.__name__, torch.is_grad_enabled()), set()).add(lower)
            return function(*arguments, **options)

        monkeypatch.setattr(place, name, call)

    monkeypatch.setattr(experiment, "settled_precision", lambda *_: precision)
    noting(encoders.MLPEncoder, "forward")
    noting(latent_spaces.MisalignedLatents, "sample")
    noting(latent_spaces.MixingNetwork, "forward")
    noting(losses._AnchorLoss, "forward")
    noting(optimisation.Adam, "update")
    noting(NumericExperiment, "evaluate")
    assert run(SEED)[0] == 0
    assert seen.pop(("MLPEncoder", True)) == {True}
    assert len(seen) >= 6 and set().union(*seen.values()) == {False}


@pytest.mark.parametrize("negatives", ["both", "cross"])
def test_gradients_of_the_cosine_loss_are_formed_in_full(negatives):
    """Backward of the loss, which runs where TF32 is allowed, has no matrix product left."""
    h_x, h_t = (torch.randn(9, 3, generator=torch.Generator().manual_seed(seed), requires_grad=True) for seed in (0, 1))
    loss = losses.image_text_contrastive_loss(h_x, h_t, negatives=negatives)
    with torch.profiler.profile() as profile:
        loss.backward()
    assert not {event.name for event in profile.events()} & {"aten::mm", "aten::addmm", "aten::matmul"}
    assert h_x.grad.isfinite().all() and h_t.grad.abs().sum() > 0


def test_a_run_killed_while_it_evaluates_needs_no_training(run, tmp_path, monkeypatch):
    assert run(SEED, "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(NumericExperiment, "evaluate", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(SEED, "killed")
    killed_after(monkeypatch, 0)
    assert run("--resume", "killed")[0] == 0
    assert outcome(tmp_path / "models/killed") == outcome(tmp_path / "models/whole")


def start(tmp_path, *flags):
    """main_numeric.py in a process of its own, long enough to be stopped."""
    command = [sys.executable, "main_numeric.py", *TINY.split(), "--seed", "3", "--model-dir", str(tmp_path), *flags]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # as many threads as the runs it is compared with
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_process_ends_as_one_that_never_was(tmp_path):
    """All in processes of their own: OMP_NUM_THREADS and torch.set_num_threads may differ on few cores."""
    steps = ("--train-steps", "300", "--log-steps", "20")
    process = start(tmp_path / "models", *steps, "--model-id", "killed")
    wait_for(tmp_path / "models/killed/checkpoint.pt", process)
    process.kill()
    process.communicate()
    assert load_torch(tmp_path / "models/killed/checkpoint.pt")["progress"]["step"] < 300
    for flags in (("--model-id", "killed", "--resume"), ("--model-id", "whole")):
        process = start(tmp_path / "models", *steps, *flags)
        assert process.communicate(timeout=300) and process.returncode == 0
    (weights, results, _), (expected_weights, expected_results, _) = (
        outcome(tmp_path / "models" / m) for m in ("killed", "whole")
    )
    assert weights == expected_weights and results == expected_results
    losses = [pd.read_csv(tmp_path / "models" / m / "train_log.csv").loss.tolist() for m in ("killed", "whole")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_writes_a_checkpoint_and_says_how_to_resume(tmp_path, signum):
    process = start(tmp_path, "--model-id", "p", "--train-steps", "100000", "--log-steps", "7")
    wait_for(tmp_path / "p/checkpoint.pt", process)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    step = load_torch(tmp_path / "p/checkpoint.pt")["progress"]["step"]
    assert f"stopped by {signal.Signals(signum).name} after step {step} of 100000" in err
    assert f"--model-dir {tmp_path} --model-id p --resume" in err and len(err.strip().splitlines()) == 1
    assert "Traceback" not in err + out


def test_a_resume_on_another_machine_says_so_and_keeps_both(run, tmp_path, monkeypatch):
    monkeypatch.delenv("MKL_CBWR", raising=False)  # one of the processors that the tests run as sets it
    with monkeypatch.context() as patch:
        killed_after(patch, 25)
        with pytest.raises(Killed):
            run(SEED, "m")
    path = tmp_path / "models/m/args.json"
    stored = json.loads(path.read_text())
    before = {"device": "CPU of another kind, 7 threads", "versions": {**stored["versions"], "torch": "2.0.1"}}
    path.write_text(json.dumps({**stored, **before}))
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    code, out, _ = run("--resume", "m")
    said = [line for line in out.splitlines() if "another machine than before" in line]
    assert code == 0 and len(said) == 1, out
    for words in ("CPU of another kind, 7 threads, now ", "2.0.1", torch.__version__, "MKL_CBWR=AVX2", "may differ"):
        assert words in said[0]
    machines = json.loads(path.read_text())["machines"]
    assert [machine["device"] for machine in machines] == [before["device"], stored["device"]]
    assert "another machine" not in run(f"{SEED} --resume", "fresh")[1]


def test_a_signal_that_is_ignored_stays_so():
    """As nohup and a shell's background have it."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with training._StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_sigterm_is_heeded_where_a_job_ignores_it():
    """As grids/jobs.py has it on SLURM: a second one, after the first, shall not cut the checkpoint short."""
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with training._StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_log_that_a_kill_has_cut_short_is_whole_after_the_resume(run, tmp_path, monkeypatch):
    """The kill comes between the checkpoint of the last step and the log's last row."""
    assert run(SEED, "whole")[0] == 0
    real, writes = training.write_csv, iter(range(100))

    def dying(*arguments):
        if next(writes) == 3:
            raise Killed
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_csv", dying)
        with pytest.raises(Killed):
            run(SEED, "killed")
    assert run("--resume", "killed")[0] == 0
    assert outcome(tmp_path / "models/killed") == outcome(tmp_path / "models/whole")


def test_a_second_signal_is_not_swallowed(tmp_path):
    with training._StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resuming_from_a_checkpoint_between_two_lines_of_the_log(tmp_path, run, monkeypatch):
    """A signal comes in mid-interval: the mean loss of the interval and the weights are those of an uninterrupted run."""
    run(SEED, "whole")
    real, count = main_numeric.multimodal_contrastive_loss, iter(range(10**9))

    def signalled(*arguments, **options):
        if next(count) == 16:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(main_numeric, "multimodal_contrastive_loss", signalled)
        code, _, err = run(SEED, "stopped")
    assert code == 128 + signal.SIGTERM and "after step 17 of 40" in err
    assert run("--resume", "stopped")[0] == 0
    assert outcome(tmp_path / "models/stopped") == outcome(tmp_path / "models/whole")


# --------------------------------------------------------------------------------------------------------------
# the loop against one written out


def toy_args(**changes):
    flags = {
        "lr": 0.01,
        "lr_schedule": "constant",
        "train_steps": 12,
        "log_steps": 5,
        "precision": "fp32",
        "layer_lr": "uniform",
        "preconditioner": "none",
        "optimiser": "adam",
        "checkpoint_minutes": 10,
    }
    return Namespace(**{**flags, "model_dir": "models", "model_id": "toy", **changes})


class Toy:
    """What the loop needs of an Experiment: a linear layer whose outputs shall vanish."""

    device, rates, keep_steps = torch.device("cpu"), None, 0

    def __init__(self, **changes):
        self.args, self.generator = toy_args(**changes), torch.Generator().manual_seed(0)
        self.module = nn.Linear(4, 3)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=self.generator))
        self.modules = self.trained = {"m": self.module}
        self.generators = {"g": self.generator}

    def loss(self, share_done):
        return 30 * self.module(torch.randn(8, 4, generator=self.generator)).square().sum()

    def monitor(self):
        return {}, ""

    def identity(self):
        return {"lr": self.args.lr}


@pytest.mark.parametrize("schedule, rates", [("constant", None), ("onecycle", None), ("constant", {"m": 0.1, "n": 3})])
def test_the_loop_is_adam_with_clipping_a_schedule_and_rates(tmp_path, schedule, rates):
    toy, rate = Toy(lr_schedule=schedule), (rates or {"m": 1})["m"]
    toy.rates = rates
    training.train(toy, tmp_path)
    reference = Toy()
    plain, plain_loss = reference.module, reference.loss
    mean = [torch.zeros_like(p) for p in plain.parameters()]
    square = [torch.zeros_like(p) for p in plain.parameters()]
    for step in range(12):
        progress = step / 12
        lr = 0.01 * rate
        if schedule == "onecycle":
            warm = 0.04 + 0.96 * (1 - np.cos(np.pi * progress / 0.1)) / 2
            lr *= warm if progress < 0.1 else 1e-4 + (1 + np.cos(np.pi * (progress - 0.1) / 0.9)) / 2
        gradients = torch.autograd.grad(plain_loss(None), list(plain.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > 2, "the clipping must be at work"
        for p, g, m, v in zip(plain.parameters(), gradients, mean, square, strict=True):
            g = g * 2 / norm
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            p.data -= lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    for ours, theirs in zip(toy.module.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_onecycle_warms_up_and_comes_down():
    rate = [schedules.LR_SCHEDULES["onecycle"](step / 1000) for step in range(1001)]
    assert rate[0] == pytest.approx(0.04) and max(rate) == pytest.approx(1, abs=1e-3) and rate[-1] == pytest.approx(1e-4)
    assert np.argmax(rate) == 100 and all(a <= b for a, b in itertools.pairwise(rate[:101]))
    assert all(a >= b for a, b in itertools.pairwise(rate[100:]))


def test_the_batch_grows_geometrically():
    args = Namespace(batch_size=100, final_batch_size=400)
    assert [schedules.batch_size(args, share) for share in (0, 0.25, 0.5, 1)] == [100, 141, 200, 400]
    assert schedules.batch_size(Namespace(batch_size=100, final_batch_size=0), 0.7) == 100


def test_the_log_holds_the_mean_loss_of_each_interval(tmp_path):
    toy, losses = Toy(), []
    compute_loss = toy.loss

    def noted(share_done):
        losses.append(compute_loss(share_done))
        return losses[-1]

    toy.loss, toy.monitor = noted, lambda: ({"extra": 7}, "")
    training.train(toy, tmp_path)
    log = pd.read_csv(tmp_path / "train_log.csv")
    assert log.step.tolist() == [5, 10, 12] and (log.extra == 7).all()
    values = np.array([loss.item() for loss in losses])
    assert np.allclose(log.loss, [values[:5].mean(), values[5:10].mean(), values[10:].mean()])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    toy, count = Toy(), iter(range(100))
    compute_loss = toy.loss
    toy.loss = lambda share_done: compute_loss(share_done) * (float("nan") if next(count) > 6 else 1)
    with pytest.raises(InputError, match="the loss is nan within the steps up to 10"):
        training.train(toy, tmp_path)
    assert load_torch(tmp_path / "checkpoint.pt")["progress"]["step"] == 5


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("ending", ["keep", "signal"])
def test_weights_that_are_not_finite_take_nobody_s_place(tmp_path, what, ending):
    """Neither those of `keep`, which come between two lines of the log, nor a checkpoint that a signal asks for."""
    toy, count, saved = Toy(), iter(range(100)), []
    module, compute_loss = toy.module, toy.loss

    def diverging(share_done):
        step, loss = next(count) + 1, compute_loss(share_done)
        if step == 8 and ending == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if step < 8:
            return loss
        # √x has no gradient at 0
        return loss * float("nan") if what == "loss" else loss + (module.weight - module.weight.detach()).norm().sqrt()

    toy.loss, toy.keep_steps = diverging, 4 if ending == "keep" else 0
    toy.keep = lambda _, step: saved.append((step, module.weight.isfinite().all().item()))
    with pytest.raises(InputError, match=f"{what} is nan within the steps up to 8"):
        training.train(toy, tmp_path)
    assert saved == ([(4, True)] if ending == "keep" else [])
    assert load_torch(tmp_path / "checkpoint.pt")["progress"]["step"] == 5


def test_bf16_is_used_where_it_is_asked_for(tmp_path):
    toy, seen = Toy(precision="bf16", train_steps=1), []

    def compute_loss(share_done):
        with encoder_precision(toy.device, toy.args.precision):
            output = toy.module(torch.randn(8, 4, generator=toy.generator))
        seen.append(output.dtype)
        return output.float().square().sum()

    toy.loss = compute_loss
    training.train(toy, tmp_path)
    assert seen == [torch.bfloat16] and toy.module.weight.dtype == torch.float32


@pytest.fixture
def clock(monkeypatch):
    """now[0]: the seconds of the training's clock."""
    now = [100.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    return now


def ticking(toy, clock, seconds, killed_at=None):
    compute_loss, count = toy.loss, iter(range(1, 10**6))

    def loss(share_done):
        if next(count) == killed_at:
            raise Killed
        clock[0] += seconds
        return compute_loss(share_done)

    toy.loss = loss
    return toy


def test_a_checkpoint_comes_when_its_minutes_have_passed_and_no_sooner(tmp_path, monkeypatch, clock):
    steps, real = [], training.save_checkpoint
    monkeypatch.setattr(training, "save_checkpoint",
                        lambda content, path: (steps.append(content["progress"]["step"]), real(content, path)))  # fmt: skip
    training.train(ticking(Toy(train_steps=40, log_steps=15, checkpoint_minutes=0.5), clock, 8), tmp_path)
    assert steps == [4, 8, 12, 15, 19, 23, 27, 30, 34, 38, 40]


def test_the_log_goes_on_with_seconds_and_rates_of_the_whole_run(tmp_path, clock):
    with pytest.raises(Killed):
        training.train(ticking(Toy(lr_schedule="onecycle"), clock, 2, killed_at=8), tmp_path)
    clock[0] += 1000
    progress = training.train(ticking(Toy(lr_schedule="onecycle"), clock, 2), tmp_path)
    log = pd.read_csv(tmp_path / "train_log.csv")
    assert log.seconds.tolist() == [10, 20, 24] and progress.seconds == 24
    rates = [0.01 * schedules.LR_SCHEDULES["onecycle"](step / 12) for step in (4, 9, 11)]
    assert np.allclose(log.lr, rates, rtol=1e-6)


def test_a_run_that_moves_to_another_kind_of_device_repeats_no_random_numbers(tmp_path, capsys):
    training.train(Toy(train_steps=12, log_steps=10), tmp_path)
    content = load_torch(tmp_path / "checkpoint.pt")
    content["progress"] |= {"step": 10, "log": content["progress"]["log"][:1]}
    save_torch({**content, "device": "cuda"}, tmp_path / "checkpoint.pt")
    moved, states = Toy(train_steps=12, log_steps=10), []
    compute_loss = moved.loss
    moved.loss = lambda share_done: (states.append(moved.generator.get_state()), compute_loss(share_done))[1]
    training.train(moved, tmp_path)
    assert "it goes on with other random numbers" in capsys.readouterr().out
    assert torch.equal(states[0], torch.Generator().manual_seed(10).get_state())


def test_each_process_takes_its_own_gpu(monkeypatch):
    chosen = []
    for place, name, answer in ((torch.cuda, "is_available", True), (torch.cuda, "device_count", 4), (ranks, "size", 4),
                                (dist, "is_nccl_available", True)):  # fmt: skip
        monkeypatch.setattr(place, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for local in (0, 3):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert select_device(no_cuda=False) == torch.device("cuda", local)
    assert chosen == [0, 3]


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_tf32_is_for_convolutions_as_for_products(precision):
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    for switch in switches:
        switch.allow_tf32 = precision != "tf32"
    with matrix_precision(precision):
        assert [switch.allow_tf32 for switch in switches] == 2 * [precision == "tf32"]
    assert not any(switch.allow_tf32 for switch in switches)


@pytest.mark.parametrize("own", [True, False])
def test_bf16_of_its_own(monkeypatch, tmp_path, own):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: own)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old GPU")
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert devices.settled_precision("auto", gpu) == ("bf16" if own else "fp32")
    if not own:
        with pytest.raises(InputError, match="bf16 is not known to an old GPU"):
            devices.settled_precision("bf16", gpu)
    (tmp_path / "cpuinfo").write_text("flags : avx2 avx512_bf16" if own else "flags : avx2 avx512f")
    monkeypatch.setattr(devices, "Path", lambda _: tmp_path / "cpuinfo")
    assert devices.settled_precision("auto", cpu) == ("bf16" if own else "fp32")


# --------------------------------------------------------------------------------------------------------------
# files


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a.csv"
    target.write_text("old")
    with pytest.raises(RuntimeError), files.replaced(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.csv"]
    files.write_bytes(target, b"new")
    assert target.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize("refused", ["fsync", "fchmod"])
def test_a_file_system_that_knows_no_fsync_or_chmod_will_do(tmp_path, monkeypatch, refused):
    def call(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, refused, call)
    files.write_bytes(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"


def test_a_full_disk_that_shows_at_the_fsync_is_an_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_bytes(tmp_path / "a", b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_is_found_wherever_it_lies(tmp_path):
    """A bit of each of 200 places; what loads all the same must be what was written."""
    path, state = tmp_path / "w.pt", {"weight": torch.arange(400.0), "bias": torch.ones(3)}
    save_weights(state, path)
    content, found = path.read_bytes(), 0
    for place in range(0, len(content), max(1, len(content) // 200)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        try:
            loaded = load_torch(path)
        except InputError as error:
            assert str(path) in str(error)
            found += 1
        else:
            assert all(torch.equal(loaded[name], value) for name, value in state.items()), place
    assert found > 100


def test_weights_load_with_and_without_the_prefix_of_a_wrapper(tmp_path):
    module, other = nn.Linear(2, 3), nn.Linear(2, 3)
    torch.save({f"module.{name}": value for name, value in module.state_dict().items()}, tmp_path / "w.pt")
    assert torch.equal(load_weights(other, tmp_path / "w.pt").weight, module.weight)
    save_weights(nn.Sequential(module).state_dict(), tmp_path / "w.pt")
    assert list(load_torch(tmp_path / "w.pt")) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "is missing"),
        (b"not a file of torch", "is damaged"),
        ({"weight": torch.zeros(3, 2)}, "bias is nothing"),
        ({"weight": torch.zeros(2, 2), "bias": torch.zeros(3)}, r"weight is \(2, 2\), expected \(3, 2\)"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "x": torch.zeros(1)}, "x is not a weight"),
        ([1, 2], "does not hold weights"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, content, message):
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=message) as caught:
        load_weights(nn.Linear(2, 3), path)
    assert str(path) in str(caught.value)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    torch.save(Evil(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="is damaged"):
        load_torch(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def test_args_json_names_what_a_run_was_made_with(run, tmp_path):
    assert run("--seed 3 --lr 0.005 --recipe fast", "m")[0] == 0
    stored = json.loads((tmp_path / "models/m/args.json").read_text())
    assert stored["lr"] == 0.005 and stored["init"] == "he" and stored["recipe"] == "fast" and stored["seed"] == 3
    assert stored["versions"]["torch"] == torch.__version__ and stored["device"].startswith("CPU")
    assert stored["train_seconds"] > 0 and stored["eval_seed"] != 3 and stored["finished"] is True
