"""Private interfaces of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from functools import cache, partial, wraps
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch._utils import ExceptionWrapper
from torch.utils._python_dispatch import TorchDispatchMode

Object = TypeVar("Object")


def change_class(value: object, kind: type[Object]) -> Object:
    """Give an object that another library created a subclass of its class, in place, and return it.

    Every reference and hook to a PEFT layer stays valid this way. A factory argument in PEFT would replace it.
    """
    value.__class__ = kind
    assert isinstance(value, kind)
    return value


def extend_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let `forward(module, stock, *args, **kwargs)` compute the forward of a module; `stock` is its own forward.

    The class of the module becomes a subclass of the same name, so that a deep copy computes with its own weights. The
    signature stays, since `generate` reads it. A factory argument in transformers and PEFT would replace it.
    """
    kind: Any = type(module)
    change_class(module, _with_forward(kind, forward))


@cache
def _with_forward(kind: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    stock: Callable[..., Any] = kind.forward

    @wraps(stock)
    def extended(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, partial(stock, self), *args, **kwargs)

    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "forward": extended})


def call_on_plain_tensors(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation of torch as if the arguments were of no subclass of Tensor.

    torch's guide to extending it names this class; a public name of it would replace it.
    """
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


def ignore_in_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Let DistributedDataParallel broadcast all buffers of `model` but these, which are equal on all ranks.

    A public argument of DistributedDataParallel would replace it.
    """
    model._ddp_params_and_buffers_to_ignore = list(names)  # type: ignore[assignment]


class OwnState(nn.Module):
    """A module whose subclasses write and read their part of a state dict under other names than torch would.

    A public hook of torch that can write to a state dict and rename what it reads would replace it.
    """

    def write_state(self, destination: MutableMapping[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[arg-type]

    def read_state(self, state_dict: MutableMapping[str, Any], prefix: str, *about: Any) -> None:
        """Read parameters and buffers as torch does; `about` ends with its lists of tensors that do not fit."""
        super()._load_from_state_dict(state_dict, prefix, *about)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.write_state(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *about: Any) -> None:
        self.read_state(state_dict, prefix, *about)


class _AfterOperations(TorchDispatchMode):
    def __init__(self, act: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.act = act

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.act(value)
        return out


def after_operations(act: Callable[[Tensor], None]) -> AbstractContextManager[Any]:
    """Call `act` with every tensor that an operation of the block returns.

    torch's guide to extending it names this class; a public name of it would replace it.
    """
    return _AfterOperations(act)


def without_data() -> AbstractContextManager[Any]:
    """Let all operations of the block run on tensors that have a device, but no data.

    On the meta device autocast has no kernels. A public name of FakeTensorMode would replace it.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def has_hooks(module: nn.Module) -> bool:
    """Return True if hooks see or change what `module` computes. A public way to list hooks would replace it."""
    return any((module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks))


class FailedBatch(ExceptionWrapper):
    """A batch that a loader process could not make: the main process raises its error, with code, place and hint.

    For an exception in a loader process, torch makes another wrapper, which keeps only the formatted traceback. A
    loader that passes the exception itself on would replace it.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error

    def reraise(self) -> NoReturn:
        raise self.error
