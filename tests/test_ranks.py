"""Several processes make the model of one: the same samples, losses, gradients and weights; one line for what is wrong."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.distributed as dist

from running import ranks
from running.command_line import InputError
from running.devices import select_device
from running.directory import load_torch

ROOT = Path(ranks.__file__).parents[1]
# batches that neither two nor three divide
NUMERIC = ("--no-cuda --seed 3 --semantics-n 3 --modality-n 1 --theta-value 3 --beta-value 0 --batch-size 25 --train-steps 20 "
           "--log-steps 10 --num-eval-batches 1 --init he --lr 0.0003 --precision fp32")  # fmt: skip
IMAGES = ("--no-cuda --seed 3 --bias-id 1 --batch-size 13 --train-steps 20 --log-steps 10 --checkpoint-steps 8 --lr 0.0003 "
          "--precision fp32")  # fmt: skip
CASES = {
    "independent": ("numeric", NUMERIC),
    "batch": ("numeric", f"{NUMERIC} --recipe fast --final-batch-size 40 --lr 0.00001"),
    "both": ("mpi3d", f"{IMAGES} --recipe fast --optimiser muon --first-batch-size 17 --spare-dimensions 4 --floor"),
    "sigmoid": ("numeric", f"{NUMERIC} --loss sigmoid --lr 0.00001"),
    "sigmoid_images": ("mpi3d", f"{IMAGES} --loss sigmoid --lr 0.000002"),
    "supervised": ("mpi3d", f"{IMAGES} --supervised"),
    "cross": ("mpi3d", f"{IMAGES} --protocol paper"),
}
SECONDS = 300  # for what takes ten where nothing else runs


@pytest.fixture(autouse=True, scope="module")
def no_group():
    """The suite itself is one process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        yield


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def started(count, plan, torchrun=False):
    """Carry out a plan of several_processes.py in `count` processes; returns (exit codes, dict of the first's JSON, stderrs).

    With torchrun, exit code and stderr are its own.
    """
    command = ["-m", "tests.several_processes", json.dumps(plan)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    if torchrun:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        children = [subprocess.Popen([sys.executable, *launcher, *command], env=environment, **pipes)]
    else:
        shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        places = [{**shared, "RANK": rank, "LOCAL_RANK": rank} if count > 1 else {} for rank in range(count)]
        children = [
            subprocess.Popen([sys.executable, *command], env=environment | {k: str(v) for k, v in place.items()}, **pipes)
            for place in places
        ]
    try:
        outputs = [child.communicate(timeout=SECONDS) for child in children]
    finally:
        for child in children:
            child.kill()
    _, begun, seen = outputs[0][0].rpartition("\n{")  # nothing of it where the process was killed
    return [child.returncode for child in children], json.loads("{" + seen) if begun else {}, [err for _, err in outputs]


def weights(directory):
    names = [path.name for path in sorted(directory.glob("[fe]*_*.pt"))]
    assert len(names) == 2
    return {(name, key): value for name in names for key, value in load_torch(directory / name).items()}


def assert_alike(found, expected, tolerance=1e-5):
    """Each weight to the tolerance, and a tenth of it on average."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name} {text}")
        assert (found[name] - value).abs().double().mean() < tolerance / 10, name


@pytest.fixture(scope="module")
def models(tmp_path_factory, rendered_mpi3d):
    """Dict number of processes → (folder of the models of all CASES, what the first process saw)."""
    made = {}
    for count in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"of_{count}")
        plan = {
            name: {
                "script": script,
                "flags": f"{flags} --model-dir {folder} --model-id {name}"
                + (f" --datapath {rendered_mpi3d}" if script == "mpi3d" else ""),
            }
            for name, (script, flags) in CASES.items()
        }
        codes, seen, errors = started(count, plan, torchrun=count == 2)
        assert set(codes) == {0}, errors
        made[count] = folder, seen
    return made


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_several_processes_train_what_one_trains(models, case, count):
    (one, seen_by_one), (several, seen) = models[1], models[count]
    assert seen[case][0] == seen_by_one[case][0] == 0
    steps, expected = (torch.tensor(of[case][1], dtype=torch.float64) for of in (seen, seen_by_one))
    assert expected.shape == (20, 2) and expected.std(dim=0).min() > 0.01
    torch.testing.assert_close(steps, expected, rtol=5e-3, atol=1e-4)  # the loss, and the gradient in its length
    assert_alike(weights(several / case), weights(one / case))
    logs = [pd.read_csv(folder / case / "train_log.csv") for folder in (several, one)]
    pd.testing.assert_series_equal(logs[0].loss, logs[1].loss, rtol=1e-3, atol=1e-4)
    assert len(pd.read_csv(several / case / "results.csv")) == len(pd.read_csv(one / case / "results.csv"))
    assert json.loads((several / case / "args.json").read_text())["processes"] == count
    assert "processes" not in json.loads((one / case / "args.json").read_text())


def test_a_killed_process_ends_all_and_another_number_of_them_goes_on(models, tmp_path):
    script, flags = CASES["batch"]
    flags = f"{flags} --model-dir {tmp_path} --model-id m --log-steps 5"
    codes, _, (err,) = started(2, {"run": {"script": script, "flags": flags, "in_last": [13, "SIGKILL"]}}, torchrun=True)
    # nobody waited for ranks.SILENCE: the process was killed a few steps after the checkpoint of step 10
    assert codes != [0] and time.time() - (tmp_path / "m/checkpoint.pt").stat().st_mtime < 60
    assert err.count("error: another process of this run has ended") == 1, err
    assert "running/" not in err, err
    assert load_torch(tmp_path / "m/checkpoint.pt")["progress"]["step"] == 10
    flags = f"--model-dir {tmp_path} --model-id m --resume"
    codes, seen, errors = started(3, {"run": {"script": script, "flags": flags}})
    assert codes == [0, 0, 0] and len(seen["run"][1]) == 10, errors
    assert_alike(weights(tmp_path / "m"), weights(models[1][0] / "batch"))


def test_a_signal_to_one_process_stops_all_after_the_same_step(models, tmp_path):
    script, flags = CASES["both"]
    flags = f"{flags} --model-dir {tmp_path} --model-id m --datapath {datapath(models)}"
    codes, seen, errors = started(2, {"run": {"script": script, "flags": flags, "in_last": [2, "SIGTERM"]}})
    assert codes == [128 + signal.SIGTERM] * 2
    steps = len(seen["run"][1])
    assert 3 <= steps < 20 and load_torch(tmp_path / "m/checkpoint.pt")["progress"]["step"] == steps
    stopped = [line for err in errors for line in err.splitlines() if "stopped by" in line]
    assert len(stopped) == 1 and f"stopped by SIGTERM after step {steps} of 20" in stopped[0]
    assert "torchrun --standalone --nproc_per_node=2 " in stopped[0] and stopped[0].endswith("--model-id m --resume")
    codes, seen, errors = started(1, {"run": {"script": script, "flags": f"--model-dir {tmp_path} --model-id m --resume"}})
    assert codes == [0] and len(seen["run"][1]) == 20 - steps, errors
    assert_alike(weights(tmp_path / "m"), weights(models[1][0] / "both"))


def datapath(models):
    return json.loads((models[1][0] / "both/args.json").read_text())["datapath"]


def test_what_is_wrong_in_any_process_ends_all_with_one_line(tmp_path):
    flags = f"{NUMERIC} --model-dir {tmp_path} --model-id"
    (tmp_path / "file").touch()
    calls = {
        "other flags": ({"flags": f"{flags} a", "flags_of_last": "--lr 0.01"}, "process 2 has other flags than the first"),
        "other data": ({"flags": f"{flags} b", "in_last": {"data": "x"}}, "process 2 has other data than the first, x and None"),
        "no data": ({"flags": f"{flags} c", "in_last": "no data here"}, "process 2: no data here"),
        "too many": ({"flags": f"{flags} d --batch-size 2"}, "3 processes share a batch of 2 pairs"),
        "unknown flag": ({"flags": f"{flags} e --no-flag"}, "unrecognized arguments: --no-flag"),
        "a file there": ({"flags": f"{flags} file"}, "file is a file, expected the folder of a model"),
        "not finite": ({"flags": f"{flags} g --lr 1e30"}, "within the steps up to"),
        "fine": ({"flags": f"{flags} h --train-steps 1"}, None),
    }
    codes, seen, errors = started(3, {name: {"script": "numeric", **plan} for name, (plan, _) in calls.items()})
    assert codes == [0, 0, 0] and {name: code for name, (code, _) in seen.items()} == {
        name: 2 if message else 0 for name, (_, message) in calls.items()
    }
    said = [dict(re.findall(r"^call (.*?)\n(.*?)^code (?:0|2)\n", err, re.DOTALL | re.MULTILINE)) for err in errors]
    assert all(list(of) == list(calls) for of in said), errors
    for name, (_, message) in calls.items():
        lines = [line for of in said for line in of[name].splitlines()]
        assert len(lines) == (message is not None) and all(line.startswith("error: ") for line in lines), (name, lines)
        assert message is None or message in lines[0]
    assert {path.name for path in tmp_path.iterdir()} == {"file", "g", "h"}


def test_what_keeps_processes_from_joining_is_one_line(monkeypatch):
    def join(message, **environment):
        with monkeypatch.context() as patch, pytest.raises(InputError, match=message):
            for name, value in environment.items():
                patch.setenv(name, value)
            with ranks.joined():
                pass
        assert ranks.size() == 1

    join("LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not set: start", WORLD_SIZE="2", RANK="0")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        place = dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                     MASTER_PORT=str(taken.getsockname()[1]))  # fmt: skip
        join(f"127.0.0.1:{place['MASTER_PORT']} is taken by another program", **place)
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    join("no gloo", **place)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match="process 1 of this machine has no GPU of its own, for there are 1"):
        select_device(no_cuda=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(InputError, match="no NCCL"):
        select_device(no_cuda=False)
    assert select_device(no_cuda=True).type == "cpu"


def test_checkpoints_follow_the_time_in_several_processes_too(tmp_path):
    flags = f"{NUMERIC} --model-dir {tmp_path} --model-id m --log-steps 1000 --checkpoint-minutes 0.000001"
    started(2, {"run": {"script": "numeric", "flags": flags, "in_last": [18, "SIGKILL"]}})
    assert 0 < load_torch(tmp_path / "m/checkpoint.pt")["progress"]["step"] < 20


def test_processes_of_other_versions_do_not_train_together(tmp_path):
    flags = f"{NUMERIC} --model-dir {tmp_path} --model-id m"
    plan = {"script": "numeric", "flags": flags, "in_last": {"versions": {"torch": "0"}}}
    _, seen, errors = started(2, {"run": plan})
    assert seen["run"][0] == 2 and "process 1 has other versions than the first" in errors[0]
