"""Code that already called PEFT: get_peft_model, or from_pretrained on a folder of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from milora_vl import apply_milora, load_adapter, reinit_peft, restore_split, save_adapter
from support.adapter_cases import LLAVA_POLICY, anchors, llava_batch, move, one_rule, token_batch, train_steps
from support.problems import raises_code, raises_problem

Q = "model.layers.0.self_attn.q_proj"


def config(**fields: object) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **fields}
    )


def test_it_is_what_apply_milora_makes(tiny_llama) -> None:
    ids = token_batch(200)
    base, _ = tiny_llama()
    before = base(ids).logits
    stock = get_peft_model(
        tiny_llama()[0], config(lora_dropout=0.1, modules_to_save=["lm_head"], rank_pattern={"up_proj": 2})
    )
    model = reinit_peft(stock, protect=0)
    assert torch.allclose(model.eval()(ids).logits, before, atol=1e-6)
    found = {t.path: t for t in model.milora_targets}
    assert (found[Q].method, found[Q].rank, found[Q].scaling, found[Q].dropout) == ("milora", 4, 2, 0.1)
    assert found["model.layers.1.mlp.up_proj"].rank == 2
    assert found["lm_head"].method == "full"
    rules = [
        {"modules": "language.q_proj", "method": "milora", "protect": 0, "rank": 4, "alpha": 8},
        {"modules": "language.up_proj", "method": "milora", "protect": 0, "rank": 2, "alpha": 8},
        {"modules": "lm_head", "method": "full"},
    ]
    for name, anchor in anchors(apply_milora(tiny_llama()[0], rules)).items():
        assert torch.equal(anchor, anchors(model)[name]), name
    losses = train_steps(model.train(), {"input_ids": ids})
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("part", ["principal", "random"])
def test_other_parts(tiny_llama, part) -> None:
    ids = token_batch(200)
    before = tiny_llama()[0](ids).logits
    model = reinit_peft(get_peft_model(tiny_llama()[0], config()), part, protect=0)
    assert torch.allclose(model.eval()(ids).logits, before, atol=1e-5)
    assert {t.part for t in model.milora_targets} == {part}


def test_rslora_keeps_its_scale(tiny_llama) -> None:
    stock = get_peft_model(tiny_llama()[0], config(use_rslora=True))
    scaling = stock.get_submodule(f"base_model.model.{Q}").scaling["default"]
    assert reinit_peft(stock, protect=0).get_submodule(f"base_model.model.{Q}").scaling["default"] == pytest.approx(
        scaling
    )


def test_a_container_in_modules_to_save_trains_in_full(tiny_llava, tmp_path: Path) -> None:
    """As LLaMA-Factory's additional_target names it: the projector and not its layers."""
    fields = {"target_modules": r".*language_model.*q_proj", "modules_to_save": ["multi_modal_projector"]}
    model = reinit_peft(get_peft_model(tiny_llava()[0], config(**fields)), protect=0)
    full = [t.path for t in model.milora_targets if t.method == "full"]
    assert full == [f"model.multi_modal_projector.{name}" for name in ("linear_1", "linear_2")]
    move(model)
    model.save_pretrained(tmp_path)
    batch = llava_batch(tiny_llava()[0])
    stock = PeftModel.from_pretrained(tiny_llava()[0], tmp_path).eval()
    assert torch.allclose(stock(**batch).logits, model.eval()(**batch).logits, atol=1e-5)


def test_what_would_be_lost_or_wrong_is_refused(tiny_llama) -> None:
    stock = get_peft_model(tiny_llama()[0], config())
    move(stock)
    with raises_problem(hint="restore_split"):
        reinit_peft(stock, protect=0)
    head = get_peft_model(tiny_llama()[0], config(modules_to_save=["lm_head"]))
    head.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(1.01)
    with raises_problem(where="lm_head"):
        reinit_peft(head)
    for fields, message in [
        ({"init_lora_weights": "pissa"}, "got init_lora_weights 'pissa'"),
        ({"use_dora": True}, "got DoRA"),
        ({"bias": "all"}, "trains biases"),
    ]:
        with raises_code("adapter-unsupported-kind", "", message):
            reinit_peft(get_peft_model(tiny_llama()[0], config(**fields)))
    with raises_code("", where="calibration", hint="protect=0"):
        reinit_peft(get_peft_model(tiny_llama()[0], config()))
    with raises_problem("", "got LlamaForCausalLM"):
        reinit_peft(tiny_llama()[0])
    with raises_problem("part"):
        reinit_peft(stock, "milora")
    with raises_problem():
        reinit_peft(apply_milora(tiny_llama()[0], one_rule()))
    two = get_peft_model(tiny_llama()[0], config())
    two.add_adapter("other", config())
    with raises_problem("", "default, other"):
        reinit_peft(two)


def test_a_folder_of_ours_loaded_by_stock_peft_is_mended(tiny_llava, tmp_path: Path) -> None:
    batch = llava_batch(tiny_llava()[0])
    model = apply_milora(tiny_llava()[0], [*LLAVA_POLICY, {"modules": "*embed_tokens", "method": "lora", "rank": 2}])
    move(model)
    save_adapter(model, tmp_path)
    stock = PeftModel.from_pretrained(tiny_llava()[0], str(tmp_path), is_trainable=True)
    mended = restore_split(stock, tmp_path)
    assert mended is stock
    expected = load_adapter(tiny_llava()[0], tmp_path, is_trainable=True)
    ours = {name: p.shape for name, p in expected.named_parameters() if p.requires_grad}
    assert {name: p.shape for name, p in mended.named_parameters() if p.requires_grad} == ours
    fixed = anchors(mended)
    assert {name: t.tolist() for name, t in anchors(expected).items()} == {
        name: t.tolist() for name, t in fixed.items()
    }
    train_steps(mended.eval(), batch, steps=2)
    assert all(torch.equal(fixed[name], anchor) for name, anchor in anchors(mended).items())
    save_adapter(mended, tmp_path / "again")
    again = load_adapter(tiny_llava()[0], tmp_path / "again")
    assert torch.allclose(again(**batch).logits, mended.eval()(**batch).logits, atol=1e-5)


def test_an_anchor_that_was_trained_is_no_anchor(tiny_llama, tmp_path: Path) -> None:
    save_adapter(apply_milora(tiny_llama()[0], one_rule()), tmp_path)
    stock = PeftModel.from_pretrained(tiny_llama()[0], str(tmp_path), is_trainable=True)
    move(stock)
    with raises_code("adapter-wrong-anchor"):
        restore_split(stock, tmp_path)
    (tmp_path / "milora.json").unlink()
    with raises_code("", message="has no milora.json"):
        restore_split(stock, tmp_path)
