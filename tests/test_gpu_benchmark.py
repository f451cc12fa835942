"""benchmarks/gpu.py as far as a CPU goes: sections run, fail or are skipped in one line, and the table is written.

CI runs all of them, by `make bench-small`.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def measure(*flags):
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--small", *map(str, flags)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_what_needs_a_gpu_is_skipped(tmp_path):
    done = measure("--only", "graph", "--output", tmp_path / "gpu.md")
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "gpu.md").read_text()
    assert "| graph | skipped: CUDA graphs need a GPU | |" in table and "FAILED" not in table


def test_a_section_that_fails_is_named_and_the_next_one_goes_on(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import subprocess\nreal = subprocess.run\n"
        "def run(command, *a, **k):\n"
        "    if 'benchmarks/numeric_step.py' in ' '.join(command): raise RuntimeError('no step today')\n"
        "    return real(command, *a, **k)\n"
        "subprocess.run = run\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = measure("--only", "step", "graph", "--output", tmp_path / "gpu.md")
    assert done.returncode == 2
    assert "| step | FAILED: RuntimeError: no step today | |" in (tmp_path / "gpu.md").read_text()
    assert "| graph | skipped" in (tmp_path / "gpu.md").read_text()
