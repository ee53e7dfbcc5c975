"""What only a real card can show. `make gpu` runs it; `MILORA_GPU_TESTS_ON=cpu pytest -m gpu tests/gpu` tries it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.plan import RUNS, measure
from milora_vl import apply_milora, decompose, load_model
from milora_vl.train.__main__ import main
from support.adapter_cases import LLAVA_POLICY, llava_batch, train_steps
from support.drawn import write_tiny_data
from support.train_runs import losses, training

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
RULES = [{"modules": "language", "method": "milora", "protect": 0, "rank": 4}]
PLAIN = ("--rank", "4", "--dropout", "0")


def here(batch: dict[str, Tensor], device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in batch.items()}


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def run(data: Path, folder: Path, on_device: list[str], *more: str) -> list[tuple[int, float]]:
    words = [word for word in training(data, folder, *PLAIN, *more) if word != "--use_cpu"]
    assert main([*words, *on_device]) == 0
    return losses(folder)


def run_apart(*command: str) -> None:
    """Run a training in its own process."""
    done = subprocess.run([sys.executable, "-m", *command], env=os.environ, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "pure"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_step_0_is_exact(
    dtype: torch.dtype, autocast: bool, attention: str, device: torch.device, tiny_llava: Any
) -> None:
    if attention.startswith("flash"):
        needs("flash_attn")
    base = tiny_llava()[0].to(device, dtype)
    base.set_attn_implementation(attention)
    batch = here(llava_batch(base), device, dtype)
    context = torch.autocast(device.type, dtype) if autocast else nullcontext()
    with torch.no_grad(), context:
        before = base(**batch).logits
        assert torch.equal(apply_milora(base, RULES)(**batch).logits, before)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_bases_train(bits: Any, device: torch.device, tiny_llava: Any, tmp_path: Path) -> None:
    needs("bitsandbytes")
    for part in tiny_llava():
        part.save_pretrained(tmp_path)
    base = load_model(tmp_path, quantization=bits, device=device)[0]
    batch = here(llava_batch(base), device, base.dtype)
    with torch.no_grad():
        before = base(**batch).logits
    model = apply_milora(base, LLAVA_POLICY)
    with torch.no_grad():
        assert torch.allclose(model.eval()(**batch).logits, before, atol=1e-5)
    first, *_, last = train_steps(model.train(), batch)
    assert last < first


def test_a_7b_weight_is_decomposed_on_the_card(
    device: torch.device, record_property: Callable[[str, object], None]
) -> None:
    """Its time there and on the CPU; a first call loads the libraries of the card."""
    W = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    decompose(W[:512, :512].to(device), 128)
    for where in {device.type, "cpu"}:
        weight, start = W.to(where), time.perf_counter()
        excess = decompose(weight, 128).excess
        seconds = time.perf_counter() - start
        record_property(f"4096 x 4096, r 128, on {where}", f"{seconds:.3f} s with excess {excess:.1e}")
        assert excess <= 1e-3


@pytest.mark.parametrize("shape", RUNS)
def test_a_step_takes_the_memory_that_the_plan_says(shape: tuple[Any, ...], device: torch.device) -> None:
    if device.type == "cpu":
        shape = (1, 256, *shape[2:])  # the memory of a process also holds other tests'
    found = measure(*shape, device=device.type)
    if device.type == "cuda":
        assert found["ratio"] == pytest.approx(1, abs=0.1)


@pytest.fixture(scope="module")
def plain(
    on_device: list[str], tiny_records: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The losses of a run on the device, without other flags, on the data of `tiny_data`."""
    folder = tmp_path_factory.mktemp("plain")
    return [loss for _, loss in run(write_tiny_data(folder / "data", tiny_records), folder / "run", on_device)]


def test_it_learns_what_a_cpu_learns(plain: list[float], tiny_data: Path, tmp_path: Path) -> None:
    on_cpu = run(tiny_data, tmp_path / "run", ["--use_cpu"])
    assert plain == pytest.approx([loss for _, loss in on_cpu], rel=2e-2)


def test_compiled_blocks(
    plain: list[float], device: torch.device, on_device: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    backend = [] if device.type == "cuda" else ["--torch_compile_backend", "aot_eager"]
    compiled = run(tiny_data, tmp_path / "compiled", on_device, "--torch_compile", *backend)
    assert [loss for _, loss in compiled] == pytest.approx(plain, rel=1e-2)


SWITCHES = {  # package, flags of both runs, flag of one
    "liger": ("liger_kernel", [], ["--use_liger_kernel"]),
    "offload": ("torch", ["--gradient_checkpointing"], ["--gradient_checkpointing_kwargs", '{"offload": true}']),
    "paged": ("bitsandbytes", [], ["--optim", "paged_adamw_8bit"]),
    "packed": ("flash_attn", ["--packing", "--bf16"], ["--attn_implementation", "{language: flash_attention_2}"]),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_what_users_switch_on_leaves_the_losses(
    name: str, device: torch.device, on_device: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    package, common, flag = SWITCHES[name]
    needs(package)
    if device.type == "cpu" and name != "paged":
        pytest.skip("needs a card")
    expected = run(tiny_data, tmp_path / "plain", on_device, *common)
    words = [word for word in training(tiny_data, tmp_path / "run", *PLAIN, *common, *flag) if word != "--use_cpu"]
    run_apart("milora_vl.train", *words, *on_device)  # Liger replaces classes for its whole process
    assert [loss for _, loss in losses(tmp_path / "run")] == pytest.approx([loss for _, loss in expected], rel=2e-2)


@pytest.mark.parametrize("precision", ["--bf16", "--fp16"])
def test_a_resumed_run_has_the_losses_of_one_in_one_piece(
    precision: str, device: torch.device, on_device: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    if device.type == "cpu" and precision == "--fp16":
        pytest.skip("accelerate trains in fp16 on GPUs alone")
    whole = run(tiny_data, tmp_path / "whole", on_device, precision)
    run(tiny_data, tmp_path / "cut", on_device, precision)
    for name in ("checkpoint-6", "checkpoint-4"):
        subprocess.run(["rm", "-r", str(tmp_path / "cut" / name)], check=True)
    again = run(tiny_data, tmp_path / "cut", on_device, precision, "--resume_from_checkpoint", "auto")
    assert [loss for _, loss in again] == pytest.approx([loss for _, loss in whole], rel=1e-3)


@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_one_process_of_a_launcher(
    kind: str, plain: list[float], on_device: list[str], tiny_data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """NCCL on a card, gloo on a CPU. The model loads from files, which zero.Init shards."""
    if kind != "ddp":
        needs("deepspeed")
    words = training(tiny_data, tmp_path / "run", *PLAIN, "--model", str(tiny_folder))
    words = [word for word in words if word != "--use_cpu"] + [
        *on_device,
        *([] if kind == "ddp" else ["--deepspeed", kind]),
    ]
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m", "milora_vl.train"]
    run_apart(*launch, *words)
    assert [loss for _, loss in losses(tmp_path / "run")] == pytest.approx(plain, rel=1e-2)


def test_a_step_waits_for_nothing_of_ours(
    device: torch.device, on_device: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    """CUDA itself names the lines that wait; the counts of the simulated device are checked without a card."""
    run(tiny_data, tmp_path / "first", on_device, "--bf16")
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(tiny_data, tmp_path / "run", on_device, "--bf16", "--save_strategy", "no", "--logging_steps", "100")
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message)]
    for file in (
        "milora_vl/models/losses.py",
        "milora_vl/train/trainer.py",
        "milora_vl/interop/base_kl.py",
        "adapter/anchored.py",
    ):
        assert len([line for line in waits if file in line]) <= file.endswith("base_kl.py")  # its mean in the last log
