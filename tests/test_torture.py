"""The harness of torture/ finds what it is made to find: writers with planted faults break the promises that they must."""

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from torture.run import chosen
from torture.trials import Trial

ROOT = Path(__file__).resolve().parents[1]
# Each command makes a.txt and b.txt, or says that they are there; what `again` does is what the command does.
PLANTED = """
import contextlib, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from running.command_line import InputError
from running.files import locked, read_json, write_bytes, write_json
from torture import children, run, trials

LONG = b"x" * 5000

def sound(seed=1):
    with locked(Path("the.lock")):
        if read_json(Path("seed.json")) not in ({"seed": 0}, {"seed": seed}):
            raise InputError("seed.json is damaged, or of another seed")
        for file in Path().glob(".*"):
            file.unlink()
        write_json(Path("seed.json"), {"seed": seed})
        for name in ("a.txt", "b.txt"):
            write_bytes(Path(name), LONG + str(seed).encode())

def without_rename():
    for name in ("a.txt", "b.txt"):
        if not Path(name).exists():
            Path(name).write_bytes(LONG)

def leaving_temporaries():
    for name in ("a.txt", "b.txt"):
        temporary = Path(f".{name}.{os.getpid()}")
        temporary.write_bytes(LONG)
        temporary.rename(name)

def silent():
    with contextlib.suppress(OSError):
        sound()

def talkative():
    try:
        sound()
    except OSError as error:
        raise RuntimeError("not caught") from error

def deaf():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sound()

def trusting():
    write_bytes(Path("b.txt"), Path("seed.json").read_bytes())

def without_lock(seed):
    for name in ("a.txt", "b.txt"):
        write_bytes(Path(name), str(seed).encode())
        time.sleep(0.05 / seed)

def outcome(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "the.lock"}

def begin(folder):
    write_json(folder / "seed.json", {"seed": 0})

def task(function, *arguments):
    call = lambda: function(*arguments)
    return trials.Task(function.__name__, begin, call, call, outcome, reads=("*.json",))

children.preloaded()
work, rng = Path(sys.argv[2]).resolve(), random.Random(0)
tasks = [task(function) for function in (sound, without_rename, leaving_temporaries, silent, talkative, deaf, trusting)]
pairs = [(task(function, 1), task(function, 2)) for function in (sound, without_lock)]
run.AT_TIMES, run.DAMAGES, run.RACES = 1, 3, 4
run.held(run.planned(tasks, pairs, work, rng), work, 2)
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_planted_faults_are_found(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    environment = {name: value for name, value in os.environ.items() if name != "TORTURE_SHIM"}
    words = [sys.executable, str(tmp_path / "planted.py"), str(ROOT), str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert ended.returncode == 0, ended.stderr
    broken = {}
    for promise, task in re.findall(r"^NOT HELD (.*?): (\w+)", ended.stdout, re.MULTILINE):
        broken.setdefault(task, set()).add(promise)
    assert "sound" not in broken and "the harness failed" not in ended.stdout, ended.stdout
    expected = {
        "without_rename": {"killed at every file operation", "killed in the middle of a write"},
        "leaving_temporaries": {"killed at every file operation"},
        "silent": {"a full disk from a file operation on", "an I/O error at a file operation"},
        "talkative": {"a full disk from a file operation on", "an I/O error at a file operation"},
        "deaf": {"signalled at a file operation"},
        "trusting": {"damaged files"},
        "without_lock": {"two processes at once"},
    }
    assert [task for task, promises in expected.items() if not promises <= broken.get(task, set())] == [], broken
    tried, kept = re.search(r"^together +(\d+) +(\d+)", ended.stdout, re.MULTILINE).groups()
    assert int(tried) > 150 and int(kept) == int(tried) - ended.stdout.count("NOT HELD")


def test_a_small_run_tries_each_promise_of_each_task():
    found = [Trial(promise, task, str(number), None) for promise in "pq" for task in "ab" for number in range(5)]
    few = chosen(found, True, "", random.Random(0))
    assert sorted((trial.promise, trial.task) for trial in few) == [(promise, task) for promise in "pq" for task in "ab"]
    assert [trial.name for trial in chosen(found, False, "a: 3", None)] == ["a: 3", "a: 3"]
