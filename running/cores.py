"""How many CPU cores there are to share out."""

import os


def usable_cores():
    """Number of the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
