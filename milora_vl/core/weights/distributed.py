"""Share results among processes; gather what ZeRO-3 and FSDP2 have partitioned; recognize sharded weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from milora_vl.common.compat.transformers import whole_weights
from milora_vl.common.errors import UserError

Made = TypeVar("Made")


def rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_objects(value: Any) -> list[Any]:
    """Return the value of each process. A UserError among them is raised in all processes."""
    _, processes = rank_and_world_size()
    values: list[Any] = [value] * processes
    if processes > 1:
        dist.all_gather_object(values, value)
    for error in (value, *values):
        if isinstance(error, UserError):
            error.is_shared = True
            raise error
    return values


def result_or_error(act: Callable[[], Made]) -> Made | UserError:
    """Return what `act` returns, or its error, for `gather_objects`: the other processes wait for this one there."""
    try:
        return act()
    except Exception as error:
        rank, processes = rank_and_world_size()
        if processes == 1:
            raise
        return (
            error
            if isinstance(error, UserError)
            else UserError(f"{type(error).__name__}: {error}", where=f"rank {rank}")
        )


@contextmanager
def raised_in_all() -> Iterator[None]:
    """Raise an error of one process in all of them, at their next `gather_objects` or at the end of this context.

    Not under ZeRO-3, where the others may wait in a forward: the launcher ends them.
    """
    try:
        yield
    except Exception as error:
        if not (is_deepspeed_zero3_enabled() or getattr(error, "is_shared", False)):
            with suppress(UserError):
                gather_objects(result_or_error(partial(_raise, error)))
        raise
    gather_objects(None)


def _raise(error: Exception) -> None:
    raise error


def maximum_later(number: int, device: torch.device) -> Callable[[], int]:
    """Return a function that returns the largest number of all processes, which all must call.

    It waits for the work that `device` got before this call, not for the work after it.
    """
    most = torch.full((), number, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    if device.type == "cpu":
        return lambda: int(most)
    most, known = most.to("cpu", non_blocking=True), torch.accelerator.current_stream().record_event()

    def read() -> int:
        known.synchronize()
        return int(most)

    return read


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process can use on a device; on a CPU, its share of the machine's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available / rank_and_world_size()[1])


def device_of_collectives() -> torch.device:
    is_nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


def broadcast(
    tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, owner: int
) -> Tensor:
    rank, processes = rank_and_world_size()
    if processes == 1:
        assert tensor is not None
        return tensor
    buffer = torch.empty(shape, dtype=dtype, device=device_of_collectives())
    if rank == owner and tensor is not None:
        buffer.copy_(tensor)
    dist.broadcast(buffer, src=owner)
    return buffer.to(device)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Under ZeRO-3 hold the whole model in each process, as without it, if it fits; else gather in each forward."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    parameters: list[Any] = list(model.parameters())
    size = sum(parameter.ds_numel * parameter.element_size() for parameter in parameters)
    free = min(gather_objects(free_memory(parameters[0].device)))
    with ExitStack() as stack:
        if 2 * size < free:  # as much again for what the start makes
            stack.enter_context(gather_params_ctx(parameters, modifier_rank=None))
            stack.enter_context(whole_weights())
        else:
            stack.enter_context(gathered_in_forward(model))
        yield


@contextmanager
def gathered_in_forward(model: nn.Module) -> Iterator[None]:
    """Under ZeRO-3, gather the parameters of each module and two levels below while its forward runs; else do nothing.

    A module may use weights below it without a call: of a child (MultiheadAttention) or of a child's child (Gemma 4).
    DeepSpeed gathers weights only in models that train. All processes must run the same forward passes.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    open_modules: dict[nn.Module, Any] = {}

    def parameters(module: nn.Module) -> list[nn.Parameter]:
        children = list(module.children())
        near = [module, *children, *(below for child in children for below in child.children())]
        found = (parameter for one in near for parameter in one.parameters(recurse=False))
        return [parameter for parameter in found if parameter.numel() == 0]  # others stay until their own module ends

    def hold(module: nn.Module, _: Any) -> None:
        context = gather_params_ctx(parameters(module), modifier_rank=None)
        context.__enter__()
        open_modules[module] = context

    def release(module: nn.Module, *_: Any) -> None:
        open_modules.pop(module).__exit__(None, None, None)

    owners = [module for module in model.modules() if parameters(module)]
    handles: list[Any] = [module.register_forward_pre_hook(hold) for module in owners]
    handles += [module.register_forward_hook(release) for module in owners]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(open_modules):  # an exception has ended their forward
            release(module)


# FSDP2 imports these modules. Importing them here would take seconds at every start.
_TENSOR, _FSDP = "torch.distributed.tensor", "torch.distributed.fsdp"


def is_sharded(parameter: Tensor) -> bool:
    """Return True if this process holds a shard of a parameter (under FSDP2 a DTensor), or nothing of it."""
    module = sys.modules.get(_TENSOR)
    return parameter.numel() == 0 or (module is not None and isinstance(parameter, module.DTensor))


def uses_fsdp(model: nn.Module) -> bool:
    module = sys.modules.get(_FSDP)
    return module is not None and any(isinstance(child, module.FSDPModule) for child in model.modules())


def gathered_state(model: nn.Module, *, only_trained: bool, keep: bool) -> dict[str, Tensor]:
    """Return the complete tensors of a sharded model on the CPU: its trained parameters, or its whole state dict.

    All processes must call it. The result is empty on processes that do not `keep` it.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward without backward leaves gathered weights
    named = model.named_parameters() if only_trained else model.state_dict(keep_vars=True).items()
    state = {}
    for name, tensor in named:
        if tensor.requires_grad or not only_trained:
            found = tensor.detach()
            found = found.full_tensor() if isinstance(found, DTensor) else found
            if keep:
                state[name] = found.cpu()
    return state
