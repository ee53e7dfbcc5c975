"""Processes with a simulated accelerator each: DDP, DeepSpeed and FSDP2 run on `sim` (`simulated_device.py`).

`trained_on_cluster` trains in two of them and returns what each saw: where and how often the parts of a start ran, the
bytes on the CPU at the first step, the waits of our lines in steps; of the start the largest object and tensor that a
collective sent, and the operations before each.
Collectives go to gloo and refuse tensors of the CPU, as NCCL does. They cannot show streams, speed, or what NCCL does
when a rank is missing.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor, nn

from support import simulated_device as sim
from support.launched import ENVIRONMENT, free_port
from support.simulated_device import NAME, SimTensor

DEVICE = f"{NAME}:0"  # torch knows the name in a process with the device
CACHE_BYTES = 3 * 2**18  # of keys and values: three texts of a tiny model, so that there are batches to share
COLLECTIVES = (
    "all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "_all_gather_base", "reduce_scatter",
    "reduce_scatter_tensor", "_reduce_scatter_base", "all_to_all_single", "gather", "scatter", "reduce", "send", "recv",
    "all_reduce_coalesced", "all_gather_single", "reduce_scatter_single",
)  # fmt: skip


def trained_on_cluster(
    lines: Sequence[Sequence[str]], folder: Path, *, tf32: bool = False, memory: int = 2**40
) -> list[Any]:
    """Train by each command line in two processes; returns what rank 0 and rank 1 saw of each.

    `memory` is free on each device.
    """
    (folder / "lines.json").write_text(json.dumps(lines))
    settings = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    settings |= {
        "TORCHDYNAMO_DISABLE": "1",
        "TF32": "1" if tf32 else "",
        "MEMORY": str(memory),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    words = [sys.executable, __file__, str(folder / "lines.json")]
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    started = []
    for rank, log in enumerate(logs):
        environment = ENVIRONMENT | settings | {"RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
        with log.open("w") as file:  # DeepSpeed keeps torch.tensor as it finds it: no fork of a process that has it
            started.append(subprocess.Popen(words, cwd=folder, env=environment, stdout=file, stderr=file))
    try:
        codes = [process.wait(timeout=500) for process in started]
    finally:
        for process in started:
            process.kill()
    texts = [log.read_text() for log in logs]
    assert codes == [0, 0], texts[0][-3000:] + texts[1][-3000:]
    found = [[json.loads(line[6:]) for line in text.splitlines() if line.startswith("RESULT")] for text in texts]
    return list(zip(*found, strict=True))


_data = torch._C.TensorBase.data  # torch's own descriptor


def _get_data(self: Tensor) -> Tensor:
    return self.detach() if isinstance(self, SimTensor) else _data.__get__(self)


def _set_data(self: Tensor, value: Tensor) -> None:
    """`parameter.data = tensor`, across devices too: the object keeps its attributes, as on CUDA."""
    here, there = isinstance(self, SimTensor), isinstance(value, SimTensor)
    if here == there:
        _data.__set__(self, value)
    else:
        requires_grad = self.requires_grad
        with torch.no_grad():
            torch._C._swap_tensor_impl(self, SimTensor(value.raw) if there else value.detach())
        is_parameter = isinstance(self, nn.Parameter) or getattr(self, "_is_param", False)
        if there:
            self._is_param = is_parameter
        else:
            vars(self).pop("raw", None)
        self.__class__ = SimTensor if there else nn.Parameter if is_parameter else Tensor
        self.requires_grad_(requires_grad)
    if there:
        self.raw = value.raw


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device(DEVICE)

    def wait(self, *_: Any) -> None: ...
    def record(self, *_: Any) -> None: ...

    wait_stream = wait_event = synchronize = wait

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:  # torch 2.15's Adam asks
        return False

    def elapsed_time(self, *_: Any) -> float:
        return 0.0


def _complete(module: Any) -> None:
    """Add what DeepSpeed and FSDP2 ask of `torch.sim`."""
    nothing, stream, zero = lambda self, *_, **__: None, lambda self, *_: _Stream(), lambda self, *_: 0
    seed = lambda self, value: torch.default_generator.manual_seed(value)  # noqa: E731
    yes = lambda self, *_, **__: True  # noqa: E731
    for name, value in {
        "Stream": _Stream, "Event": _Stream, "current_stream": stream, "default_stream": stream,
        "stream": lambda self, *_: nullcontext(), "set_stream": nothing, "current_device": zero, "manual_seed": seed,
        "manual_seed_all": seed, "is_initialized": yes, "memory_allocated": zero, "max_memory_allocated": zero,
        "memory_reserved": zero, "reset_peak_memory_stats": nothing, "memory_stats": lambda self, *_: {},
        "ipc_collect": nothing, "is_bf16_supported": yes,
    }.items():  # fmt: skip
        setattr(type(module), name, value)


def _accelerator() -> Any:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    kinds = {
        "FloatTensor": torch.float32, "HalfTensor": torch.float16, "BFloat16Tensor": torch.bfloat16,
        "DoubleTensor": torch.float64, "IntTensor": torch.int32, "LongTensor": torch.int64, "ByteTensor": torch.uint8,
    }  # fmt: skip
    names = dict.fromkeys(("device_name", "current_device_name"), lambda self, index=None: DEVICE)
    methods: dict[str, Any] = {
        **names,
        "device_name": lambda self, index=None: NAME if index is None else DEVICE,
        "device": lambda self, index=None: torch.device(DEVICE),
        "current_device": lambda self: 0,
        "device_count": lambda self: 1,
        "is_fp16_supported": lambda self: True,
        "on_accelerator": lambda self, tensor: tensor.device.type == NAME,
        **{
            name: property(lambda self, d=dtype: partial(torch.tensor, dtype=d, device=DEVICE))
            for name, dtype in kinds.items()
        },
    }
    accelerator = type("SimAccelerator", (CPU_Accelerator,), methods)()
    accelerator._name, accelerator._communication_backend_name = NAME, "gloo"
    return accelerator


_PRODUCTS = ("aten.mm.", "aten.addmm", "aten.bmm.", "aten.baddbmm", "aten.linear.", "aten.matmul.", "aten.convolution.")


def _rounded(x: Any) -> Any:
    """Return a float32 tensor of `sim` with ten bits of mantissa, as tensor cores read it."""
    if not isinstance(x, SimTensor) or x.dtype != torch.float32:
        return x
    bits = x.raw.contiguous().view(torch.int32)
    return SimTensor(((bits + ((bits >> 13) & 1) + 0xFFF) & ~0x1FFF).view(torch.float32))


def _with_tf32(stock: Any) -> Any:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        name = str(func)
        if name.startswith(_PRODUCTS) and torch.backends.cuda.matmul.fp32_precision == "tf32":
            first = 1 if "addmm" in name or "baddbmm" in name else 0  # what is added keeps its digits
            args = (*args[:first], *map(_rounded, args[first : first + 2]), *args[first + 2 :])
        return stock(func, args, kwargs)

    return run


@contextmanager
def cluster(seen: Counter[str], before: list[int]) -> Iterator[None]:
    """Make `sim` the accelerator of this process. `seen` counts what runs, and where.

    `before` gets the number of operations that the device ran before each collective of the start, since the last one.
    """
    sim.register()
    _complete(sim._module)
    with sim.simulated_device(), pytest.MonkeyPatch.context() as patch:
        import deepspeed  # after torch.tensor is replaced, which zero.Init puts back as it found it
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType
        from deepspeed.accelerator import set_accelerator

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        set_accelerator(_accelerator())
        patch.setattr(Tensor, "data", property(_get_data, _set_data), raising=False)
        patch.setattr(SimTensor, "data", property(_get_data, _set_data))
        stock = torch._has_compatible_shallow_copy_type
        patch.setattr(
            torch, "_has_compatible_shallow_copy_type",
            lambda a, b: stock(a, b) or (SimTensor in (type(a), type(b)) and not (a.is_meta or b.is_meta)),
        )  # fmt: skip
        patch.setattr(PartialState, "_prepare_backend", lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU))
        patch.setattr(c10d, "_get_object_coll_device", lambda group=None: torch.device(DEVICE))
        patch.setattr("milora_vl.core.weights.distributed.device_of_collectives", lambda: torch.device(DEVICE))
        patch.setattr("milora_vl.core.calibration.texts.CACHE_BYTES", CACHE_BYTES)
        for module in ("core.weights.distributed", "core.calibration.activations"):
            patch.setattr(f"milora_vl.{module}.free_memory", lambda _: int(os.environ["MEMORY"]))
        to_tensor = c10d._object_to_tensor

        def counted(*arguments: Any) -> Any:  # torch 2.15 has a fourth
            tensor, size = to_tensor(*arguments)
            seen["largest object"] = max(seen["largest object"], 0 if seen["steps"] else int(size))
            return tensor, size

        patch.setattr(c10d, "_object_to_tensor", counted)
        for name in COLLECTIVES:
            if hasattr(c10d, name):
                strict = partial(_refuses_the_cpu, seen, before, getattr(c10d, name))
                for module in (c10d, dist):
                    patch.setattr(module, name, strict, raising=False)
        patch.setattr(torch.accelerator, "current_stream", _Stream)  # FSDP2 waits for its events
        ddp = nn.parallel.DistributedDataParallel.__init__  # every process has one device, number 0
        patch.setattr(
            nn.parallel.DistributedDataParallel, "__init__",
            lambda self, module, device_ids=None, output_device=None, **more: ddp(self, module, [0], 0, **more),
        )  # fmt: skip
        if os.environ["TF32"]:
            patch.setattr(sim, "_run", _with_tf32(sim._run))
            torch.backends.cuda.matmul.fp32_precision = "tf32"  # of this process
        _watch(patch, seen)
        yield


def _refuses_the_cpu(seen: Counter[str], before: list[int], stock: Any, *args: Any, **kwargs: Any) -> Any:
    leaves = sim.tree_leaves((args, kwargs))
    if not seen["steps"]:
        before.append(seen.pop("operations", 0))
        seen["largest tensor"] = max(seen["largest tensor"], *(x.nbytes for x in leaves if isinstance(x, Tensor)))
    for leaf in leaves:
        if isinstance(leaf, Tensor) and not isinstance(leaf, SimTensor) and leaf.device.type == "cpu":
            raise RuntimeError("No backend type associated with device type cpu")
    return stock(*args, **kwargs)


def _watch(patch: pytest.MonkeyPatch, seen: Any) -> None:
    """Count by place: generations, decompositions of sums (float32) and weights (float64), and steps."""
    import transformers

    generate, eigh, step = transformers.GenerationMixin.generate, torch.linalg.eigh, transformers.Trainer.training_step
    run = sim._run

    def counts(*arguments: Any) -> Any:
        seen["operations"] += 1
        return run(*arguments)

    def generates(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen[f"generate on {self.device.type}"] += 1
        found = generate(self, *args, **kwargs)
        seen["texts"] += len(found)
        return found

    def decomposes(A: Tensor) -> Any:
        seen[f"{'sum' if A.dtype == torch.float32 else 'weight'} on {A.device.type}"] += 1
        return eigh(A)

    def steps(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if not seen["steps"]:
            held = [*self.model.named_buffers(), *self.model.named_parameters()]
            seen["left on the CPU"] = sum(tensor.device.type == "cpu" and tensor.numel() > 0 for _, tensor in held)
            seen["bytes on the CPU"] = _bytes_on_the_cpu()
        seen["steps"] += 1
        with sim.counted_waits() as waits:
            loss = step(self, model, *args, **kwargs)
        seen["waits"] = {**seen.get("waits", {}), **waits.of("milora_")}
        return loss

    patch.setattr(sim, "_run", counts)
    patch.setattr(transformers.GenerationMixin, "generate", generates)
    patch.setattr(torch.linalg, "eigh", decomposes)
    patch.setattr(transformers.Trainer, "training_step", steps)


def _bytes_on_the_cpu() -> int:
    tensors = [one for one in gc.get_objects() if isinstance(one, Tensor)]
    on_device = {one.raw.untyped_storage().data_ptr() for one in tensors if isinstance(one, SimTensor)}
    storages = [one.untyped_storage() for one in tensors if type(one) in (Tensor, nn.Parameter) and one.is_cpu]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for address, size in sizes.items() if address not in on_device)


def _main() -> None:
    seen: Counter[str] = Counter()
    before: list[int] = []
    with cluster(seen, before):
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        from milora_vl.train import run
        from milora_vl.train.__main__ import main

        run.close_processes = lambda: None  # the next line trains in the same processes
        for line in json.loads(Path(sys.argv[1]).read_text()):
            seen.clear()
            before.clear()
            code = main([word for word in line if word != "--use_cpu"])
            unset_hf_deepspeed_config()
            print("\nRESULT" + json.dumps({"code": code, **seen, "before": before}), flush=True)
            dist.barrier()
    with suppress(BaseException):
        sys.stdout.flush()
    os._exit(0)  # gloo sometimes aborts at interpreter exit


if __name__ == "__main__":
    _main()
