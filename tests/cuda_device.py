"""A stand-in for a CUDA device on a machine without one: its tensors are on "cuda:0" by all they say, their numbers on the CPU.

`cuda_device()` is a context in which torch.cuda.is_available() is true. In it fails, as on a GPU, what mixes devices, draws from
a generator of another device, or asks the fused Adam to take layouts that it does not take; and what makes the host wait for the
device is counted, by the line of the project that asked for it.

What it cannot catch: anything of the kernels themselves (their rounding, their limits of size and layout, a kernel that does not
exist for a dtype), races, streams and events, CUDA graphs, the memory that a step takes, several GPUs, and speed. Of autocast
it knows the functions of LOWERED alone.
"""

import contextlib
import hashlib
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

PROJECT = Path(__file__).parents[1]
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
AMPLE = 80 * 10**9  # bytes of free memory

# operators after which the host has a number, or a size, that the device had to compute first
WAITING = {
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
PRODUCTS = {"addmm", "addmv", "baddbmm", "bmm", "convolution", "convolution_backward", "mm", "mv"}
FUSED = {"_fused_adam_"}  # with PRODUCTS, those that take no number from the CPU either
# what autocast computes in the lower precision
LOWERED = {
    torch.addmm,
    torch.baddbmm,
    torch.bmm,
    torch.conv2d,
    torch.matmul,
    torch.mm,
    torch.nn.functional.conv2d,
    torch.nn.functional.linear,
    torch.Tensor.__matmul__,
    torch.Tensor.matmul,
    torch.Tensor.mm,
}


class CudaTensor(torch.Tensor):
    """A tensor without memory that claims to be on CUDA, and `numbers`, the CPU's tensor of its values."""

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, numbers):
        with torch._C._DisableTorchDispatch():
            shell = torch.empty_strided(numbers.shape, numbers.stride(), dtype=numbers.dtype, device="meta")
        # the keys of CUDA make C++ choose its gradients as it would for a GPU
        tensor = torch.Tensor._make_subclass(cls, shell, False, device_for_backend_keys=CUDA)
        tensor.numbers = numbers
        return tensor

    def get_device(self):
        return 0

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __reduce_ex__(self, protocol):  # a checkpoint is read with map_location="cpu"
        return self.detach().cpu().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: a tensor of the stand-in device outlived its context")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Do what C++ would do by the device of the tensor, which it does not know."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in LOWERED and torch.is_autocast_enabled("cuda"):
                lowered = tree_map(_in_autocast, (args, kwargs))
                with torch.autocast("cuda", enabled=False):
                    return func(*lowered[0], **lowered[1])
            if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
                args = (args[0], _index_on_device(args[1], args[0]), *args[2:])
            if func is torch.Tensor.to and _is_cuda(args[0]):
                args = tuple(value for value in args if not _names_cuda(value))
                kwargs = {name: value for name, value in kwargs.items() if not _names_cuda(value)}
                if len(args) == 1 and not kwargs.keys() - {"non_blocking"}:
                    return args[0]
            return func(*args, **kwargs)


def _is_cuda(value):
    return isinstance(value, CudaTensor)


def _names_cuda(value):
    # meta is what C++ calls the device, where it makes a tensor like another
    return isinstance(value, (str, torch.device)) and torch.device(value).type in ("cuda", "meta")


def _in_autocast(value):
    wide = _is_cuda(value) and value.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return value.to(torch.get_autocast_dtype("cuda")) if wide else value


def _index_on_device(key, tensor):
    """The key with its lists as tensors on the device of what is indexed: the copy is pageable."""

    def moved(part):
        return torch.tensor(part, dtype=None if part else torch.long).to(tensor.device) if isinstance(part, list) else part

    return tuple(map(moved, key)) if isinstance(key, tuple) else moved(key)


class Generator(torch.Generator):
    """torch.Generator, also of CUDA. From equal seeds both draw equal numbers, but a state of CUDA's has 16 bytes."""

    _on_cuda, _states = set(), {}

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        # an address may have been another generator's
        (cls._on_cuda.add if _names_cuda(device) else cls._on_cuda.discard)(self._cdata)
        return self

    @classmethod
    def device_of(cls, generator):
        """Device of a generator as an operator is given it: torch hands on another Python object for it."""
        return CUDA if generator._cdata in cls._on_cuda else CPU

    device = property(lambda self: self.device_of(self))

    def get_state(self):
        state = super().get_state()
        if self.device == CPU:
            return state
        digest = hashlib.blake2b(state.numpy().tobytes(), digest_size=16).digest()
        self._states[digest] = state
        return torch.frombuffer(bytearray(digest), dtype=torch.uint8)

    def set_state(self, state):
        if self.device == CPU:
            return super().set_state(state)
        if state.numel() != 16 or _is_cuda(state):
            raise RuntimeError("RNG state is wrong size")
        return super().set_state(self._states[state.numpy().tobytes()])


class Device(TorchDispatchMode):
    """Runs each operator on the CPU's numbers, after it has checked what a GPU would check.

    waits: Counter of (what, "file:line"), each time that the host waits; lowered and full: Counters of "file:function" whose
    products of float32 may be computed in TF32, and may not.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.lowered, self.full, self._pinned = Counter(), Counter(), Counter(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        involved = any(map(_is_cuda, tensors))
        asked, pin = kwargs.get("device"), kwargs.pop("pin_memory", False)
        target = CUDA if (_names_cuda(asked) if asked is not None else involved) else CPU
        for generator in (leaf for leaf in leaves if isinstance(leaf, torch._C.Generator)):
            if Generator.device_of(generator) != target:
                raise RuntimeError(f"{name} on {target} with a generator on {Generator.device_of(generator)}")
        if involved:
            self._check(name, args, tensors)
        self._note(name, args, kwargs, tensors, target)

        if asked is not None:
            kwargs["device"] = CPU
        wrappers = {id(tensor.numbers): tensor for tensor in tensors if _is_cuda(tensor)}
        args_, kwargs_ = tree_map(lambda leaf: leaf.numbers if _is_cuda(leaf) else leaf, (args, kwargs))
        with torch._C._DisableTorchDispatch():
            result = func(*args_, **kwargs_)
        if pin:
            storage = result.untyped_storage()
            self._pinned[storage.data_ptr()] = storage  # kept, so that no other takes its address
        if name == "copy_":
            return args[0]

        def outside(value):
            if not isinstance(value, torch.Tensor):
                return value
            if (known := wrappers.get(id(value))) is not None:
                if known.shape != value.shape or known.stride() != value.stride():
                    with torch._C._DisableTorchDispatch():  # the shell takes the shape that its numbers have been given
                        known.as_strided_(value.shape, value.stride())
                return known
            return CudaTensor(value) if target == CUDA else value

        return tree_map(outside, result)

    def _check(self, name, args, tensors):
        """RuntimeError for tensors of two devices, but where torch takes them: copies, indices and numbers of the CPU."""
        if name in ("_to_copy", "copy_"):
            return
        others = [tensor for tensor in tensors if not _is_cuda(tensor)]
        if name in ("index", "index_put_", "_index_put_impl_"):
            wrong = [args[0]] if not _is_cuda(args[0]) else []
            wrong += [value for value in args[2:3] if isinstance(value, torch.Tensor) and value.dim() and not _is_cuda(value)]
        elif name in PRODUCTS | FUSED:
            wrong = others
        else:
            in_place = name.endswith("_") and bool(others) and others[0] is args[0]
            wrong = [tensor for tensor in others if tensor.dim() or in_place]
        if wrong:
            raise RuntimeError(f"{name}: expected all tensors on one device, found cuda:0 and cpu {tuple(wrong[0].shape)}")
        if name in FUSED:
            for group in zip(*args[:4], strict=True):
                if len({(tensor.dtype, tensor.shape, tensor.stride()) for tensor in group}) > 1:
                    raise RuntimeError(f"{name}: parameters, gradients and moments differ in dtype or layout")

    def _note(self, name, args, kwargs, tensors, target):
        involved = any(map(_is_cuda, tensors))
        if name in WAITING and involved:
            self._wait(name)
        elif name in ("_to_copy", "copy_"):
            source = args[name == "copy_"]
            into = _is_cuda(args[0]) if name == "copy_" else target == CUDA
            non_blocking = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
            if _is_cuda(source) and not into and not non_blocking:
                self._wait("copy to the host")
            elif not _is_cuda(source) and into:
                pinned = source.untyped_storage().data_ptr() in self._pinned
                if not (pinned and non_blocking):
                    self._wait("copy from pinned memory" if pinned else "copy from pageable memory")
        elif name in ("index", "index_put_", "_index_put_impl_") and involved:
            for index in (index for index in args[1] if index is not None):
                fills = name != "index" and args[2].numel() == 1  # which is masked_fill_
                if index.dtype == torch.bool and not fills:
                    self._wait("index by a mask")
                if not _is_cuda(index):
                    self._wait("copy from pageable memory")
        elif name in PRODUCTS and target == CUDA and tensors[0].dtype == torch.float32:
            switch = torch.backends.cudnn if "convolution" in name else torch.backends.cuda.matmul
            frame = _project_frame()
            (self.lowered if switch.allow_tf32 else self.full)[
                f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
            ] += 1

    def _wait(self, what):
        frame = _project_frame()
        self.waits[what, f"{Path(frame.f_code.co_filename).relative_to(PROJECT)}:{frame.f_lineno}"] += 1


def _project_frame():
    """The innermost frame of the project's own code, or of the test's where there is none."""
    frame = first = sys._getframe(1)
    while first.f_code.co_filename == __file__:
        first = first.f_back
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PROJECT) and not {".venv", "tests"} & set(path.relative_to(PROJECT).parts):
            return frame
        frame = frame.f_back
    while not Path(first.f_code.co_filename).is_relative_to(PROJECT / "tests"):
        first = first.f_back
    return first


def _by_device_and_dtype(lists, with_indices=False):
    """Groups of tensors, for what C++ does by the device that it believes in."""
    groups = {}
    for number, first in enumerate(lists[0]):
        columns, numbers = groups.setdefault((first.device, first.dtype), ([[] for _ in lists], []))
        for column, whole in zip(columns, lists, strict=True):
            column.extend(whole[number : number + 1])
        numbers.append(number)
    return groups


@contextlib.contextmanager
def cuda_device(free=AMPLE):
    """Context in which there is a CUDA device with that many bytes free; yields the Device."""
    answers = {
        "_lazy_init": None,
        "current_device": 0,
        "device_count": 1,
        "get_device_name": "a stand-in for CUDA",
        "is_available": True,
        "is_bf16_supported": True,
        "max_memory_allocated": 0,
        "mem_get_info": (free, AMPLE),
        "synchronize": None,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        foreach = torch.utils._foreach_utils
        stack.enter_context(mock.patch.object(foreach, "_foreach_supported_types", [torch.Tensor, CudaTensor]))
        stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", _by_device_and_dtype))
        torch._C._ensureCUDADeviceGuardSet()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        torch.__future__.set_swap_module_params_on_conversion(True)  # a module keeps its parameters when it moves
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, False)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield stack.enter_context(Device())
