"""A device that is not the CPU, without hardware: `sim`. Its tensors keep their data in memory and say `sim:0`.

What an operation with tensors of `sim` and of the CPU does on CUDA, it does here: it raises. `counted_waits` counts
what makes the CPU wait for the device, with the line of Python that asked for it.

How it works: torch has a dispatch key for devices of others (PrivateUse1). `SimTensor` wraps a tensor of the CPU,
`raw`, and says that it is on this device; `_run` computes every operation on `raw`. The private names of torch below
come from torch's own test of such a device; there is no public way to register one from Python.

What it can't show: the memory and the speed of a device; streams, and copies beside the computation; kernels (their
rounding, FlashAttention, Triton, bitsandbytes, fused and foreach optimizers); torch.compile; several processes
(`simulated_cluster.py`); fp16, which accelerate refuses; generators of the device (random numbers are the CPU's);
`parameter.data = tensor` with a tensor of another device, as PEFT's MiCA does. Autocast casts what `_CAST` multiplies
to half precision and knows no operations that need float32. `torch.inference_mode` is `torch.no_grad`. A tensor in a
file of torch.save loads on the CPU.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.utils._device
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "sim"

_COPIES = ("aten._to_copy.default", "aten.copy_.default")
# CUDA takes indices on the CPU for a tensor on the device.
_INDEXED = ("aten.index.", "aten.index_put", "aten._index_put")
# Their result has as many elements as the data says: the CPU has to wait for it.
_SIZED_BY_DATA = (
    "aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.is_nonzero", "aten.unique",
    "aten._unique", "aten.repeat_interleave.Tensor", "aten.bincount", "aten._linalg_check_errors",
)  # fmt: skip
_CAST = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "conv2d", "conv3d", "scaled_dot_product_attention")


class _Module(_DummyBackendModule):
    """What torch asks of `torch.sim`."""

    active = False

    def is_available(self) -> bool:
        return self.active

    def device_count(self) -> int:
        return int(self.active)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    def device(self, index: object) -> Any:
        return nullcontext()

    def set_device(self, index: object) -> None: ...

    def synchronize(self, device: object = None) -> None: ...

    def empty_cache(self) -> None: ...


class Waits:
    """Counts what made the CPU wait for the device: operations, and the lines that called them."""

    def __init__(self) -> None:
        self.lines: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()

    def of(self, *packages: str) -> Counter[str]:
        """Return the lines within these packages."""
        return Counter({line: n for line, n in self.lines.items() if line.startswith(packages)})


_counting: list[Waits] = []


@contextmanager
def counted_waits() -> Iterator[Waits]:
    """Count the waits of this block. Copies to the device that block are counted apart, as `uploads`."""
    _counting.append(waits := Waits())
    try:
        yield waits
    finally:
        _counting.remove(waits)


def _calling_line(operation: str) -> str:
    """Return `package/file.py:line operation` of the innermost frame outside torch, but for DDP, and the simulation."""
    frame = sys._getframe(1)
    while frame.f_back is not None and re.search("/torch/(?!nn/parallel)|/simulated_", frame.f_code.co_filename):
        frame = frame.f_back
    path = frame.f_code.co_filename
    for root in ("/site-packages/", "/data_tools/", "/eval/milora_eval/", "/milora_vl/"):
        if root in path:
            path = root.strip("/").removesuffix("site-packages").removesuffix("data_tools").removeprefix("eval/")
            path = f"{path}/{frame.f_code.co_filename.rpartition(root)[2]}".lstrip("/")
            break
    return f"{path}:{frame.f_lineno} {operation}"


class SimTensor(Tensor):
    """A tensor of the device; `raw` is the tensor of the CPU that holds its data."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> SimTensor:
        self = Tensor._make_wrapper_subclass(
            cls, raw.shape, raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=f"{NAME}:0"
        )
        self.raw = raw
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: SimTensor) -> None:
        Tensor.data.__set__(self, value)
        self.raw = value.raw

    def is_pinned(self, device: object = None) -> bool:
        return False

    def __repr__(self, **_: Any) -> str:
        return f"{self.raw}, device='{NAME}:0'"

    def __deepcopy__(self, memo: dict[int, Any]) -> SimTensor:
        if id(self) not in memo:
            copy = self.detach().clone().requires_grad_(self.requires_grad)
            copy._is_param = getattr(self, "_is_param", False)
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.raw.detach().__reduce_ex__(protocol)

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_: Any) -> Any:
        return self.numpy()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        made = torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)
        return made.requires_grad_(requires_grad)


def _is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute an operation on the data of its tensors; the results are on the device."""
    name, leaves = str(func), tree_leaves((args, kwargs))
    here = [leaf for leaf in leaves if isinstance(leaf, SimTensor)]
    _require_one_device(name, leaves, here, args, kwargs)
    device = kwargs.get("device")
    _count(name, args, kwargs, here, device)

    def raw(leaf: Any) -> Any:
        if isinstance(leaf, SimTensor):
            return leaf.raw
        return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == NAME else leaf

    plain_args, plain = tree_map(raw, args), tree_map(raw, kwargs)
    with torch.no_grad():
        out = func(*plain_args, **plain)
    if name == "aten.copy_.default":
        return args[0]
    changed = {id(tensor.raw): tensor for tensor in here}
    is_here = _is_here(device) if device is not None else bool(here)

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in changed:  # computed in place; `out=` and `unsqueeze_` change the shape too
            same = changed[id(leaf)]
            if (same.shape, same.stride()) != (leaf.shape, leaf.stride()):
                Tensor.data.__set__(same, SimTensor(leaf))
            return same
        return SimTensor(leaf) if is_here else leaf

    return tree_map(wrapped, out)


def _require_one_device(name: str, leaves: list[Any], here: list[SimTensor], args: Any, kwargs: Any) -> None:
    """Raise what CUDA raises for tensors and generators of two devices. Numbers (0-dimensional) may be on the CPU."""
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != NAME and (here or _is_here(kwargs.get("device"))):
        raise RuntimeError(
            f"Expected a '{NAME}' device type for generator but found '{generator.device.type}' in {name}"
        )
    others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, SimTensor) and leaf.dim()]
    if not (here and others) or name in _COPIES:
        return
    if name.startswith(_INDEXED) and isinstance(args[0], SimTensor):
        values = args[2] if len(args) > 2 else None  # of index_put
        if not isinstance(values, Tensor) or isinstance(values, SimTensor) or not values.dim():
            return
    raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu in {name}")


def _count(name: str, args: Any, kwargs: Any, here: list[SimTensor], device: Any) -> None:
    """Count a wait for the device, or a copy to it that blocks."""
    if not _counting:
        return
    down = up = False
    if name == "aten.copy_.default":
        target, source = (isinstance(arg, SimTensor) for arg in args[:2])
        down, up = source and not target, target and not source and not (args[2:] and args[2])
    elif name in _COPIES and device is not None and not kwargs.get("non_blocking"):  # to the CPU: into pinned memory
        down, up = bool(here) and not _is_here(device), not here and _is_here(device)
    elif name.startswith(_INDEXED):  # a mask is a list of positions of unknown length, unless one number replaces them
        masks = [index for index in args[1] if isinstance(index, SimTensor) and index.dtype == torch.bool]
        down = bool(masks) and not (name.startswith(_INDEXED[1:]) and args[2].dim() == 0)
    else:
        down = bool(here) and name.startswith(_SIZED_BY_DATA)
    for waits in _counting if down or up else ():
        (waits.lines if down else waits.uploads)[_calling_line(name.split(".")[1])] += 1


def _made_on_the_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return torch.tensor or torch.as_tensor, which torch can't compute for a device without storage."""

    def made(data: Any, *, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Tensor:
        if not isinstance(data, Tensor):
            data = tree_map(lambda leaf: leaf.item() if isinstance(leaf, SimTensor) else leaf, data)
        if not _is_here(device):
            kwargs |= {} if device is None else {"device": device}
            return make(data, **kwargs) if not requires_grad else make(data, requires_grad=True, **kwargs)
        if isinstance(data, SimTensor):
            return data.to(**kwargs)
        return make(data, **kwargs).to(NAME).requires_grad_(requires_grad)

    return made


_module = _Module()
_libraries: list[Any] = []  # which register nothing any more when they are freed


def register() -> None:
    """Register the device, once in a process and before its first backward pass, which starts autograd's threads.

    Outside `simulated_device` there are zero of these devices.
    """
    if _libraries:
        return
    torch.utils._device._device_constructors()  # cached: torch.device("meta") has to know torch's own
    _setup_privateuseone_for_python_backend(NAME, backend_module=_module)
    torch.accelerator.empty_cache = lambda: None  # accelerate 1.16 calls it, and the device has no allocator
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend([every, aten])
    every.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in _CAST:
        aten.impl(name, _in_half_precision(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")


def _in_half_precision(op: Any) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def call(*args: Any, **kwargs: Any) -> Any:
        half = torch.get_autocast_dtype(NAME)

        def cast(leaf: Any) -> Any:
            takes = isinstance(leaf, Tensor) and leaf.dtype == torch.float32 and leaf.device.type == NAME
            return leaf.to(half) if takes else leaf

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*tree_map(cast, args), **tree_map(cast, kwargs))

    return call


@contextmanager
def simulated_device() -> Iterator[torch.device]:
    """Make `sim` the only accelerator of the process in this block: torch, accelerate and our commands take it."""
    register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_module, "active", True)
        patch.setenv("ACCELERATE_TORCH_DEVICE", NAME)
        patch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
        patch.setattr(torch, "tensor", _made_on_the_cpu(torch.tensor))
        patch.setattr(torch, "as_tensor", _made_on_the_cpu(torch.as_tensor))
        patch.setattr(torch, "inference_mode", torch.no_grad)  # where tensor classes get operations in other pieces
        patch.setattr(Tensor, "pin_memory", lambda self, device=None: self)
        yield torch.device(f"{NAME}:0")
