"""What PEFT, PyTorch and users do to an adapter: right, or refused with a reason."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn

from milora_vl import apply_milora, load_adapter, save_adapter
from milora_vl.common import atomic_write
from milora_vl.core.adapter.anchored import joined_state
from milora_vl.core.adapter.lora import lora_layer
from support.adapter_cases import anchors, llava_batch, move, one_rule, token_batch, train_steps
from support.problems import raises_code

Q = "model.layers.0.self_attn.q_proj"
IDS = token_batch(200)


@pytest.fixture
def model(tiny_llama) -> nn.Module:
    made = apply_milora(tiny_llama()[0], one_rule(alpha=4))
    move(made)
    return made.eval()


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
        with raises_code("adapter-read-only-factor"):
            change()
    read = weight.detach().clone() + 0
    assert type(read) is torch.Tensor
    assert torch.equal(torch.zeros(4, 64).copy_(weight), read)


def test_padding_for_compiled_hot_swaps_never_lets_the_anchor_train(model, tmp_path: Path) -> None:
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    for use in (model.train, lambda: save_adapter(model, tmp_path)):
        with raises_code("adapter-replaced-factors"):
            use()


def test_merging_and_unmerging_twice(model) -> None:
    expected = model(IDS).logits
    model.merge_adapter()
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="(?i)already unmerged"):
        model.unmerge_adapter()
    assert torch.allclose(model(IDS).logits, expected, atol=1e-5)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_starts_at_the_base_and_trains(tiny_llama, dtype: torch.dtype) -> None:
    base, model = tiny_llama()[0], apply_milora(tiny_llama()[0], one_rule(dropout=0.1))
    with torch.autocast("cpu", dtype):
        assert torch.equal(model.train()(IDS).logits, base(IDS).logits)
        losses = train_steps(model.eval(), {"input_ids": IDS})
    assert losses[-1] < losses[0]


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


def test_files_in_subfolders_move_too(tmp_path: Path) -> None:
    with atomic_write.atomic_folder(tmp_path) as folder:
        (folder / "a").mkdir()
        (folder / "a" / "b").write_text("c", encoding="utf-8")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["a", "a/b"]


def test_a_state_dict_of_parameters_alone_is_saved_whole(model, tiny_llama, tmp_path: Path) -> None:
    """As LLaVA's train.py collects it: named_parameters with `lora_` in the name, which has no anchors."""
    state = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    model.save_pretrained(str(tmp_path), state_dict=state)
    assert torch.allclose(load_adapter(tiny_llama()[0], tmp_path)(IDS).logits, model(IDS).logits, atol=1e-6)
    assert joined_state({}) == {}
