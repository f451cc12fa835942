import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "time_to_identification.py"
SMALL = (
    "--no-cuda --semantics-n 3 --modality-n 1 --theta-value 3 --batch-size 16 --final-batch-size 0 --train-steps 40 "
    "--num-eval-batches 1 --mlp-eval --probes fast"
)


def measure(tmp_path, *flags):
    """CompletedProcess of the benchmark, started as a shell starts a script in the background: SIGINT is ignored."""
    command = [sys.executable, BENCHMARK, *flags, "--output", tmp_path / "curve"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))  # fmt: skip


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--minutes 0.001", "main_numeric.py --recipe fast did not come to a line of its log in 0.001 minutes"),
        ("--theta-value 99999", "99999"),
    ],
)
def test_what_gives_no_curve_is_one_line(tmp_path, flags, message):
    process = measure(tmp_path, *flags.split())
    assert process.returncode == 2
    assert message in process.stderr and process.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_curve_has_every_recipe(tmp_path):
    process = measure(tmp_path, "--minutes", "4", "--jobs", "2", *SMALL.split())
    assert process.returncode == 0, process.stderr
    curve = pd.read_csv(tmp_path / "curve.csv")
    assert curve.groupby("recipe").step.max().to_dict() == {"fast": 40, "paper": 40, "wide": 40}
    assert curve.worst.le(curve["mean"]).all()
    assert (tmp_path / "curve.png").exists() and "2 of 3 semantics selected" in process.stdout
