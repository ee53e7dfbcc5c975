"""A run after others: the base holds their update, and one stock LoRA for the untouched base comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from milora_vl import apply_milora, load_adapter, merge, save_adapter
from milora_vl.core.adapter.anchored import fixed_names
from milora_vl.core.adapter.apply import apply_targets
from milora_vl.core.adapter.earlier import APART_FILE, hold, read_earlier
from milora_vl.core.adapter.folders import EARLIER
from milora_vl.core.adapter.load import load_checkpoint
from milora_vl.core.adapter.sidecar import read_sidecar
from milora_vl.core.policy import Policy
from support.adapter_cases import (
    LLAVA_POLICY,
    Pictures,
    llava_batch,
    move,
    one_rule,
    tiny_gpt2,
    token_batch,
    train_steps,
)
from support.problems import raises_code, raises_problem

ADAPTERS = [
    {"modules": "language.attention", "method": "lora", "rank": 2, "alpha": 3},
    {"modules": "language.layers[1].mlp", "method": "milora", "protect": 0, "rank": 2},
    {"modules": "projector", "method": "lora", "rank": 3, "rslora": True},
]
SEVENTH = [{"modules": "language.mlp", "method": "milora", "protect": 0, "rank": 1, "alpha": 0.7}]


def first_run(base: nn.Module, policy: Any, folder: Path) -> Path:
    model = apply_milora(base, policy)
    move(model)
    save_adapter(model, folder)
    return folder


def after(base: nn.Module, folder: Path, policy: Any, tasks: Any = (), **batches: Any) -> Any:
    """Return a model that starts a task after the runs of `folder`."""
    targets = Policy.parse(policy).resolve(base)
    earlier = read_earlier(base, folder, targets, tasks)
    hold(base, earlier)
    model = apply_targets(base, targets, **batches)
    model.earlier = earlier
    return model


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-6


def test_the_second_run_starts_at_the_model_after_the_first(tiny_llava, tmp_path: Path) -> None:
    first_run(tiny_llava()[0], LLAVA_POLICY, tmp_path / "a")
    batch = llava_batch(tiny_llava()[0])
    expected = logits(load_adapter(tiny_llava()[0], tmp_path / "a"), batch)
    assert not torch.allclose(expected, logits(tiny_llava()[0], batch), rtol=0.01)
    model = after(tiny_llava()[0], tmp_path / "a", ADAPTERS)
    assert_close(logits(model, batch), expected)
    move(model)
    assert not torch.allclose(logits(model, batch), expected, rtol=0.01)
    with model.disable_adapter():
        assert_close(logits(model, batch), expected)


def test_a_chain_of_four_is_one_stock_lora_for_the_untouched_base(tiny_llava, tmp_path: Path) -> None:
    folder, batch = first_run(tiny_llava()[0], LLAVA_POLICY, tmp_path / "0"), llava_batch(tiny_llava()[0])
    for number, policy in enumerate((ADAPTERS, SEVENTH, ADAPTERS), start=1):
        tasks = [{"run": f"{n}"} for n in range(number + 1)]
        model = after(tiny_llava()[0], folder, policy, tasks)
        move(model)
        folder = tmp_path / str(number)
        save_adapter(model, folder)
        expected = logits(model, batch)
        for load in (PeftModel.from_pretrained, load_adapter):
            assert_close(logits(load(tiny_llava()[0], folder), batch), expected)
    saved = read_sidecar(folder)
    assert saved is not None
    assert [task["run"] for task in saved.tasks] == ["0", "1", "2", "3"]
    ranks = {t.path.split("language_model.")[-1]: t.rank for t in saved.targets if t.tower == "language"}
    assert ranks["layers.1.self_attn.q_proj"] == 6 + 2 + 2  # an anchor doubles the rank
    assert ranks["layers.1.mlp.up_proj"] == 10 + 4 + 2 + 4
    merged = merge(load_adapter(tiny_llava()[0], folder))
    assert_close(logits(merged, batch), expected)


def test_a_resumed_run_needs_its_own_folder_alone_and_has_equal_bits(tiny_llava, tmp_path: Path) -> None:
    first_run(tiny_llava()[0], LLAVA_POLICY, tmp_path / "a")
    batch = llava_batch(tiny_llava()[0])
    model = after(tiny_llava()[0], tmp_path / "a", ADAPTERS, [{"run": "a"}, {"run": "b"}])
    train_steps(model.train(), batch)
    save_adapter(model, tmp_path / "b")
    assert (tmp_path / "b" / APART_FILE).is_file()  # the projector is whole, and its adapter trains on
    (tmp_path / "a").rename(tmp_path / "gone")
    again = load_checkpoint(tiny_llava()[0], tmp_path / "b")
    assert torch.equal(logits(again, batch), logits(model, batch))
    expected = [parameter.clone() for parameter in model.parameters() if parameter.requires_grad]
    move(again)
    again.load_adapter(str(tmp_path / "b"), "default", is_trainable=True)  # as HF's Trainer
    found = [parameter for parameter in again.parameters() if parameter.requires_grad]
    assert all(map(torch.equal, found, expected))
    save_adapter(again, tmp_path / "c")
    for name in ("adapter_model.safetensors", "adapter_config.json", "milora.json", APART_FILE):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.filterwarnings("ignore:too little calibration", "ignore:.* protect less than their rule")
def test_the_new_update_vanishes_on_inputs_of_the_earlier_task(tiny_llama, tmp_path: Path) -> None:
    first_run(tiny_llama()[0], one_rule(), tmp_path / "a")
    earlier, other = ({"input_ids": token_batch(200)[n : n + 1]} for n in (0, 1))
    rules = [{"modules": "language", "method": "lora", "rank": 4, "protect": 0.9999999}]
    model = after(tiny_llama()[0], tmp_path / "a", rules, calibration=[earlier])
    before = [logits(model, batch) for batch in (earlier, other)]
    move(model)
    changes = [float((logits(model, b) - old).norm()) for b, old in zip((earlier, other), before, strict=True)]
    assert changes[0] < 1e-4 * changes[1]


def test_layers_of_gpt2_hold_an_update(tmp_path: Path) -> None:
    batch = {"input_ids": token_batch()}
    first_run(tiny_gpt2(), one_rule(), tmp_path / "gpt2")
    model = after(tiny_gpt2(), tmp_path / "gpt2", [{"modules": "language", "method": "lora", "rank": 2}])
    move(model)
    save_adapter(model, tmp_path / "second")
    assert_close(logits(PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "second"), batch), logits(model, batch))


def test_quantized_layers_hold_an_update(tiny_llama, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    batch = {"input_ids": token_batch()}
    tiny_llama()[0].save_pretrained(tmp_path / "base")

    def quantized() -> nn.Module:
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        kind: Any = type(tiny_llama()[0])
        return kind.from_pretrained(tmp_path / "base", quantization_config=settings)

    rules = [{"modules": "language", "method": "lora", "rank": 2}]
    first_run(quantized(), rules, tmp_path / "4bit")
    expected = logits(load_adapter(quantized(), tmp_path / "4bit"), batch)
    assert_close(logits(after(quantized(), tmp_path / "4bit", rules), batch), expected)


def test_a_copy_computes_with_its_own_update_and_ddp_broadcasts_none(tiny_llama, tmp_path: Path) -> None:
    first_run(tiny_llama()[0], one_rule(), tmp_path / "a")
    model = after(tiny_llama()[0], tmp_path / "a", one_rule())
    batch = {"input_ids": token_batch(200)}
    expected, other = logits(model, batch), copy.deepcopy(model)
    held = {name: buffer for name, buffer in other.named_buffers() if name.rpartition(".")[2] in EARLIER}
    assert held
    assert set(held) <= set(fixed_names(model)), "DDP ignores these"
    assert not held.keys() & model.state_dict().keys()
    for buffer in held.values():
        buffer.zero_()
    assert torch.equal(logits(model, batch), expected)
    assert torch.equal(logits(other, batch), logits(tiny_llama()[0], batch))


def with_kind(modules: str, method: str = "lora") -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        first_run(Pictures(), [{"modules": modules, "method": method, "rank": 2}], folder)
        read_earlier(Pictures(), folder, [])

    return check


@pytest.mark.parametrize("check", [with_kind("patch"), with_kind("words"), with_kind("head", "dora")])
def test_updates_that_are_no_lora_of_a_linear_layer_are_refused(check: Callable[[Path], None], tmp_path: Path) -> None:
    with raises_code("adapter-unsupported-kind"):
        check(tmp_path)


def test_another_base_and_more_steps_of_several_tasks_are_refused(tiny_llama, tmp_path: Path) -> None:
    first_run(tiny_llama()[0], one_rule(), tmp_path / "a")
    with raises_code("adapter-wrong-base"):
        after(tiny_llama(seed=1)[0], tmp_path / "a", one_rule())
    model = after(tiny_llama()[0], tmp_path / "a", one_rule(), [{}, {}])
    save_adapter(model, tmp_path / "b")
    with raises_code("adapter-several-tasks"):
        load_adapter(tiny_llama()[0], tmp_path / "b", is_trainable=True)
    with raises_problem():
        merge(model)


def test_a_second_adapter_after_others_loads_into_another_base_if_allowed(tiny_llama, tmp_path: Path) -> None:
    first_run(tiny_llama()[0], one_rule(), tmp_path / "a")
    model = after(tiny_llama()[0], tmp_path / "a", one_rule(), [{}, {}])
    save_adapter(model, tmp_path / "b")
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "get_base_layer"):
                layer.get_base_layer().weight += 1.0
    with raises_code("adapter-wrong-base"):
        model.load_adapter(str(tmp_path / "b"), "second")
    model.load_adapter(str(tmp_path / "b"), "second", allow_base_mismatch=True)
    assert "second" in model.peft_config
