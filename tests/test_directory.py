"""A model directory: one process at a time, no file of another run, and an evaluation that is there whole or not at all."""

import errno
import fcntl
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import pandas as pd
import pytest
import torch

import eval_numeric_predict as downstream
from main_numeric import NumericExperiment
from running import directory as store
from running import lock, staging, training
from running.command_line import InputError
from running.lock import occupied
from tests.scripts import Killed, contents
from tests.test_eval_numeric_predict import predict  # noqa: F401
from tests.test_main_numeric import fails, trained  # noqa: F401
from tests.test_training import killed_after, outcome, start, wait_for

FLAGS = "--seed 3 --preconditioner inputs --lr 0.001"
OPERATIONS = ((os, "replace"), (os, "unlink"), (os, "fsync"), (os, "mkdir"), (os, "rmdir"), (tempfile, "mkstemp"),
              (pathlib.Path, "write_bytes"))  # fmt: skip


def again(run, flags):
    """--evaluate, --resume and the like: the flags are those of args.json."""
    return run(flags, base="--no-cuda")


def edit(directory, **changes):
    stored = json.loads((directory / "args.json").read_text())
    (directory / "args.json").write_text(json.dumps({**stored, **changes}))


@pytest.fixture
def unfinished(run, tmp_path, monkeypatch):
    """Directory of a run that was killed after 25 of 40 steps, a checkpoint every 10."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 25)
        run(FLAGS)
    return tmp_path / "models/m"


# --------------------------------------------------------------------------------------------------------------
# one process at a time


@pytest.mark.parametrize("flags", ["--seed 8", "--seed 8 --overwrite", "--resume", "--evaluate --seed 8"])
def test_a_second_process_gives_way_and_touches_nothing(run, trained, predict, flags):  # noqa: F811
    directory, _ = trained
    with occupied(directory):
        before = contents(directory)
        words = f"{directory} is in use by process {os.getpid()} on {socket.gethostname()}"
        fails(run, flags, words)
        assert contents(directory) == before
        code, _, err = predict([directory])
        assert code == 2 and err.count("\n") == 1 and words in err and contents(directory) == before
    assert not (directory / lock.LOCK).exists() and run("--resume")[0] == 0


def test_the_lock_ends_with_its_process(tmp_path, run):
    """Of two processes at once one trains to its end; a killed one leaves a file that keeps nobody out."""
    process = start(tmp_path / "models", "--model-id", "m", "--train-steps", "100000", "--log-steps", "7")
    wait_for(tmp_path / "models/m/checkpoint.pt", process)
    fails(run, "--seed 8 --overwrite", f"in use by process {process.pid} on ")
    process.kill()
    process.communicate()
    assert (tmp_path / "models/m" / lock.LOCK).exists()
    assert run("--seed 8 --overwrite")[0] == 0
    assert not list((tmp_path / "models/m").glob(".*"))


def test_the_lock_that_another_user_left_is_named(tmp_path, monkeypatch):
    with occupied(tmp_path / "m"):
        (tmp_path / "m/file").touch()
    (tmp_path / "m" / lock.LOCK).touch()

    def refused(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(lock.os, "open", refused)
    with pytest.raises(PermissionError) as caught, occupied(tmp_path / "m"):
        pass
    assert caught.value.filename == str(tmp_path / "m" / lock.LOCK)


def test_of_two_runs_that_take_the_same_fresh_name_the_second_takes_the_next(run, tmp_path, monkeypatch):
    """Between the look for a name and the lock another run may take it."""
    names, fresh = [], store.fresh_id

    def late(model_dir, name):
        names.append(name if not names else fresh(model_dir, name))
        return names[-1]

    monkeypatch.setattr(store, "fresh_id", late)
    assert run("--seed 3", None)[0] == 0
    first = names.pop()
    with occupied(tmp_path / "models" / first):
        assert run("--seed 3", None)[0] == 0
    assert names == [first, f"{first}-2"] and (tmp_path / "models" / names[1] / "results.csv").exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_locks_a_process_of_this_host_that_runs_is_respected(tmp_path, monkeypatch, code):
    def refused(*_):
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", refused)
    words = f"in use by process {os.getpid()} on"
    with occupied(tmp_path / "m"), pytest.raises(InputError, match=words), occupied(tmp_path / "m"):
        pass
    assert not (tmp_path / "m").exists(), "it was made for the lock, and is empty"
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    began = lock._began(ended.pid)
    ended.wait()
    host, mine = socket.gethostname(), os.getpid()
    for left in (f"{host} {ended.pid} {began}", f"elsewhere {mine} {lock._began(mine)}", f"{host} {mine} 1", "", "x", "a ../b c"):
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / lock.LOCK).write_text(left)
        with occupied(tmp_path / "m"):
            (tmp_path / "m/file").touch()
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["file"]


def test_a_process_that_has_ended_and_is_not_waited_for_holds_no_lock():
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert lock._began(ended.pid) == "never"
    ended.wait()


def test_a_lock_whose_file_is_removed_before_it_is_taken_is_made_anew(tmp_path, monkeypatch):
    real, taken = lock._take, []

    def late(descriptor):
        if not taken:
            (tmp_path / "m" / lock.LOCK).unlink()  # as its last holder does
        taken.append(descriptor)
        return real(descriptor)

    monkeypatch.setattr(lock, "_take", late)
    with occupied(tmp_path / "m"), pytest.raises(InputError, match="is in use by process"), occupied(tmp_path / "m"):
        pass
    assert len(taken) == 3


# --------------------------------------------------------------------------------------------------------------
# one run


@pytest.mark.parametrize("name", ["f_x.pt", "g_x.pt"])
def test_weights_of_another_model_are_refused(run, trained, predict, tmp_path, name):  # noqa: F811
    directory, _ = trained
    assert run("--seed 2", "other")[0] == 0
    (directory / name).write_bytes((tmp_path / "models/other" / name).read_bytes())
    before = contents(directory)
    for code, _, err in (again(run, "--evaluate --seed 5"), predict([directory]), again(run, f"--export-official {tmp_path}/e")):
        assert code == 2 and err.count("\n") == 1 and f"{name} is not of this run" in err
    assert contents(directory) == before


@pytest.mark.parametrize("name", ["g_x.pt", "checkpoint.pt"])
def test_files_of_another_run_are_refused_by_a_resume(run, unfinished, tmp_path, name):
    assert run(FLAGS.replace("3", "2", 1), "other")[0] == 0
    (unfinished / name).write_bytes((tmp_path / "models/other" / name).read_bytes())
    fails(run, "--resume", f"{name} is not ", base="--no-cuda")


@pytest.mark.parametrize("flag, value", [("seed", 4), ("lr", 0.5), ("batch_size", 18), ("train_steps", 60), ("theta_value", 4)])
def test_a_checkpoint_of_other_flags_is_refused(run, unfinished, flag, value):
    edit(unfinished, **{flag: value})
    fails(run, "--resume", f"{value}; restore either", base="--no-cuda")


def test_what_does_not_say_of_which_run_it_is_is_taken_as_it_is(run, unfinished, tmp_path):
    stored = json.loads((unfinished / "args.json").read_text())
    for name in ("weights", "checkpoint_minutes"):
        stored.pop(name)
    (unfinished / "args.json").write_text(json.dumps(stored))
    content = store.load_torch(unfinished / "checkpoint.pt")
    content.pop("run")
    store.save_torch(content, unfinished / "checkpoint.pt")
    assert again(run, "--resume")[0] == 0
    assert run(FLAGS, "whole")[0] == 0
    assert outcome(unfinished) == outcome(tmp_path / "models/whole")


def spoiled(content, kind):
    weights, progress = content["modules"]["f_x"], content["progress"]
    name = next(iter(weights))
    if kind == "number":
        content["modules"]["f_x"] = dict(enumerate(weights.values()))
    elif kind == "sparse":
        weights[name] = weights[name].to_sparse()
    elif kind == "sparse moments":
        content["optimiser"]["momentum"][0] = content["optimiser"]["momentum"][0].to_sparse()
    elif kind == "scalar moments":
        content["optimiser"]["momentum"][0] = torch.tensor(0.0)
    elif kind == "preconditioner":
        content["preconditioner"] = {}
    elif kind == "log":
        progress["log"] = {}
    else:
        progress["step"] = kind
    return content


def test_what_cannot_be_a_checkpoint_is_one_line(run, unfinished):
    whole = (unfinished / "checkpoint.pt").read_bytes()
    (unfinished / "checkpoint_before.pt").unlink()
    kinds = ("number", "sparse", "sparse moments", "scalar moments", "preconditioner", "log")
    for kind in (*kinds, 10**9, 41, 0, "7", 7.0, True, None):
        (unfinished / "checkpoint.pt").write_bytes(whole)
        store.save_torch(spoiled(store.load_torch(unfinished / "checkpoint.pt"), kind), unfinished / "checkpoint.pt")
        fails(run, "--resume", "checkpoint.pt", base="--no-cuda")


def test_args_json_with_a_record_of_another_kind(run, trained, predict):  # noqa: F811
    directory, _ = trained
    whole = (directory / "args.json").read_bytes()
    for changes in ({"finished": "false"}, {"downstream": None}, {"downstream": []}, {"eval_seed": "a/b"}, {"seed": 1.0},
                    {"files": 1}, {"weights": []}, {"machines": "x"}):  # fmt: skip
        (directory / "args.json").write_bytes(whole)
        edit(directory, **changes)
        before = contents(directory)
        for flags in ("--evaluate --seed 5", "--resume"):
            fails(run, flags, "args.json is damaged", base="--no-cuda")
        code, _, err = predict([directory])
        assert code == 2 and err.count("\n") == 1 and "args.json is damaged" in err and contents(directory) == before


def test_a_fifo_in_place_of_earlier_results_is_not_waited_for(run, trained):  # noqa: F811
    directory, _ = trained
    (directory / "results.csv").unlink()
    os.mkfifo(directory / "results.csv")
    fails(run, "--evaluate --seed 5", "results.csv is no regular file", base="--no-cuda")


def test_results_of_an_unknown_evaluation_are_not_replaced(run, trained):  # noqa: F811
    """A flipped bit in the name of its seed: under which name would a further evaluation keep them?"""
    directory, _ = trained
    file = directory / "args.json"
    file.write_text(file.read_text().replace('"eval_seed"', '"ev!l_seed"'))
    before = contents(directory)
    fails(run, "--evaluate --seed 5", "args.json is damaged: it has the results of an evaluation and not its 'eval_seed'",
          base="--no-cuda")  # fmt: skip
    assert contents(directory) == before


def test_a_third_machine_is_compared_with_the_second(tmp_path, capsys):
    def machine(threads):
        return {"device": f"CPU x, {threads} threads", "cpu_capability": "AVX2", "kernels": "default kernels", "versions": {}}

    stored = {**machine(1), "machines": [machine(1), machine(2)]}
    assert store.check_machine(tmp_path, stored, machine(2), False) == {"machines": [machine(1), machine(2)]}
    assert capsys.readouterr().out == ""
    assert store.check_machine(tmp_path, stored, machine(1), False)["machines"][2:] == [machine(1)]
    assert "CPU x, 2 threads, now CPU x, 1 threads" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------
# checkpoints


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:999])])
def test_the_checkpoint_before_the_last_takes_its_place(run, unfinished, tmp_path, damage):
    """Killed once more, it is still there; the run ends with the bits of one that nothing happened to."""
    damage(unfinished / "checkpoint.pt")
    code, out, err = again(run, "--resume --log-steps 11")
    assert code == 0 and out.count("checkpoint_before.pt takes its place") == 1 and "resumed from step 10 of 40" in out, err
    assert "checkpoint_before.pt" not in contents(unfinished), "a finished run needs it no more"
    assert run(FLAGS, "whole")[0] == 0
    assert outcome(unfinished)[:2] == outcome(tmp_path / "models/whole")[:2]


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_one_before(run, unfinished, monkeypatch):
    (unfinished / "checkpoint.pt").write_bytes(b"")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 3)
        again(run, "--resume")
    assert store.load_torch(unfinished / "checkpoint.pt")["progress"]["step"] == 10
    assert again(run, "--resume")[0] == 0


def test_checkpoints_follow_the_time_as_well(run, tmp_path, monkeypatch):
    """Long steps between two lines: a checkpoint after each minute, and neither the numbers nor the log differ."""
    steps, real = [], training.save_checkpoint
    monkeypatch.setattr(training, "save_checkpoint",
                        lambda content, path: (steps.append(content["progress"]["step"]), real(content, path)))  # fmt: skip
    assert run("--seed 3 --log-steps 15", "plain")[0] == 0
    assert steps == [15, 30, 40]
    steps.clear()
    seconds = iter(range(0, 10**6, 4))
    with monkeypatch.context() as patch:
        patch.setattr(training.time, "perf_counter", lambda: next(seconds))
        assert run("--seed 3 --log-steps 15 --checkpoint-minutes 0.5", "often")[0] == 0
    assert {15, 30, 40} < set(steps) and len(steps) > 4
    assert outcome(tmp_path / "models/often") == outcome(tmp_path / "models/plain")


def test_args_json_that_is_lost_while_training_is_written_whole(run, tmp_path, monkeypatch):
    real = NumericExperiment.evaluate

    def lost(model, seed):
        (tmp_path / "models/m/args.json").unlink()
        return real(model, seed)

    with monkeypatch.context() as patch:
        patch.setattr(NumericExperiment, "evaluate", lost)
        assert run("--seed 1")[0] == 0
    assert again(run, "--evaluate --seed 5")[0] == 0
    assert json.loads((tmp_path / "models/m/args.json").read_text())["seed"] == 1


# --------------------------------------------------------------------------------------------------------------
# what --overwrite gives up


def test_overwrite_removes_what_the_scripts_write_and_nothing_else(run, trained, predict):  # noqa: F811
    directory, _ = trained
    assert again(run, "--evaluate --seed 5")[0] == 0 and predict([directory])[0] == 0
    own = set(contents(directory))
    assert {"results_seed2.csv", "results_predict.csv", "downstream.png"} < own
    mine = ["notes.csv", "results_mine.csv", "f_x_best.pt", "plot.png", ".hidden.csv", "results_seed2.csv.bak", "encoder_img.pt"]
    for name in mine:
        (directory / name).write_text("mine")
    assert run("--seed 2 --overwrite")[0] == 0
    after = contents(directory)
    assert all(after.pop(name) == b"mine" for name in mine)
    assert {"results.csv", "results.png", "args.json", "f_x.pt"} < set(after) < own
    assert not any(name.startswith(("results_", "downstream")) for name in after)


@pytest.mark.parametrize("content", ["{}", '{"name": "npm", "seed": 3}', '{"bias_type": "selection", "seed": 1}'])
def test_overwrite_leaves_a_folder_that_holds_no_model_of_the_script(run, tmp_path, content):
    directory = tmp_path / "models/m"
    directory.mkdir(parents=True)
    for name in ("args.json", "results.csv", "f_x.pt"):
        (directory / name).write_text(content)
    before = contents(directory)
    fails(run, "--seed 1 --overwrite", "args.json has no ")
    assert contents(directory) == before


@pytest.mark.parametrize("name", ["", ".", "..", "/tmp/elsewhere", "a/../..", "a/../b"])
def test_a_model_id_does_not_lead_out_of_the_models(run, tmp_path, name):
    fails(run, "--seed 1 --overwrite", "names no folder inside --model-dir", model=name)
    assert not (tmp_path / "models").exists()


def test_a_removal_that_fails_halfway_does_not_say_that_nothing_is_lost(run, trained, monkeypatch):  # noqa: F811
    real = pathlib.Path.unlink

    def failing(path, *arguments, **options):
        if path.name == "f_x.pt":
            raise OSError(errno.EIO, "Input/output error", str(path))
        real(path, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "unlink", failing)
    code, _, err = run("--seed 2 --overwrite")
    assert code == 2 and err.count("\n") == 1 and "removed in part" in err and "has been lost" not in err


# --------------------------------------------------------------------------------------------------------------
# whole or not at all


def stopped_at(monkeypatch, number, error):
    """Have operation `number` on files raise `error`; a killed process does nothing more: all that follow do, too."""
    count = iter(range(10**6))

    def failing(real):
        def attempt(*arguments, **options):
            if arguments[:1] and str(arguments[0]).endswith(lock.LOCK):  # which goes with its process
                return real(*arguments, **options)
            at = next(count)
            if at == number or (at > number and error is Killed):
                raise error() if error is Killed else OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **options)

        return attempt

    for place, name in OPERATIONS:
        monkeypatch.setattr(place, name, failing(getattr(place, name)))
    return count


@pytest.mark.parametrize("error", [Killed, OSError])
@pytest.mark.parametrize("what", ["evaluation", "downstream"])
def test_an_evaluation_is_there_whole_or_not_at_all(run, trained, predict, monkeypatch, what, error):  # noqa: F811
    """Stopped at every operation on files: to the next reader all is as it was, or as if nothing had happened."""
    directory, _ = trained

    def evaluate(seed):
        if what == "evaluation":
            return again(run, f"--evaluate --seed {seed}")
        return predict([directory], f"--overwrite --seed {seed}")

    def state():
        found = contents(directory)
        found["args.json"] = {k: v for k, v in json.loads(found["args.json"]).items() if "seconds" not in k}
        found["args.json"].get("downstream", {}).pop("seconds", 0)
        return found

    # scores that cost nothing
    def scored(experiment, seed):
        experiment.evaluated = {"test": {"hz_x": torch.eye(3), "hz_t": torch.eye(3)}}
        return pd.DataFrame({"r2_linear": [seed]})

    def shown(experiment, results, path, references):
        path.write_bytes(str(results.r2_linear[0]).encode())

    monkeypatch.setattr(NumericExperiment, "evaluate", scored)
    monkeypatch.setattr(NumericExperiment, "show", shown)
    monkeypatch.setattr(downstream, "encode", lambda experiment, batches, generator, *_: generator.initial_seed())
    monkeypatch.setattr(downstream, "score_tasks", lambda fit, *_: ({"y1": fit}, {"iid": fit, "ood": fit}))
    assert evaluate(7)[0] == 0
    before = contents(directory)
    assert evaluate(8)[0] == 0
    expected, outcomes = state(), set()
    for number in range(100):
        for name in contents(directory).keys() - before.keys():
            (directory / name).unlink()
        for name, content in before.items():
            (directory / name).write_bytes(content)
        as_before = state()
        with monkeypatch.context() as patch:
            count = stopped_at(patch, number, error)
            try:
                code = evaluate(8)[0]
            except Killed:
                code = "killed"
            ended = next(count) <= number
        if ended:
            break
        staging.settle(directory)
        found = {name: content for name, content in state().items() if not name.startswith(".")}
        assert found in (as_before, expected), (number, code)
        outcomes.add(found == expected)
        assert evaluate(8)[0] == 0 and state() == expected, number
    assert number > 10 and outcomes == {True, False}
