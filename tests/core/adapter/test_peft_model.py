"""What PEFT, PyTorch, trainers and users do to an adapter: right, or refused with a reason."""

from __future__ import annotations

import copy
import pickle
import socket
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from milora_vl import apply_milora, load_adapter, reinit_peft, restore_split, save_adapter
from milora_vl.core.adapter.anchored import has_anchor
from milora_vl.core.adapter.lora import lora_layer
from milora_vl.core.weights.tensor_files import weights_digest
from support.adapter_cases import LLAVA_POLICY, anchors, llava_batch, move, one_rule, token_batch, train_steps
from support.problems import raises_code, raises_problem


@pytest.fixture
def model(tiny_llama):
    made = apply_milora(tiny_llama()[0], one_rule(alpha=4))
    move(made)
    return made.eval()


def test_disabling_the_adapter_gives_the_base_and_leaves_the_anchors_through_more_training(model, tiny_llama) -> None:
    ids = token_batch(200)
    base, before = tiny_llama()[0], anchors(model)
    tuned = model(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base(ids).logits)
        with model.disable_adapter():
            pass
    assert torch.equal(model(ids).logits, tuned)
    train_steps(model.train(), {"input_ids": ids})
    after = anchors(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(model.eval()(ids).logits, tuned)


def test_the_key_of_a_model_follows_all_that_its_output_depends_on(tiny_llama) -> None:
    """An adapter that trained on, a buffer, a config or one value of a weight: other answers, and another key."""
    base = tiny_llama()[0]
    plain, whole = weights_digest(base), weights_digest(tiny_llama(seed=1)[0])
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_llama()[0], config)
    keys = {plain, whole, weights_digest(model)}
    with model.disable_adapter():
        assert weights_digest(model) == weights_digest(tiny_llama()[0]) == plain
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name)[-1, -1] += 1
    keys.add(weights_digest(model))
    lora_layer(model, "model.layers.0.self_attn.q_proj").scaling["default"] *= 2
    keys.add(weights_digest(model))
    base.generation_config.repetition_penalty = 1.5
    keys.add(weights_digest(base))
    base.config.rms_norm_eps *= 2
    keys.add(weights_digest(base))
    next(base.buffers()).mul_(2)
    keys.add(weights_digest(base))
    keys.add(weights_digest(base.bfloat16()))
    assert len(keys) == 9


def test_unload_gives_the_base_also_where_modules_trained_in_full(tiny_llama) -> None:
    model = apply_milora(tiny_llama()[0], [*one_rule(), {"modules": "lm_head", "method": "full"}])
    train_steps(model.train(), {"input_ids": token_batch(200)})
    base, unloaded = tiny_llama()[0].state_dict(), model.unload().state_dict()
    assert base.keys() == unloaded.keys()
    assert all(torch.equal(base[name], unloaded[name]) for name in base)


def test_an_adapter_added_with_our_config_has_the_same_anchor_and_its_own_difference(model) -> None:
    """As TRL's trainers make their reference: add_adapter, then copy every `.default.` parameter to `.ref.`."""
    ids = token_batch(200)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    expected = model(ids).logits
    model.set_adapter("ref")
    assert torch.equal(model(ids).logits, expected)
    model.set_adapter("default")
    train_steps(model.train(), {"input_ids": ids})
    model.eval().set_adapter("ref")
    assert torch.equal(model(ids).logits, expected)
    assert len({a.data_ptr() for a in model.buffers() if a.ndim == 2}) == 56


def test_a_foreign_adapter_beside_ours_is_stock(model, tmp_path: Path) -> None:
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    assert not has_anchor(lora_layer(model, "model.layers.0.self_attn.q_proj"), "plain")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "milora.json").is_file()
    assert (tmp_path / "plain" / "adapter_config.json").is_file()
    assert not (tmp_path / "plain" / "milora.json").exists()
    model.delete_adapter("plain")
    model.delete_adapter("default")
    assert model.sidecars == {}


def test_loading_under_a_new_name_gives_a_second_adapter_with_an_anchor(model, tiny_llama, tmp_path: Path) -> None:
    save_adapter(model, tmp_path)
    ids = token_batch(200)
    expected = model(ids).logits
    other = apply_milora(tiny_llama()[0], one_rule(alpha=4))
    other.load_adapter(str(tmp_path), "second", is_trainable=True)
    assert has_anchor(lora_layer(other, "model.layers.0.self_attn.q_proj"), "second")
    assert not torch.equal(other(ids).logits, expected)
    other.set_adapter("second")
    assert torch.equal(other.eval()(ids).logits, expected)
    assert {n.split(".")[-2] for n, p in other.named_parameters() if p.requires_grad} == {"second"}


def test_loading_into_the_adapter_of_the_same_name_puts_difference_and_anchor_back(model, tiny_llama, tmp_path) -> None:
    """What the HF Trainer does on resume and for load_best_model_at_end."""
    save_adapter(model, tmp_path)
    fresh = apply_milora(tiny_llama()[0], one_rule(alpha=4, method="pissa"))  # other anchors
    assert not all(torch.equal(anchors(fresh)[name], anchor) for name, anchor in anchors(model).items())
    fresh.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert all(torch.equal(anchors(fresh)[name], anchor) for name, anchor in anchors(model).items())
    ids = token_batch(200)
    assert torch.equal(fresh(ids).logits, model(ids).logits)
    assert {n.split(".")[-1] for n, p in fresh.named_parameters() if p.requires_grad} == {"delta"}


def test_what_would_replace_the_anchor_is_refused(model, tiny_llama, tmp_path: Path) -> None:
    save_adapter(model, tmp_path / "ours")
    (tmp_path / "ours" / "milora.json").unlink()
    with raises_code("", says="milora.json"):
        model.load_adapter(str(tmp_path / "ours"), "default", is_trainable=True)
    save_adapter(apply_milora(tiny_llama()[0], one_rule(rank=3)), tmp_path / "three")
    with raises_problem():
        model.load_adapter(str(tmp_path / "three"), "default")
    with raises_code("adapter-wrong-base"):
        apply_milora(tiny_llama(seed=1)[0], one_rule()).load_adapter(str(tmp_path / "three"), "second")


def test_a_gathered_state_dict_with_raw_names_is_saved_joined(tiny_llava, tmp_path: Path) -> None:
    """ZeRO-3's consolidated dict; the projector passes through."""
    from safetensors.torch import load_file

    made = apply_milora(tiny_llava()[0], LLAVA_POLICY)
    move(made)
    raw = {name: t.detach() for name, t in (*made.named_parameters(), *made.named_buffers())}
    made.save_pretrained(str(tmp_path / "raw"), state_dict=raw)
    made.save_pretrained(str(tmp_path / "stock"))
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("raw", "stock"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert [key for key in first if "multi_modal_projector" in key]


def test_saving_asks_no_hub_and_notices_a_grown_vocabulary(tiny_llama, tmp_path, monkeypatch) -> None:
    """A save on a machine without a network must not wait for one; resized embeddings still travel along."""

    def refuse(*_: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    base, tokenizer = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = "someone/a-model"
    rules = [{"modules": "language", "method": "milora", "protect": 0, "rank": 2}]
    save_adapter(apply_milora(base, rules), tmp_path / "a")

    base, tokenizer = tiny_llama()
    base.name_or_path = str(tmp_path / "base")
    base.resize_token_embeddings(len(tokenizer) + 3, mean_resizing=False)
    save_adapter(apply_milora(base, rules), tmp_path / "b")
    keys = [set(load_file(tmp_path / name / "adapter_model.safetensors")) for name in "ab"]
    assert sum("embed_tokens" in key for key in keys[0]) == 0
    assert sum("embed_tokens" in key for key in keys[1]) == 1


Q = "model.layers.0.self_attn.q_proj"


IDS = token_batch(200)


def test_weight_surgery_on_the_joined_factor_is_refused(model) -> None:
    layer = lora_layer(model, Q)
    weight = layer.lora_A["default"].weight
    for change in (
        lambda: layer.reset_lora_parameters("default", True),
        lambda: weight.data.zero_(),
        lambda: weight.data[:1].fill_(0),
        lambda: weight.__setitem__(0, 1.0),
        lambda: weight.copy_(torch.zeros(4, 64)),
        lambda: setattr(weight, "data", torch.zeros(4, 64)),
        lambda: nn.init.ones_(weight),
    ):
        with raises_problem():
            change()
    read = weight.detach().clone() + 0
    assert type(read) is torch.Tensor
    assert torch.equal(torch.zeros(4, 64).copy_(weight), read)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_on_by_themselves(model, how) -> None:
    before, twin = model(IDS).logits, how(model)
    assert torch.equal(twin(IDS).logits, before)
    assert twin.sidecars == model.sidecars
    fixed = anchors(twin)
    train_steps(twin, {"input_ids": IDS})
    assert torch.equal(model(IDS).logits, before)
    assert not torch.allclose(twin(IDS).logits, before, atol=1e-3)
    assert all(torch.equal(fixed[name], anchor) for name, anchor in anchors(twin).items())


def test_a_compiled_model_is_the_same_and_trains(tiny_llama) -> None:
    model, twin = (apply_milora(tiny_llama()[0], one_rule()) for _ in range(2))
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    batch = {"input_ids": IDS}
    assert train_steps(compiled, batch) == pytest.approx(train_steps(model, batch), abs=1e-5)


def test_gradient_checkpointing_in_both_kinds_is_the_same(tiny_llava) -> None:
    batch = llava_batch(tiny_llava()[0])
    losses = []
    for kind in (None, True, False):
        model = apply_milora(tiny_llava()[0], one_rule())
        if kind is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind})
        losses.append(train_steps(model.train(), batch))
    assert losses[1:] == [pytest.approx(losses[0], abs=1e-5)] * 2
    assert losses[0][-1] < losses[0][0]


def test_an_interrupted_save_leaves_the_files_of_before(model, tmp_path: Path, monkeypatch) -> None:
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    move(model)
    with monkeypatch.context() as patch:
        patch.setattr("milora_vl.core.adapter.sidecar.Sidecar.to_json", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nmine\n", encoding="utf-8")
    save_adapter(model, tmp_path)
    assert "mine" in (tmp_path / "README.md").read_text(encoding="utf-8")


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
