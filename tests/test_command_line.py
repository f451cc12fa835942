"""What ends a script, whatever a user does: one line and an exit code."""

import argparse
import errno
import importlib
import os
import resource
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from running import directory, memory
from running.command_line import InputError, Parser, integer, place_of
from running.training import _StopSignals
from tests.scripts import exit_code, outcome

ROOT = Path(__file__).parents[1]


def shell(command, **environment):
    """(exit code, stdout, stderr) of a bash command in the repository's root; $PYTHON is this interpreter."""
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONUNBUFFERED": "", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, timeout=120)
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def raising(error):
    def main(argv):
        raise error

    return main


def too_large(*shape):
    def main(argv):
        parser = Parser("A script.")
        parser.flag("--batch-size", integer(1), "pairs", 1)
        parser.flag("--seed", integer(0), "seed", 1)
        torch.empty(shape) if len(shape) == 1 else np.empty(shape)

    return main


@pytest.mark.parametrize("main", [too_large(10**15), too_large(2**62), too_large(10**30), too_large(10**7, 10**8),
                                  too_large(10**15, 10**15), too_large(10**30, 1)])  # fmt: skip
def test_too_little_memory_is_one_line_with_the_flags_that_lower_the_need(capsys, main):
    code, _, err = outcome(capsys, main)
    assert (code, err.count("\n")) == (2, 1) and "too little memory" in err and "--batch-size" in err and "--seed" not in err


def test_too_little_memory_names_the_flags_that_were_given_and_the_way_on(capsys, monkeypatch, tmp_path):
    """What makes the experiment is named only where it was given; what a begun run is trained with takes --overwrite."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("main_numeric.NumericExperiment.__init__", lambda *_: torch.empty(10**15))
    main = importlib.import_module("main_numeric").main
    usual, wide = outcome(capsys, main, "--no-cuda")[2], outcome(capsys, main, "--no-cuda", "--semantics-n", 20, "--overwrite")[2]
    assert "lower --batch-size or --final-batch-size or --num-eval-batches;" in usual and "--overwrite starts it anew" in usual
    assert "--num-eval-batches or --semantics-n;" in wide and wide.count("\n") == usual.count("\n") == 1


def test_too_little_memory_says_how_much_was_asked_for(capsys):
    assert "(1,000,000.0 GiB at once)" in outcome(capsys, too_large(10**6 * 2**28))[2]
    assert "CPU with --no-cuda" in outcome(capsys, raising(torch.OutOfMemoryError("CUDA out of memory")))[2]


def test_the_machine_s_memory_ends_a_script_before_the_system_does():
    """In a process of its own: one that has had more memory before may keep it, and needs no more from the system."""
    code = (
        "import torch\nfrom running import command_line, memory\nmemory._group_limits = lambda: [2**29]\n"
        "memory.limit_memory()\ntorch.empty(2**25)\nprint('as before', flush=True)\n"
        "command_line.run_script(lambda: torch.empty(2**28))"
    )
    code, out, err = shell(f"$PYTHON -c {shlex.quote(code)}")
    assert (code, out) == (2, "as before\n") and "too little memory (1.0 GiB at once)" in err


@pytest.mark.parametrize(
    "module, flags",
    [
        ("main_numeric", "--no-cuda --num-eval-batches 10001"),
        ("main_numeric", "--no-cuda --train-steps 99999999999999999999999999999"),
        ("main_mpi3dreal", "--no-cuda --workers 99999999999999"),
        ("eval_numeric_predict", "--model-id m --num-eval-batches 99999999999"),
    ],
)
def test_a_number_past_all_bounds_is_refused_by_its_name(capsys, monkeypatch, tmp_path, module, flags):
    monkeypatch.chdir(tmp_path)
    code, _, err = outcome(capsys, importlib.import_module(module).main, *flags.split())
    flag, value = flags.split()[-2:]
    assert code == 2 and f"{flag}: {value} is too large, expected an integer of at most" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_latents_that_no_machine_holds_are_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_group_limits", lambda: [2**29])
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        flags = "--output-folder", tmp_path / "data", "--n-points", 2**31
        code, _, err = outcome(capsys, importlib.import_module("rendering_data.Causal3DIdent.generate_latents").main, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert code == 2 and "too little memory" in err and "--n-points" in err and err.count("\n") == 1
    assert not any((tmp_path / "data").glob("*.csv"))


def test_a_limit_too_low_for_the_imports_is_one_line():
    code, out, err = shell("ulimit -v 1000000; exec $PYTHON main_numeric.py --help")
    assert (code, out) == (2, "") and err.startswith("error: too little memory") and err.count("\n") == 1


def test_a_fault_of_the_program_keeps_its_traceback_and_says_what_is_safe(capsys):
    def main(argv):
        Parser("A script.").flag("--resume", bool, "go on")
        raise LookupError("unforeseen")

    code, _, err = outcome(capsys, main)
    lines = err.splitlines()
    assert code == 1 and "LookupError: unforeseen" in lines and lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: ") and "whole" in lines[-1] and "--resume" in lines[-1]


def test_ctrl_c_is_one_line_and_a_second_one_is_not_another(capsys):
    assert outcome(capsys, raising(KeyboardInterrupt())) == (130, "", "error: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path):
    """A module in the place of pandas says that the imports have begun, and takes its time."""
    (tmp_path / "pandas.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, ROOT / "main_mpi3dreal.py", "--help"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=30)[1], process.returncode) == ("error: interrupted\n", 130)


@pytest.mark.parametrize(("command", "environment", "code"), [
    ("$SPEAK 200000 | head -1; exit ${PIPESTATUS[0]}", {}, 141),
    ("$SPEAK >&-", {}, 0),
    ("$SPEAK 2>&-", {}, 0),
    ("$SPEAK 0<&- >&- 2>&-", {}, 0),
    ("$SPEAK nonsense 2>&-", {}, 2),
    ("{ sleep 0.2; $SPEAK nonsense; } 2>&1 | true; exit ${PIPESTATUS[0]}", {}, 2),
    ("$SPEAK $'m\xff'", {}, 0),
    ("$SPEAK", {"PYTHONIOENCODING": "ascii"}, 0),
    ("$SPEAK --help", {"PYTHONIOENCODING": "latin-1"}, 0),
    ("$SPEAK", {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, 0),
    ("$SPEAK --help", {"PYTHONOPTIMIZE": "2"}, 0),
])  # fmt: skip
def test_whatever_the_terminal_a_script_ends_quietly(tmp_path, command, environment, code):
    found, _, err = shell(command, SPEAK=speaker(tmp_path), **environment)
    assert (found, err) == (code, "")


@pytest.mark.parametrize("flags", ["", "--help"])
def test_a_full_disk_behind_stdout_is_one_line(tmp_path, flags):
    code, _, err = shell(f"$SPEAK {flags} > /dev/full", SPEAK=speaker(tmp_path))
    assert code == 2 and err.startswith("error: No space left on device") and err.count("\n") == 1


def speaker(folder):
    """Command of a script that writes to both streams, and fails if they are not there."""
    script = folder / "speak.py"
    script.write_text(
        textwrap.dedent(f"""\
        \"\"\"Speak of θ.\"\"\"
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from running.command_line import InputError, Parser, run_script
        def main():
            parser = Parser(__doc__)
            parser.add_argument("word", nargs="?", default="10")
            word = parser.parse()[0].word
            if word == "nonsense":
                raise InputError("nonsense: θ")
            for number in range(int(word) if word.isdigit() else 10):
                print(word, "I_θ", sys.stdout.isatty(), sys.stderr.isatty(), flush=number < 10)
        run_script(main)
    """)
    )
    return f"{sys.executable} {script}"


def test_a_model_whose_name_is_no_utf8_is_trained_and_evaluated(run, tmp_path):
    name = os.fsdecode(b"m\xff")
    code, _, err = run(model=name)
    assert (code, err) == (0, "") and (tmp_path / "models" / name / "results.csv").exists()
    assert run("--evaluate --seed 9", model=name)[0] == 0


def test_two_signals_at_one_moment_write_a_checkpoint():
    """As a terminal or a session that ends sends SIGHUP beside another; the handlers of both run between two lines."""
    both = {signal.SIGINT, signal.SIGHUP}
    with _StopSignals() as stop:
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
        for number in both:
            os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        assert stop.decided(False)[0] in both
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_errors_of_users_and_of_the_system_are_one_line(capsys):
    assert outcome(capsys, raising(InputError("two\nlines"))) == (2, "", "error: two lines\n")
    assert outcome(capsys, raising(OSError(28, "No space left on device", "f")))[2].count("\n") == 1
    assert exit_code(raising(BrokenPipeError())) == 141


def test_how_to_resume_can_be_pasted_into_a_shell():
    args = argparse.Namespace(model_dir="my models", model_id="it's $HOME")
    assert shlex.split(place_of(args)) == ["--model-dir", "my models", "--model-id", "it's $HOME"]


def test_the_commit_is_known_whoever_owns_the_repository(tmp_path, monkeypatch):
    git = "git -c user.name=x -c user.email=x@x.example"
    subprocess.run(f"git init -q && {git} commit -q --allow-empty -m x && mkdir running", shell=True, cwd=tmp_path, check=True)
    monkeypatch.setattr(directory, "__file__", str(tmp_path / "running" / "directory.py"))
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert len(directory.provenance(torch.device("cpu"))["git_commit"]) == 40


def test_the_limits_of_control_groups_are_read(tmp_path, monkeypatch):
    for name, text in (("proc/self/cgroup", "12:memory:/job/1\n5:cpu:/\n0::/user/job\n"),
                       ("sys/fs/cgroup/user/job/memory.max", "max"), ("sys/fs/cgroup/user/memory.max", "5000"),
                       ("sys/fs/cgroup/memory/job/memory.limit_in_bytes", "7000")):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "Path", lambda *parts: tmp_path.joinpath(*(part.lstrip("/") for part in parts)))
    assert sorted(memory._group_limits()) == [5000, 7000, float("inf")]


def test_what_others_hold_now_they_may_give_back(monkeypatch, tmp_path):
    texts = {
        "/proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 10 kB\nSwapFree: 0 kB\n",
        "/proc/self/status": "VmData:\t 50 kB\n",
    }
    (tmp_path / "group").write_text("")
    monkeypatch.setattr(memory, "_group_limits", lambda: [float("inf")])
    monkeypatch.setattr(memory, "Path", lambda name: type("P", (), {"read_text": lambda _: texts[name]})())
    limits = []
    monkeypatch.setattr(memory.resource, "setrlimit", lambda _, limit: limits.append(limit))
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (-1, -1))
    memory.limit_memory()
    assert limits == [(50 * 1024 + 450 * 1024, -1)]


def test_ENOMEM_of_the_system_is_too_little_memory(capsys):
    def main(argv):
        raise OSError(errno.ENOMEM, "Not enough space")

    code, _, err = outcome(capsys, main)
    assert code == 2 and err.startswith("error: too little memory") and err.count("\n") == 1


@pytest.mark.parametrize(
    "name, flags", [("omission_curve", "nothing"), ("block_directions", "nothing"), ("numeric_loss", "--pairs -3")]
)
def test_what_is_wrong_with_a_benchmark_s_words_is_one_line(capsys, monkeypatch, tmp_path, name, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *flags.split()])
    benchmark = importlib.import_module(f"benchmarks.{name}")
    code, _, err = outcome(capsys, lambda _: benchmark.main())
    assert code == 2 and err.count("\n") == 1 and flags.split()[-1] in err, err
