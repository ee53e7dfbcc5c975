"""Adapters of format version 1, [A; A0] and [B, -B0], load, continue and are saved as version 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from milora_vl import apply_milora, load_adapter, restore_split, save_adapter
from milora_vl.adapter.sidecar import ANCHORS_FILE, read_sidecar
from support.adapter_cases import Pictures, anchors, move, one_rule, picture_batch, token_batch, train_steps
from support.problems import raises_code
from support.version_1 import to_version_1

IDS = token_batch(200)
BATCH = {"input_ids": IDS}


@pytest.fixture
def old(tiny_llama, tmp_path: Path) -> tuple[nn.Module, Path]:
    """A trained model, and its adapter as version 1 wrote it."""
    model = apply_milora(tiny_llama()[0], one_rule(alpha=4))
    train_steps(model, BATCH)
    save_adapter(model, tmp_path / "old")
    to_version_1(tmp_path / "old")
    return model.eval(), tmp_path / "old"


def test_stock_peft_reads_both_versions_alike(old, tiny_llama, tmp_path: Path) -> None:
    model, folder = old
    save_adapter(model, tmp_path / "new")
    for adapter in (folder, tmp_path / "new"):
        stock = PeftModel.from_pretrained(tiny_llama()[0], str(adapter))
        torch.testing.assert_close(stock(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["load_adapter", "over an adapter", "a second name", "restore_split"])
def test_it_continues_as_if_it_had_not_stopped_and_is_saved_as_version_2(old, tiny_llama, tmp_path, way: str) -> None:
    model, folder = old
    assert read_sidecar(folder).version == 1
    base = tiny_llama()[0]
    if way == "load_adapter":
        back = load_adapter(base, folder, is_trainable=True)
    elif way == "restore_split":
        back = restore_split(PeftModel.from_pretrained(base, str(folder), is_trainable=True), folder)
    else:
        back = apply_milora(base, one_rule(alpha=4, sigma="none"))  # other anchors
        name = "default" if way == "over an adapter" else "second"
        back.load_adapter(str(folder), name, is_trainable=True)
        back.set_adapter(name)
    torch.testing.assert_close(back.eval()(IDS).logits, model(IDS).logits, atol=1e-6, rtol=0)
    save_adapter(back, tmp_path / "new")
    new = tmp_path / "new" / ("second" if way == "a second name" else "")
    assert json.loads((new / "milora.json").read_text())["format_version"] == 2
    assert train_steps(back.train(), BATCH) == pytest.approx(train_steps(model.train(), BATCH), abs=1e-5)
    again = load_adapter(tiny_llama()[0], new, is_trainable=True)
    assert all(
        torch.equal(start, anchors(model)[name]) for name, start in anchors(again).items()
    )  # converted without a change of the anchors


def test_every_kind_of_layer_is_converted(tmp_path: Path) -> None:
    rules = [{"modules": "*", "method": "milora", "rank": 2}]
    model = apply_milora(Pictures(), rules)
    move(model)
    save_adapter(model, tmp_path)
    to_version_1(tmp_path)
    over = apply_milora(Pictures(), rules)
    over.load_adapter(str(tmp_path), "default", is_trainable=True)
    for back in (load_adapter(Pictures(), tmp_path, is_trainable=True), over):
        torch.testing.assert_close(back(*picture_batch()), model(*picture_batch()), atol=1e-5, rtol=0)
        assert all(torch.equal(start, anchors(model)[name]) for name, start in anchors(back).items())


def test_the_residual_form_is_converted(tiny_llama, tmp_path: Path) -> None:
    model = apply_milora(tiny_llama()[0], one_rule(), form="residual")
    train_steps(model, BATCH)
    save_adapter(model, tmp_path)
    to_version_1(tmp_path)
    over = apply_milora(tiny_llama()[0], one_rule(), form="residual")
    over.load_adapter(str(tmp_path), "default", is_trainable=True)
    expected = train_steps(model.train(), BATCH)
    for back in (load_adapter(tiny_llama()[0], tmp_path, is_trainable=True), over):
        assert train_steps(back.train(), BATCH) == pytest.approx(expected, abs=1e-5)


def test_a_state_dict_without_milora_json_has_version_1_if_b_ends_in_minus_b0(tiny_llama) -> None:
    """As DeepSpeed and torch.save keep it: the joined factors of the whole model."""
    model, other = (apply_milora(tiny_llama()[0], one_rule()) for _ in range(2))
    move(model, 0.01)
    state = model.state_dict()
    for key in [key for key in state if "lora_A" in key]:
        B_key = key.replace("lora_A", "lora_B")
        (D, A0), (_, E) = state[key].chunk(2), state[B_key].chunk(2, dim=1)
        B0 = anchors(model)[B_key.replace("weight", "anchor")]
        state[key], state[B_key] = torch.cat([A0 + D, A0]), torch.cat([B0 + E, -B0], dim=1)
    other.load_state_dict(state)
    torch.testing.assert_close(other(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_an_anchor_of_other_factors_is_refused(tiny_llama, tmp_path: Path) -> None:
    for name, fields in (("a", {}), ("b", {"sigma": "none"})):
        model = apply_milora(tiny_llama()[0], one_rule(**fields))
        move(model)
        save_adapter(model, tmp_path / name)
    (tmp_path / "b" / ANCHORS_FILE).replace(tmp_path / "a" / ANCHORS_FILE)
    with raises_code("adapter-wrong-anchor", ANCHORS_FILE):
        load_adapter(tiny_llama()[0], tmp_path / "a", is_trainable=True)
    with raises_code("adapter-wrong-anchor", ANCHORS_FILE):
        apply_milora(tiny_llama()[0], one_rule()).load_adapter(str(tmp_path / "a"), "default")


def test_shards_that_the_training_code_does_not_convert_are_refused(tiny_llama) -> None:
    """DeepSpeed loads the module first and then its optimizer, whose flat shards hold A and B."""
    model = apply_milora(tiny_llama()[0], one_rule())
    raw = {name.replace("delta", "trained"): p for name, p in model.named_parameters()}  # ZeRO-3
    with raises_code("adapter-version-1-shards", hint="milora_vl.train"):
        model.load_state_dict(raw, strict=False)
    state = model.state_dict()
    for name, B0 in anchors(model).items():
        state[name.replace("anchor", "weight")] = torch.cat(
            [B0, B0 if "lora_A" in name else -B0], int("lora_B" in name)
        )
    model.load_state_dict(state)
    for parameter in model.parameters():
        parameter._hp_mapping = None  # ZeRO-2
    with raises_code("adapter-version-1-shards"):
        model.load_state_dict(state)
    model.converts_shards = True
    model.load_state_dict(state)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("delta"))
