"""How much memory a script may take."""

import contextlib
import re
import resource
from pathlib import Path


def limit_memory():
    """Have an allocation fail, which is one line, where it takes more memory than the machine or its job has left.

    Linux would grant it, and end the process without a word once it is written to. Half of all memory is always granted: what
    others hold now they may give back.
    """
    with contextlib.suppress(OSError, KeyError, TypeError, ValueError):  # not Linux
        sizes = dict(re.findall(r"(\w+): +(\d+) kB", Path("/proc/meminfo").read_text()))
        own = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
        total, available = int(sizes["MemTotal"]) * 1024, (int(sizes["MemAvailable"]) + int(sizes["SwapFree"])) * 1024
        total = min(total, *_group_limits())
        limit = int(own) * 1024 + int(0.9 * min(total, max(available, total / 2)))  # the kernel's tables take some
        _, highest = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit if highest < 0 else min(limit, highest), highest))


def allow_mapping(size):
    """Raise this process's limit, if it has one, by a file of `size` bytes that is mapped and never written to.

    Linux counts a private mapping as memory, and can take back its pages at any time.
    """
    limit, highest = resource.getrlimit(resource.RLIMIT_DATA)
    if limit >= 0:
        resource.setrlimit(resource.RLIMIT_DATA, (limit + size if highest < 0 else min(limit + size, highest), highest))


def _group_limits():
    """Bytes that the control groups of this process, a container's or a job's, allow: an iterable, infinity first."""
    yield float("inf")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controller, group = line.split(":", 2)
        place, file = {"": ("", "memory.max"), "memory": ("memory", "memory.limit_in_bytes")}.get(controller, ("", ""))
        folder = Path("/sys/fs/cgroup", place, group.lstrip("/"))
        for parent in (folder, *folder.parents) if file else ():
            with contextlib.suppress(OSError, ValueError):  # "max", or none
                yield int((parent / file).read_text())
