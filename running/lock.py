"""One process at a time in a model directory."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from running.command_line import InputError

LOCK = ".lock"
TRIES, PAUSE = 50, 0.02  # of a lock that says nothing yet or is on its way out; seconds between two


@contextlib.contextmanager
def occupied(directory):
    """Context in which no other process is in `occupied` with this directory; it is made, and removed again if left empty.

    Raises InputError that names the process that is in there. The lock is flock's, on a hidden file that says whose it is: it
    ends with its process, however that ends. On a file system without locks the file alone counts, for as long as the process
    that it names runs on this host. A directory in which this process may not write is not locked.
    """
    made = [place for place in (directory, *directory.parents) if not place.exists()]
    try:
        descriptor = _locked(directory)
        try:
            yield
        finally:
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    os.unlink(directory / LOCK)  # before it is free: whoever has it open sees that it is gone
                os.close(descriptor)
    finally:
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()


def _locked(directory):
    """Descriptor of the file that is locked now, or None if it may not be written."""
    file = directory / LOCK
    for _ in range(TRIES):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process has just removed the directory, which it left empty
            continue
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not os.access(directory, os.W_OK):
                return None
            # not a name that nobody knows, but where another user's old lock is what must go
            error.filename = str(file if error.errno == errno.EACCES and file.exists() else directory)
            raise
        try:
            if _take(descriptor):
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.stat(file), os.fstat(descriptor)):
                        return descriptor
            else:
                time.sleep(PAUSE)
                if holder := os.pread(descriptor, 999, 0).decode(errors="replace").split():
                    host, pid = (*holder, "?")[:2]
                    raise InputError(f"{directory} is in use by process {pid} on {host}; wait until it ends, or stop it")
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError):
                error.filename = str(directory)
            raise
        os.close(descriptor)
    raise InputError(f"{directory} is in use by another process; wait until it ends, or stop it")


def _take(descriptor):
    """Whether the open file is locked now, and says so."""
    own = f"{socket.gethostname()} {os.getpid()} {_began(os.getpid())}\n".encode()
    without_locks = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        without_locks = True
        if _runs(os.pread(descriptor, 999, 0).decode(errors="replace").split()):
            return False
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, own, 0)
    if without_locks:
        time.sleep(PAUSE)  # of two that came at the same moment the one that wrote last has it
    return os.pread(descriptor, 999, 0) == own


def _runs(holder):
    """Whether a process, the words of a lock's file, runs on this host."""
    if len(holder) != 3 or not holder[1].isdecimal():
        return False
    host, pid, began = holder
    return host == socket.gethostname() and began == _began(pid) != "never"


def _began(pid):
    """When a process began, in ticks of this host's clock; "never" if it does not run."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "never"
    return "never" if state == "Z" else numbers[18]
