"""Processes that are stopped, signalled or failed at an exact place: children forked from one that has imported everything.

A child runs a Python function as a script would, in a folder of its own, and costs a fraction of a second. `shim.c`, loaded in
front of the C library, counts what it does to the files below that folder and meets it there with a Fault.
"""

import contextlib
import ctypes
import dataclasses
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from running.command_line import run_script

KINDS = {"kill": 1, "half": 2, "signal": 3, "fail": 4, "full": 5, "nolock": 6}  # of shim.c
LIMIT = 300  # seconds after which a child hangs
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to a child, at its file operation `at`, counted from 0, or after `seconds`.

    kind: "kill", before the operation; "half", the same, but in the middle of a write; "signal" `number`; "fail", that one with
    the errno `number`; "full", all from there on that take space; "nolock", flock everywhere.
    """

    kind: str
    number: int = signal.SIGKILL
    at: int = 0
    seconds: float | None = None

    def __str__(self):
        name = signal.Signals(self.number).name if self.kind in ("kill", "half", "signal") else errno.errorcode[self.number]
        when = f"after {self.seconds:.3f} s" if self.seconds is not None else f"at operation {self.at}"
        return f"{self.kind} {name} {when}"


def preloaded():
    """Start this script anew with the shim in front of the C library and one thread; False where there is no compiler."""
    if "TORTURE_SHIM" in os.environ:
        return bool(os.environ["TORTURE_SHIM"])
    shim, environment = Path(tempfile.mkdtemp(prefix="torture-shim-")) / "shim.so", dict.fromkeys(THREADS, "1")
    command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(shim), str(Path(__file__).with_name("shim.c")), "-ldl"]
    compiled = shutil.which("cc") and subprocess.run(command, capture_output=True).returncode == 0
    environment |= {"TORTURE_SHIM": str(shim), "LD_PRELOAD": str(shim)} if compiled else {"TORTURE_SHIM": ""}
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment)


def start(call, folder, fault=None, trace=None, said=None):
    """Fork a child that runs call() in `folder` as a script runs its main; returns its pid.

    trace: a file that gets a line for each of its file operations; said: its stdout and stderr go to said.out and said.err,
    those of the folder's name unless it is given.
    """
    begun, begins = os.pipe()
    if pid := os.fork():
        os.close(begins)
        os.read(begun, 1)  # before that, the child is the harness and not the script
        os.close(begun)
        return pid
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        for number, suffix in ((1, "out"), (2, "err")):
            target = os.open(f"{said or folder}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(target, number), os.close(target)
        sys.stdin = None
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w"), "utf-8", write_through=True) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if trace or (fault and fault.seconds is None):
            descriptor = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) if trace else -1
            kind, number, at = (KINDS[fault.kind], fault.number, fault.at) if fault else (KINDS["kill"], 0, -1)
            ctypes.CDLL(None).arm(os.fsencode(folder), kind, number, ctypes.c_long(at), descriptor)
            os.environ |= {"TORTURE_FOLDER": str(folder), "TORTURE_FAULT": f"{kind} {number} {at}"}  # of what it starts

        def main():
            os.close(begun), os.close(begins)
            return call()

        run_script(main)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(code)


def wait(pid, fault=None):
    """Exit code of a child, minus the signal's number where one ended it; it gets the Fault's signal after its seconds."""
    began, due = time.monotonic(), fault.seconds if fault and fault.seconds is not None else None
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - began
        if due is not None and passed >= due:
            os.kill(pid, fault.number)
            due = None
        if passed > LIMIT:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001 if due is not None and due - passed < 0.02 else 0.005)


def run(call, folder, fault=None, trace=None):
    """(exit code, stderr) of a child that runs call() in `folder` and meets a Fault, if there is one."""
    code = wait(start(call, folder, fault, trace), fault)
    return code, Path(f"{folder}.err").read_text(errors="replace")
