"""Jobs of reproduce.py: the commands of one model each, run by submitit on this machine or on a SLURM cluster."""

import contextlib
import fcntl
import io
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import submitit

from running.command_line import InputError
from running.cores import usable_cores

# A job shall not need to import this module, wherever it runs.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
OF_TERMINALS = {signal.SIGINT, signal.SIGHUP}  # Ctrl-C, and a terminal or connection that is closed


class ModelJob:
    """What submitit runs: the commands of one model, one after another; returns the first exit code that is not 0.

    The commands are children of the job, because submitit's own handlers stand in the job's process and may interrupt
    any line of Python there. A child gets SIGTERM alone, writes its checkpoint and ends; --resume goes on from there.
    """

    def __init__(self, commands, log, lock, environment):
        self.commands, self.log, self.lock, self.environment = commands, log, lock, environment
        self.child, self.stopped, self.told = None, False, False

    def __call__(self):
        signal.signal(signal.SIGTERM, self.stop)
        with open(self.lock, "a") as lock, open(self.log, "a") as log:
            # An earlier job, whose submitter was killed, may still train this model: wait, then find the work done.
            while not self.stopped:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(1)
                except OSError:  # a file system without locks, where nothing can be waited for
                    break
            for command in self.commands:
                code = 128 + signal.SIGTERM if self.stopped else self.run(command, log, lock)
                if code:
                    if self.stopped and on_slurm():
                        # SLURM tells SIGTERM first, and submitit's signal or SIGKILL later: who ends is not requeued
                        time.sleep(90)
                    return code
        return 0

    def run(self, command, log, lock):
        """Run one command to its end; returns its exit code."""
        print("$", shlex.join(command), file=log, flush=True)
        self.told = False
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        # The lock is handed down, so that a child that outlives its job still holds it.
        own = {"start_new_session": True, "pass_fds": (lock.fileno(),), "preexec_fn": self.set_signals}
        self.child = subprocess.Popen(command, env=os.environ | self.environment, **streams, **own)
        while self.child.poll() is None:
            if self.stopped:
                self.tell()
            time.sleep(0.1)
        return self.child.returncode

    @staticmethod
    def set_signals():
        """Signals of a child: what is ignored or blocked is inherited through exec, and SLURM may signal every process."""
        # The training's handler gives the signal back as it was: a second SIGTERM shall not cut its checkpoint short.
        signal.signal(signal.SIGTERM, signal.SIG_IGN if on_slurm() else signal.SIG_DFL)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*OF_TERMINALS, signal.SIGTERM})

    def stop(self, *_):
        """Handler of SIGTERM: let run() tell the child, whichever line it is at."""
        self.stopped = True

    def tell(self):
        """Send the child SIGTERM, once: it writes its checkpoint and ends."""
        if not self.told:
            self.told = True
            os.kill(self.child.pid, signal.SIGTERM)

    def checkpoint(self):
        """The job to put into the queue again, its child stopped: submitit calls this on preemption and at the time limit."""
        # This runs within run(), at any of its lines: waitid leaves the exit code to Popen.
        with contextlib.suppress(AttributeError, ProcessLookupError, ChildProcessError):
            self.tell()
            for _ in range(600):
                if os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    break
                time.sleep(0.1)
            else:
                os.kill(self.child.pid, signal.SIGKILL)  # what it trained since its last checkpoint is trained again
        return submitit.helpers.DelayedSubmission(ModelJob(self.commands, self.log, self.lock, self.environment))


def on_slurm():
    """Whether this process is in a job on SLURM."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def make_job(model, commands, environment):
    """ModelJob of a model, with its folder of logs made."""
    model.log().parent.mkdir(parents=True, exist_ok=True)
    return ModelJob(commands, str(model.log()), str(model.log(".lock")), environment)


def threads(count, gpus=1):
    """Environment that gives each process of a job, one a GPU, its share of `count` threads."""
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(max(1, count // max(1, gpus))))


def run_here(work, options, ended):
    """Run the jobs of `work` (Model → commands) with submitit on this machine, options.jobs at a time.

    After each, ended(model, file of what went wrong in the job itself). Each has its share of the cores and GPUs of its own,
    shared if there are too few. InputError if one asks for more than all.
    """
    per_job, cores, gpus = options.gpus_per_job, usable_cores(), []
    if given := per_job and os.environ.get("CUDA_VISIBLE_DEVICES"):
        # as CUDA reads it: what follows a name of no device, as -1, is hidden
        gpus = list(itertools.takewhile(lambda name: not re.fullmatch(r"\s*(-.*|NoDevFiles|)\s*", name), given.split(",")))
    elif per_job:
        import torch  # seconds, which nothing else here needs

        gpus = list(map(str, range(torch.cuda.device_count())))
    if gpus and per_job > len(gpus):
        raise InputError(f"--gpus-per-job {per_job} is more than the {len(gpus)} of this machine")
    jobs = options.jobs or (len(gpus) // per_job if gpus else min(cores, 8))
    waiting, running, slots, told, turn = list(work.items()), [], [], [], itertools.cycle(gpus)
    for _ in range(min(jobs, len(work))):
        own = ",".join(itertools.islice(turn, per_job))
        # of the number that may run at a time, not of those left: a run that is resumed alone ends with the same bits
        slots.append(threads(options.cpus_per_job or cores // jobs, per_job) | {"CUDA_VISIBLE_DEVICES": own})
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:  # nohup's: the queue goes on without its terminal
            signal.signal(number, lambda number, _: told.append(number))  # as Ctrl-C, but never within submit
    try:
        while waiting or running:
            if told:
                raise KeyboardInterrupt
            if waiting and slots:
                (model, commands), slot = waiting.pop(0), slots.pop(0)
                executor = submitit.LocalExecutor(model.log().parent / "submitit")
                executor.update_parameters(timeout_min=10**6)  # no time limit
                # they reach every process of the terminal, and the jobs shall have one signal only: ours
                signal.pthread_sigmask(signal.SIG_BLOCK, OF_TERMINALS)
                running.append((executor.submit(make_job(model, commands, slot)), model, slot))
                signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_TERMINALS)
            for item in [item for item in running if item[0].done()]:
                running.remove(item)
                slots.append(item[2])
                ended(item[1], item[0].paths.stderr)
            time.sleep(0.1)
    except BaseException:
        print("stopping: the runs write their checkpoints; the same command goes on", file=sys.stderr, flush=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_TERMINALS)
        while jobs := [job for job, *_ in running if not job.done()]:
            for job in jobs:
                os.kill(int(job.job_id), signal.SIGTERM)  # to submitit's controller: cancel() would kill after a second
            time.sleep(1)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


POLL_SECONDS = 5  # between two looks into SLURM's queue
ABSENCES, LONG_ABSENCES = 2, 12  # looks in vain until a job is gone: if sacct says that it has ended, and if sacct says nothing
# States of a job that has not ended, in sacct's words.
LIVING = {"PENDING", "RUNNING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "STOPPED", "SIGNALING", "CONFIGURING", "COMPLETING",
          "RESIZING", "STAGE_OUT"}  # fmt: skip


def slurm_says(*command):
    """What a command of SLURM prints, or None if it does not answer."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return answer.stdout if answer.returncode == 0 else None
    return None


def look_for_jobs(absences):
    """(there, gone): sets of the ids of jobs that SLURM has, and that it has no more; the others are to be looked for again.

    absences: dict id → looks in vain so far, which is updated. A queue that does not answer says nothing of any job, and one
    that answers without a job may be wrong: a job is requeued, the controller has just started. sacct is asked then.
    """
    queue = slurm_says("squeue", "--me", "--noheader", "--array", "--format=%i")
    if queue is None:
        return set(), set()
    states = dict.fromkeys(queue.split(), "RUNNING")
    if absent := absences.keys() - states.keys():
        numbers = ",".join(sorted({job_id.partition("_")[0] for job_id in absent}))
        told = slurm_says("sacct", "--format=JobID,State", "--parsable2", f"--jobs={numbers}") or ""
        states |= {job_id: row["State"] for job_id, row in submitit.SlurmJob.watcher.read_info(told).items() if job_id in absent}
    there = {job_id for job_id in absences if states.get(job_id) in LIVING}
    absences.update({job_id: 0 if job_id in there else count + 1 for job_id, count in absences.items()})
    enough = {job_id: ABSENCES if job_id in states else LONG_ABSENCES for job_id in absences}
    return there, {job_id for job_id, count in absences.items() if count >= enough[job_id]}


def jobs_of_earlier_calls(records):
    """Dict id → Model of those of `records`, such a dict, that SLURM still has. InputError if it says nothing of them."""
    found, absences = {}, dict.fromkeys(records, 0)
    for look in range(LONG_ABSENCES):
        if not absences:
            return found
        if look:
            time.sleep(POLL_SECONDS)
        there, gone = look_for_jobs(absences)
        found |= {job_id: records[job_id] for job_id in there}
        absences = {job_id: count for job_id, count in absences.items() if job_id not in there | gone}
    if absences:
        raise InputError("squeue does not answer, and jobs of an earlier call may be in the queue: nothing was submitted")
    return found


def scripts(commands):
    """Names of the scripts that the commands (lists of words) run."""
    return [Path(word).name for command in commands for word in command if word.endswith(".py")]


def run_on_slurm(work, options, ended):
    """Run the jobs of `work` (Model → commands) as an array on SLURM, options.jobs at a time; `ended` as of `run_here`.

    What an earlier call left in the queue is waited for, not submitted again, unless it does not run all that is wanted now: the
    new job begins when that ends. Raises InputError if SLURM refuses.
    """
    cpus, folder = options.cpus_per_job or 4, Path(options.models) / "logs/submitit"
    environment = threads(cpus, options.gpus_per_job) | ({} if options.gpus_per_job else {"CUDA_VISIBLE_DEVICES": ""})
    earlier = {}
    for model in [model for model in work if model.log(".job").exists()]:
        job_id, *runs = model.log(".job").read_text().split() or [""]  # of earlier versions it names no scripts
        if re.fullmatch(r"\d+(_\d+)?", job_id) and (not runs or {*scripts(work[model])} <= {*runs}):
            earlier[job_id] = model
    waiting = jobs_of_earlier_calls(earlier)
    queued = set(waiting.values())
    new = {model: make_job(model, commands, environment) for model, commands in work.items() if model not in queued}
    if waiting:
        print(f"{len(waiting)} jobs of an earlier call are in the queue still")
    if new:
        first = next(iter(new))
        executor = submitit.SlurmExecutor(folder, max_num_timeout=10**6)
        asked = {"job_name": first.setting.folder, "time": options.time, "mem": f"{int(options.mem * 1024)}MB"}
        asked |= {"cpus_per_task": cpus, "array_parallelism": options.jobs or 32, "additional_parameters": {"requeue": True}}
        asked["wckey"] = None  # submitit has one of its own, which clusters may refuse; SBATCH_WCKEY names another
        chosen = {"gpus_per_node": options.gpus_per_job, "partition": options.partition}
        executor.update_parameters(**asked, **{name: value for name, value in chosen.items() if value})
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what sbatch says, which the error tells as well
                jobs = executor.submit_array(list(new.values()))
        except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError, OSError) as error:
            reason = [line for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
            raise InputError(f"SLURM refuses the jobs: {reason[-1]}") from None
        for model, job in zip(new, jobs, strict=True):
            model.log(".job").write_text(f"{job.job_id} {' '.join(scripts(work[model]))}\n")
            waiting[job.job_id] = model
        array = f"submitted {len(jobs)} jobs as {jobs[0].job_id.split('_')[0]}"
        print(f"{array}; Ctrl-C leaves them in the queue, the same command waits for them again", flush=True)
    absences = dict.fromkeys(waiting, 0)
    while waiting:
        time.sleep(POLL_SECONDS)
        for job_id in look_for_jobs(absences)[1]:
            del absences[job_id]
            ended(waiting.pop(job_id), submitit.core.utils.JobPaths(folder, job_id).stderr)
