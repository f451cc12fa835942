"""reproduce.py on a real SLURM cluster: .ci/slurm.sh starts one of one node where the machine allows it."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

REPOSITORY = Path(__file__).parent.parent
# Long enough to be cancelled in mid-run, small enough for any machine.
SMALL = "--batch-size 64 --final-batch-size 0 --train-steps 600 --log-steps 20 --num-eval-batches 1"
RESULTS = "results.csv"


def no_cluster():
    """Why there is no cluster to test on; empty if there is one that answers."""
    if not shutil.which("sbatch"):
        return "SLURM is not installed; .ci/slurm.sh start makes a cluster of one node, as root on Debian"
    answer = subprocess.run(["sinfo", "--noheader", "--format=%t"], capture_output=True, text=True)
    if answer.returncode:
        return f"SLURM does not answer: {answer.stderr.strip().splitlines()[-1]}"
    return "" if {"idle", "mix", "alloc"} & set(answer.stdout.split()) else "no node of the SLURM cluster is up"


WHY_NOT = no_cluster()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "there is a cluster")]


def squeue(job_id, field):
    """A field of a job in the queue, "" if it is not there."""
    command = ["squeue", "--noheader", "--array", f"--jobs={job_id}", f"--Format={field}"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def until(condition, seconds=120):
    """Wait until condition() is true and return what it says; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return answer


def reproduced(words, cwd):
    """reproduce.py in a process of its own, with the small models instead of the tiny ones."""
    code = (
        "import sys, reproduce\nfrom grids import jobs, numeric\n"
        f"numeric.FLAGS['tiny'] += ' {SMALL}'\n"
        "jobs.POLL_SECONDS = 1\n"
        "reproduce.run_script(lambda: reproduce.main(sys.argv[1:]))"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, "-c", code, *words.split()], cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose models "here" were trained on this machine, one thread each: another order of sums is another number."""
    folder = tmp_path_factory.mktemp("slurm")
    process = reproduced("run table5 --scale tiny --seeds 1 --jobs 2 --models here --cpus-per-job 1 --gpus-per-job 0", folder)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return folder


@pytest.mark.parametrize("how", ["scontrol requeue", "scancel --signal=USR2"])
def test_an_array_whose_one_job_is_cancelled_and_requeued_ends_with_the_results_of_the_local_run(folder, how):
    """scontrol: an administrator's requeue; USR2: what SLURM sends before the time limit, and submitit requeues."""
    models = how.split()[0]
    words = f"run table5 --scale tiny --seeds 1 --models {models} --cluster slurm --cpus-per-job 1 --gpus-per-job 0 --mem 1"
    process = reproduced(words, folder)
    name = "ind_select_3_perturb_1_seed1"
    record = folder / models / f"logs/numeric-tiny/{name}.job"
    until(record.exists)
    job_id = record.read_text().split()[0]
    assert "_" in job_id  # it is an array
    log = folder / models / f"logs/numeric-tiny/{name}.log"
    until(lambda: log.exists() and re.search(r"step +40/600", log.read_text()))
    subprocess.run([*how.split(), job_id], check=True)
    until(lambda: squeue(job_id, "RestartCnt") == "1")
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output + log.read_text()
    assert "resumed from step" in log.read_text()
    for directory in (folder / "here/numeric-tiny").iterdir():
        ours, theirs = (
            pd.read_csv(root / directory.name / RESULTS) for root in (directory.parent, folder / models / "numeric-tiny")
        )
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


def test_a_job_that_is_cancelled_for_good_is_listed_with_its_log_and_a_refusal_is_one_line(folder):
    words = "run table5 --scale tiny --seeds 1 --models cancelled --cluster slurm --cpus-per-job 1 --gpus-per-job 0 --mem 1"
    process = reproduced(words, folder)
    record = folder / "cancelled/logs/numeric-tiny/dep_select_3_perturb_1_seed1.job"
    until(record.exists)
    log = record.with_suffix(".log")
    until(lambda: log.exists() and "step  20/600" in log.read_text())  # SIGTERM in the job's imports would be passed over
    subprocess.run(["scancel", record.read_text().split()[0]], check=True)
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 2 and "1 of 2 models failed" in output
    assert "cancelled/logs/numeric-tiny/dep_select_3_perturb_1_seed1.log" in output
    process = reproduced(f"{words} --partition nowhere", folder)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and "error: SLURM refuses the jobs" in output.splitlines()[-1]
