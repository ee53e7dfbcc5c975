"""A fixed A: the update is zero on protected inputs at every step, in any trainer, and after every way to reload it."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from milora_vl import apply_milora, load_adapter, merge, restore_split, save_adapter
from milora_vl.core.adapter.fixed_a import ROW_LENGTH, off_inputs, overlap
from milora_vl.core.adapter.lora import lora_layer
from support.adapter_cases import Pictures, Tokens, one_rule, picture_batch, tiny_gpt2, token_batch
from support.calibrated import directions, leaks, llava_batches, picture_batches, protecting, text_batches
from support.problems import raises_code, raises_problem

METHODS = ["milora", "pissa", "random", "lora"]
IDS = token_batch(200)
TEXT = text_batches(vocabulary=200)
Q = "model.layers.0.self_attn.q_proj"


pytestmark = pytest.mark.filterwarnings("ignore:too little calibration data")  # few batches


def train(model: nn.Module, inputs: dict[str, Tensor] | None = None, steps: int = 4) -> list[float]:
    """A plain training loop without this package."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        out = model(**(inputs or {"input_ids": IDS}))
        logits = out if isinstance(out, Tensor) else out.logits
        loss = logits.float().log_softmax(-1)[..., 3].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# What users get who set nothing but a rank: the share is 0.95.
DEFAULT = [{"modules": "language", "method": "milora", "rank": 2, "alpha": 4}]


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("default", torch.bfloat16), ("default", torch.float16), *((method, torch.float32) for method in METHODS)],
)
def test_a_trained_adapter_answers_nothing_to_protected_inputs(tiny_llama, tmp_path: Path, method: str, dtype) -> None:
    base = tiny_llama()[0].to(dtype)
    expected = base(IDS).logits
    rules = DEFAULT if method == "default" else protecting(method=method)
    protected = directions(base, rules, TEXT)
    model = apply_milora(base, rules, calibration=TEXT)
    assert all(protection.energy >= rules[0].get("protect", 0.95) for protection in model.milora_protection.values())
    assert torch.equal(model(IDS).logits, expected)
    losses = train(model)
    assert losses[-1] < losses[0]
    assert max(leaks(model, protected)) < 1e-5
    save_adapter(model, tmp_path)
    stock = PeftModel.from_pretrained(tiny_llama()[0].to(dtype), str(tmp_path))
    assert stock.peft_config["default"].r == 2
    assert max(leaks(stock, protected)) < 1e-5
    again = load_adapter(tiny_llama()[0].to(dtype), tmp_path, is_trainable=True)
    assert train(again) == pytest.approx(train(copy.deepcopy(model)), rel=1e-5)
    assert max(leaks(again, protected)) < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_large_inputs_in_float16_leave_step_0_exact(autocast: bool) -> None:
    base = nn.Sequential(nn.Linear(64, 8))
    base[0].weight.data.zero_()
    x = torch.full((3, 64), 2e4)
    rules = [{"modules": "0", "method": "lora", "rank": 2, "protect": 0.5}]
    model = apply_milora(copy.deepcopy(base), rules, calibration=[{"input": torch.randn(64, 64)}])
    layer = lora_layer(model, "0")
    layer.lora_A["default"].weight.fill_(0.5)  # A x is 640,000
    if not autocast:
        base, model, x = base.half(), model.half(), x.half()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        assert torch.equal(model(x), base(x))
        layer.lora_B["default"].weight.data.fill_(2**-20)
        assert float((model(x) - base(x)).mean()) == pytest.approx(2 * 640_000 * 2**-20, rel=2e-3)


def test_without_protection_the_adapter_answers(tiny_llama) -> None:
    protected = directions(tiny_llama()[0], protecting(), TEXT)
    free = apply_milora(tiny_llama()[0], one_rule(alpha=4))
    train(free)
    assert min(leaks(free, protected)) > 0.1


def test_e_alone_trains_at_the_stock_rank_from_rows_of_one_length(tiny_llama) -> None:
    model = apply_milora(tiny_llama()[0], protecting(), calibration=TEXT)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.endswith("lora_B.default.weight") for name in trained)
    layer = lora_layer(model, Q)
    assert layer.r["default"] == 2
    assert torch.allclose(layer.lora_A["default"].weight.norm(dim=1), torch.tensor(ROW_LENGTH))
    model.set_adapter("default")  # PEFT switches on what trains
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_convolutions_are_protected(method: str, tmp_path: Path) -> None:
    rules = [{"modules": name, "method": method, "rank": 1, "protect": 0.5} for name in ("patch", "head")]
    protected = directions(Pictures(), rules, picture_batches())
    model = apply_milora(Pictures(), rules, calibration=picture_batches())
    pixels, words = picture_batch()
    train(model, {"pixels": pixels, "words": words})
    assert max(leaks(model, protected)) < 1e-5
    save_adapter(model, tmp_path)
    assert max(leaks(PeftModel.from_pretrained(Pictures(), str(tmp_path)), protected)) < 1e-5


def test_an_embedding_cannot_be_protected() -> None:
    rules = [{"modules": "words", "method": "lora", "rank": 1, "protect": 0.5}]
    with raises_problem(where="policy[0].protect"):
        apply_milora(Pictures(), rules, calibration=picture_batches())
    rules.append({"modules": "words", "protect": 0})
    assert apply_milora(Pictures(), rules).milora_protection == {}


def test_conv1d_is_protected() -> None:
    protected = directions(tiny_gpt2(), protecting(protect=0.4), text_batches())
    model = apply_milora(tiny_gpt2(), protecting(protect=0.4), calibration=text_batches())
    train(model, {"input_ids": token_batch(40)})
    assert max(leaks(model, protected)) < 1e-5


def test_each_tower_of_a_llava_is_protected(tiny_llava) -> None:
    rules = [
        {"modules": "language", "method": "milora", "rank": 2, "protect": 0.6},
        {"modules": "projector", "method": "milora", "rank": 2, "protect": 0.4},
        {"modules": "vision.layers[0]", "method": "lora", "rank": 2, "protect": 0.6},
    ]
    base = tiny_llava()[0]
    batches = llava_batches(base)
    protected = directions(base, rules, batches)
    model = apply_milora(base, rules, calibration=batches)
    assert {target.tower for target in model.milora_targets} == {"language", "projector", "vision"}
    train(model, dict(batches[0]))
    assert max(leaks(model, protected)) < 1e-5


@pytest.mark.parametrize("rules", [DEFAULT, protecting()])
def test_a_merged_model_passes_protected_inputs_as_the_base_does(tiny_llama, rules: list[dict[str, Any]]) -> None:
    base = tiny_llama()[0]
    V = directions(base, rules, TEXT)[Q]
    model = apply_milora(tiny_llama()[0], rules, calibration=TEXT)
    train(model)
    change = merge(model).get_submodule(Q).weight - base.get_submodule(Q).weight
    assert float((change @ V).norm() / change.norm()) < 1e-5


def settings_of(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "save_steps": 3, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "weight_decay": 0.1, **options,
    }  # fmt: skip


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_hf_trainer_protects_and_resumes_without_a_call_of_ours(tiny_llama, tmp_path: Path, optim: str) -> None:
    protected = directions(tiny_llama()[0], protecting(), TEXT)

    def run(folder: Path) -> Trainer:
        model = apply_milora(tiny_llama()[0], protecting(), calibration=TEXT)
        return Trainer(model, TrainingArguments(**settings_of(folder, optim=optim)), train_dataset=Tokens())

    (whole := run(tmp_path)).train()
    assert losses(whole)[-1] < losses(whole)[0]
    (second := run(tmp_path)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(second) == losses(whole)
    assert max(leaks(second.model, protected)) < 1e-5
    again = load_adapter(tiny_llama()[0], tmp_path / "checkpoint-6", is_trainable=True)
    assert max(leaks(again, protected)) < 1e-5


def test_other_ways_to_continue_protect_as_well(tiny_llama, tmp_path: Path) -> None:
    protected = directions(tiny_llama()[0], protecting(), TEXT)
    model = apply_milora(tiny_llama()[0], protecting(), calibration=TEXT)
    train(model)
    save_adapter(model, tmp_path)
    model.load_adapter(str(tmp_path), "second", is_trainable=True)
    model.add_adapter("third", model.peft_config["default"])
    for name in ("second", "third"):
        model.set_adapter(name)
        assert not any("lora_A" in key for key, p in model.named_parameters() if p.requires_grad)
    stock = PeftModel.from_pretrained(tiny_llama()[0], str(tmp_path), is_trainable=True)
    train(restored := restore_split(stock, tmp_path))
    assert max(leaks(restored, protected)) < 1e-5


def test_an_a_that_a_stock_trainer_has_trained_is_noticed(tiny_llama, tmp_path: Path) -> None:
    protected = directions(tiny_llama()[0], protecting(), TEXT)
    model = apply_milora(tiny_llama()[0], protecting(), calibration=TEXT)
    train(model)
    save_adapter(model, tmp_path)
    stock = PeftModel.from_pretrained(tiny_llama()[0], str(tmp_path), is_trainable=True)
    train(stock)
    assert min(leaks(stock, protected)) > 1e-3
    stock.save_pretrained(str(tmp_path / "stock"))
    with pytest.warns(UserWarning, match="no milora.json: .* no input is protected"):
        load_adapter(tiny_llama()[0], tmp_path / "stock", is_trainable=True)
    shutil.copy(tmp_path / "milora.json", tmp_path / "stock")
    with raises_code("adapter-wrong-anchor", hint="restore_split before training"):
        restore_split(stock, tmp_path)
    with pytest.warns(UserWarning, match="A has changed"):
        load_adapter(tiny_llama()[0], tmp_path / "stock", is_trainable=True)
    model.get_buffer(f"base_model.model.{Q}.lora_A.default.weight").mul_(1.5)
    with pytest.warns(UserWarning, match="A has changed"):
        save_adapter(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_fused_sum_is_pefts_own(tiny_llama, dtype: torch.dtype, autocast: bool) -> None:
    model = apply_milora(tiny_llama()[0].to(dtype), protecting(dropout=0.0), calibration=TEXT)
    layer = lora_layer(model, Q)
    x = torch.randn(2, 5, 64).to(dtype).requires_grad_()
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    gradients = []
    for hook in (False, True):  # PEFT's forward runs where a hook sees the adapter alone
        handle = layer.lora_B["default"].register_forward_hook(lambda *_: None) if hook else None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(x)
        found = torch.autograd.grad(out.float().square().sum(), (x, layer.lora_B["default"].weight))
        gradients.append((out, *found))
        if handle is not None:
            handle.remove()
    for ours, stock in zip(*gradients, strict=True):
        assert ours.dtype == stock.dtype
        assert (ours - stock).norm() <= 0.02 * stock.norm()


@pytest.mark.parametrize(("dtype", "left"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_what_is_left_of_an_update_on_protected_inputs(tiny_llama, dtype: torch.dtype, left: float) -> None:
    rules = protecting()
    (V, *_) = directions(tiny_llama()[0], rules, TEXT).values()
    layer = lora_layer(apply_milora(tiny_llama()[0], rules, calibration=TEXT), Q)
    layer.base_layer.weight.data.zero_()
    layer.lora_B["default"].weight.data.normal_()
    inside, outside = V.T.to(dtype), torch.randn(V.shape[1], V.shape[0]).to(dtype)
    outside = outside * inside.norm() / outside.norm()
    layer.base_layer.to(dtype)
    assert layer(inside).float().norm() < left * layer(outside).float().norm()


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), width=st.integers(2, 9), count=st.integers(0, 8), seed=st.integers(0, 999))
def test_rows_off_the_inputs_have_one_length_and_no_part_along_them(
    rows: int, width: int, count: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    V = torch.linalg.qr(torch.randn(width, min(count, width - 1), generator=generator)).Q
    A, kept = off_inputs(torch.randn(rows, width, generator=generator), V)
    assert overlap(A, V) < 1e-5
    assert torch.allclose(A.norm(dim=1), torch.tensor(ROW_LENGTH))
    assert 0 <= kept <= 1
