"""Several processes that train one model, as torchrun starts them; with one process nothing here does anything.

Every process draws the whole batch from the same random numbers and encodes its own share of it. What it computes from that is
its part of the loss and of the gradients, and the parts are added up: the samples, the loss and the gradients are those of one
process, whatever the number of processes, but for rounding. The first process alone prints, writes and evaluates.
"""

import contextlib
import datetime
import os
import re
import sys

import torch
import torch.distributed as dist
from torch import nn

from running.command_line import InputError, message_of, say_error

START = datetime.timedelta(minutes=5)  # within which all processes must have begun
# One that has ended is noticed at once, by its connections; this is for one that hangs, and must outlast a slow disk's
# writing of a checkpoint.
SILENCE = datetime.timedelta(minutes=10)
_meeting_place = None  # the store by which the processes found each other
_alone = False  # whether this process waits for no other now


def size():
    """Number of the processes, 1 unless torchrun started several."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def launcher():
    """What stands before a script's name on a command line, on one machine."""
    return "python" if size() == 1 else f"torchrun --standalone --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"


def own_gpu():
    """torch.device of this process's GPU; InputError if this machine has fewer than processes, or no NCCL."""
    if size() == 1:
        return torch.device("cuda")
    local, available = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= available:
        raise InputError(f"process {local} of this machine has no GPU of its own, for there are {available}; start as many "
                         "processes as GPUs, or stay on the CPU with --no-cuda")  # fmt: skip
    if not dist.is_nccl_available():
        raise InputError("this build of PyTorch has no NCCL, by which GPUs add up; start one process, or use --no-cuda")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextlib.contextmanager
def alone():
    """Context in which this process waits for no other: what its modules compute, they compute of its own batch."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


# beginning and ending together


@contextlib.contextmanager
def joined():
    """Context in which all processes that torchrun started work together; those after the first have no stdout.

    Raises InputError if they cannot.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or size() > 1:  # one alone, or joined already
        yield
        return
    _join()
    try:
        with contextlib.ExitStack() as stack:
            if rank():
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield
        _leave()
    except KeyboardInterrupt:
        if rank():
            sys.exit(130)  # the first one says so
        raise
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _leave():
    """Wait, however long the first process evaluates: PyTorch 2.6 hangs in closing connections to one that has gone before."""
    with contextlib.suppress(RuntimeError):  # the first process is lost
        if rank() == 0:
            _meeting_place.set("over", "1")
        else:
            _meeting_place.wait(["over"], datetime.timedelta(days=365))


def _join():
    needed = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: start several "
                         "processes with torchrun, or unset WORLD_SIZE")  # fmt: skip
    if not (dist.is_available() and dist.is_gloo_available()):
        raise InputError("this build of PyTorch has no gloo, which several processes need; start one process")
    with_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    global _meeting_place
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        _meeting_place, number, count = next(dist.rendezvous("env://", timeout=START))
        dist.init_process_group("cpu:gloo,cuda:nccl" if with_gpus else "gloo", rank=number, world_size=count,
                                store=dist.PrefixStore("run", _meeting_place), timeout=SILENCE)  # fmt: skip
    except (RuntimeError, ValueError, OSError) as error:
        if "EADDRINUSE" in str(error):
            raise InputError(f"{address} is taken by another program; name another port with --master_port") from None
        raise InputError(f"the processes do not find each other at {address}: {_reason(error)}") from None


def _reason(error):
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(r"^\[\S+:\d+\] ", "", lines[0])[:200]


def _together(collective, *arguments, **options):
    """Call a function of torch.distributed; if a process is lost, end this one, and have one of those left say so."""
    try:
        return collective(*arguments, **options)
    except RuntimeError as error:
        try:
            says = _meeting_place.add("lost", 1) == 1
        except RuntimeError:  # it went with the process that is lost
            says = True
        if says:
            # at once: torchrun is about to end this process
            say_error(f"another process of this run has ended or cannot be reached ({_reason(error)}); the others end too, "
                      "and --resume goes on from the last checkpoint")  # fmt: skip
        sys.exit(2)


def _from_all(value):
    values = [None] * size()
    _together(dist.all_gather_object, values, value)
    return values


def wait():
    """Return once every process has called this."""
    if size() > 1:
        _together(dist.all_reduce, torch.zeros(1))


def _end(message, code=2):
    if rank() == 0:
        say_error(message)
    wait()  # torchrun ends all processes as soon as one has ended: not before the line is out
    sys.exit(code)


@contextlib.contextmanager
def agreed():
    """Context of what every process does by itself; what a user can mend, in any of them, ends all with one line."""
    if size() == 1:
        yield
        return
    message = None
    try:
        yield
    except (InputError, OSError) as error:
        message = message_of(error)
    for number, text in enumerate(_from_all(message)):
        if text:
            _end(f"process {number}: {text}" if number else text)


def from_first(function):
    """What function() returns in the first process, which alone calls it; what a user can mend ends all with one line."""
    if size() == 1:
        return function()
    outcome = [None, None, None]  # value, message, exit code
    if rank() == 0:
        try:
            outcome[0] = function()
        except (InputError, OSError) as error:
            outcome[1:] = message_of(error), 2
        except SystemExit as ended:
            outcome[2] = ended.code or 0
    _together(dist.broadcast_object_list, outcome, src=0)
    value, message, code = outcome
    if message is not None:
        _end(message, code)
    if code is not None:
        sys.exit(code)
    return value


def require_alike(found):
    """End all processes with one line unless each has the same dict name → value that is one of JSON's."""
    for number, other in enumerate(everyone := _from_all(found) if size() > 1 else []):
        for name, value in everyone[0].items():
            if other[name] != value:
                _end(f"process {number} has other {name} than the first, {other[name]} and {value}: all must have the same")


def largest(*numbers):
    """List of each number's largest value in any process, as floats."""
    values = torch.tensor(numbers, dtype=torch.float64)
    if size() > 1:
        _together(dist.all_reduce, values, op=dist.ReduceOp.MAX)
    return values.tolist()


# one batch in several processes


class _Sum(torch.autograd.Function):
    """Sum over the processes. What each makes of it is a part of the loss: the gradients are summed as well."""

    @staticmethod
    def forward(ctx, tensor):
        total = tensor.clone(memory_format=torch.contiguous_format)
        _together(dist.all_reduce, total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return _Sum.forward(ctx, gradient)


def summed(tensor):
    """Sum over the processes of a tensor that has one shape in all, with its gradient."""
    return _Sum.apply(tensor) if size() > 1 else tensor


@torch.no_grad()
def add_up(tensors):
    """Put into each of `tensors`, of one device and dtype, its sum over the processes, by one exchange."""
    if size() > 1 and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        _together(dist.all_reduce, flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


@torch.no_grad()
def share_weights(modules):
    """Give the weights and statistics of an iterable of modules in the first process to all."""
    if size() > 1:
        for module in modules:
            for tensor in module.state_dict().values():
                value = tensor.contiguous()
                _together(dist.broadcast, value, src=0)
                tensor.copy_(value)


class Share:
    """This process's pairs of a batch of `total`: those from number `first` on; shares differ by one pair at most."""

    def __init__(self, total):
        self.total, self.first = total, total * rank() // size()
        self._end = total * (rank() + 1) // size()

    def rows(self, tensor):
        """This share's rows of (k · total, …), those of k batches, each batch's after the other's."""
        return tensor.unflatten(0, (-1, self.total))[:, self.first : self._end].flatten(0, 1)

    def gather(self, rows):
        """(total, D), all pairs' rows, of this share's; with gradients. A sum with zeros is exact, and shares may differ."""
        return summed(nn.functional.pad(rows, (0, 0, self.first, self.total - self._end))) if size() > 1 else rows


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with mean and variance of the whole batch. PyTorch's SyncBatchNorm is for GPUs alone."""

    def forward(self, x):
        """(B, C, H, W) → the same, normalised; running statistics are updated as BatchNorm2d does."""
        if not self.training:
            return super().forward(x)
        y = x if x.dtype == torch.float64 else x.float()
        sums = summed(torch.cat((y.sum(dim=(0, 2, 3)), y.new_full((1,), x.numel() // x.shape[1]))))
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        centred = y - mean[:, None, None]
        # about the mean, by a second exchange: E[x²] − E[x]² would cancel
        variance = summed(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def share_batch_norms(module):
    """Make every BatchNorm2d within `module` one of the whole batch, in place, where there are several processes."""
    for layer in module.modules() if size() > 1 else ():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SharedBatchNorm2d
