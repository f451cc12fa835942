"""Where a run computes, and in which precision."""

import contextlib
import math
from pathlib import Path

import torch

from running.command_line import InputError
from running.cores import cpu_name
from running.ranks import own_gpu

# Encoders of 750 units train 1.35 times as fast in bf16 as in fp32 on a core with AVX-512's bf16, those of 250 units 0.7 times.
BF16_WIDTH = 500


def select_device(no_cuda):
    """torch.device of a run: a GPU if there is one, unless `no_cuda`; each of several processes has its own, or InputError.

    PyTorch begins with convolutions in TF32: from here on all is computed in full but where `matrix_precision` says otherwise.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return own_gpu() if torch.cuda.is_available() and not no_cuda else torch.device("cpu")


def settled_precision(precision, device, widest_layer=math.inf):
    """fp32, tf32 or bf16: the precision asked for, "auto" being bf16 where the device computes it and the encoders are wide.

    widest_layer: its units; products of small layers take less time than the conversions. Raises
    InputError for a precision that the device does not have.
    """
    if precision == "auto":
        return "bf16" if widest_layer >= BF16_WIDTH and has_fast_bf16(device) else "fp32"
    if precision == "tf32" and device.type != "cuda":
        raise InputError("--precision tf32 needs a CUDA device, and this run is on the CPU; use fp32 or bf16")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise InputError(f"--precision bf16 is not known to {torch.cuda.get_device_name()}; use fp32")
    return precision


def has_fast_bf16(device):
    """Whether the device computes bf16 itself, not by way of fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text()
        return "amx_bf16" in flags or "avx512_bf16" in flags
    return False


def keep_freed_memory():
    """Have glibc keep the memory of freed tensors: returning it costs a page fault for every 4 KiB of every step on a CPU."""
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


@contextlib.contextmanager
def matrix_precision(precision):
    """Context in which CUDA's products and convolutions may be computed in TF32, if `precision` is tf32; nowhere else."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@contextlib.contextmanager
def encoder_precision(device, precision):
    """Context in which encoders compute their matrix products in `precision`: fp32, tf32 or bf16.

    Sampling, mixing, losses, optimisers and probes stay outside.
    """
    with matrix_precision(precision), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        yield


def describe_device(device):
    """One line: the GPU's name, or the CPU's with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {cpu_name()}, {torch.get_num_threads()} threads"
