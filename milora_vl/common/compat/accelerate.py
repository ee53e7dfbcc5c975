"""Private interfaces of accelerate."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def enable_fsdp_on_cpus(state: AcceleratorState, plugin_args: dict[str, Any] | None) -> None:
    """Make accelerate shard on CPUs too. Its default enables FSDP on GPUs alone, and trains with DDP on CPUs.

    Every new AcceleratorState takes its type from the shared state of PartialState, which accelerate writes like this
    on GPUs. Support of FSDP2 on CPUs in accelerate would replace it.
    """
    if plugin_args is not None and state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_args)
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
