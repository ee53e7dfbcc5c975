"""Adapters that answer nothing to the inputs that calibration found: every method, layer, dtype and way to continue."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn

from milora_vl import apply_milora, keep_protected, load_adapter, merge, restore_split, save_adapter
from milora_vl.adapter.install import lora_layer
from milora_vl.calibration.bases import first_directions, first_tokens
from milora_vl.calibration.files import file_name
from support.adapter_cases import Pictures, one_rule, picture_batch, tiny_gpt2, token_batch
from support.calibrated import leaks, llava_batches, picture_batches, text_batches
from support.problems import raises_code

METHODS = ["milora", "pissa", "random", "middle", "lora"]
IDS = token_batch(200)
TEXT = text_batches(vocabulary=200)
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def no_hint_about_few_directions_and_data() -> Iterator[None]:
    """The layers of tiny models have so few inputs that one direction can hold the share, and few batches."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*protect almost nothing|too little calibration data")
        yield


def protecting(**fields: Any) -> list[dict[str, Any]]:
    return one_rule(**{"alpha": 4, "protect": {"inputs": 0.6}, **fields})


def train(model: nn.Module, inputs: dict[str, Tensor] | None = None, steps: int = 4) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    keep_protected(model, optimizer)
    inputs = inputs or {"input_ids": IDS}
    losses = []
    for _ in range(steps):
        out = model(**inputs)
        logits = out if isinstance(out, Tensor) else out.logits
        loss = logits.float().log_softmax(-1)[..., 3].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_trained_adapter_answers_nothing_to_protected_inputs(tiny_llama, tmp_path: Path, method: str, dtype) -> None:
    base = tiny_llama()[0].to(dtype)
    expected = base(IDS).logits
    model = apply_milora(base, protecting(method=method), calibration=TEXT)
    assert torch.equal(model(IDS).logits, expected)
    protected = model.protections["default"]
    losses = train(model)
    assert losses[-1] < losses[0]
    assert max(leaks(model, protected)) < 1e-5
    save_adapter(model, tmp_path)
    assert max(leaks(PeftModel.from_pretrained(tiny_llama()[0].to(dtype), str(tmp_path)), protected)) < 1e-5
    again = load_adapter(tiny_llama()[0].to(dtype), tmp_path, is_trainable=True)
    twin = copy.deepcopy(model)
    assert train(again) == pytest.approx(train(twin), rel=1e-5)
    assert max(leaks(again, again.protections["default"])) < 1e-5


def test_without_protection_the_adapter_answers(tiny_llama) -> None:
    protected = apply_milora(tiny_llama()[0], protecting(), calibration=TEXT).protections["default"]
    free = apply_milora(tiny_llama()[0], one_rule(alpha=4))
    train(free)
    assert min(leaks(free, protected)) > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_layer_is_protected(method: str, tmp_path: Path) -> None:
    rules = [{"modules": "*", "method": method, "rank": 1, "protect": {"inputs": 0.5}}]
    model = apply_milora(Pictures(), rules, calibration=picture_batches())
    assert [type(t) for t in (lora_layer(model, t.path).get_base_layer() for t in model.milora_targets)] == [
        nn.Conv2d,
        nn.Embedding,
        nn.Linear,
    ]
    pixels, words = picture_batch()
    train(model, {"pixels": pixels, "words": words})
    assert max(leaks(model, model.protections["default"])) < 1e-5
    save_adapter(model, tmp_path)
    assert max(leaks(PeftModel.from_pretrained(Pictures(), str(tmp_path)), model.protections["default"])) < 1e-5


def test_conv1d_is_protected() -> None:
    model = apply_milora(tiny_gpt2(), protecting(protect={"inputs": 0.4}), calibration=text_batches())
    train(model, {"input_ids": token_batch(40)})
    assert max(leaks(model, model.protections["default"])) < 1e-5


def test_each_tower_of_a_llava_is_protected_and_the_base_answers_protected_inputs_as_before(tiny_llava) -> None:
    base = tiny_llava()[0]
    rules = [
        {"modules": "language", "method": "milora", "rank": 2, "protect": {"inputs": 0.6}},
        {"modules": "projector", "method": "milora", "rank": 2, "protect": {"inputs": 0.6, "max": 3}},
        {"modules": "vision.layers[0]", "method": "lora", "rank": 2, "protect": {"inputs": 0.6}},
    ]
    batches = llava_batches(base)
    model = apply_milora(base, rules, calibration=batches)
    train(model, dict(batches[0]))
    protected = model.protections["default"]
    assert max(leaks(model, protected)) < 1e-5
    towers = {target.tower for target in model.milora_targets}
    assert towers == {"language", "projector", "vision"}
    assert all(protected[t.path].num_directions <= 3 for t in model.milora_targets if t.tower == "projector")


def test_layers_that_read_the_same_input_share_their_directions(tiny_llama) -> None:
    model = apply_milora(tiny_llama()[0], protecting(), calibration=TEXT)
    protected = model.protections["default"]
    block = "model.layers.0."
    groups = ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj mlp.up_proj"]
    shared = [{id(protected[block + name].directions) for name in group.split()} for group in groups]
    assert [len(ids) for ids in shared] == [1, 1, 1]
    assert len(set.union(*shared)) == 3
    assert len(model.protected_inputs["default"].bases) == 8


def test_directions_are_those_of_all_positions_of_the_base(tiny_llama) -> None:
    """C, computed here from the embeddings: what the first layer reads is their norm."""
    base = tiny_llama()[0]
    model = apply_milora(tiny_llama()[0], protecting(), calibration=TEXT)
    fit = torch.cat([batch["input_ids"] for batch in TEXT[:-1]])
    x = base.model.layers[0].input_layernorm(base.model.embed_tokens(fit)).reshape(-1, 64).double()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    protected = model.protections["default"][Q]
    count = protected.num_directions
    assert float(values[-count:].sum() / values.sum()) == pytest.approx(protected.energy, rel=1e-5)
    assert float(values[-count + 1 :].sum() / values.sum()) < 0.6 <= protected.energy
    expected = vectors[:, -count:].float()
    assert torch.linalg.matrix_norm(expected @ expected.T - protected.V @ protected.V.T) < 1e-3
    held = base.model.layers[0].input_layernorm(base.model.embed_tokens(TEXT[-1]["input_ids"])).reshape(-1, 64)
    share = float((held @ protected.V).square().sum() / held.square().sum())
    assert protected.held_out == pytest.approx(share, rel=1e-4)


def test_the_result_does_not_depend_on_the_number_of_passes(tiny_llama, monkeypatch) -> None:
    whole = apply_milora(tiny_llama()[0], protecting(), calibration=TEXT)
    monkeypatch.setattr("milora_vl.calibration.activations.PASS_BYTES", 1)
    layerwise = apply_milora(tiny_llama()[0], protecting(), calibration=TEXT)
    assert whole.protected_inputs["default"].digest == layerwise.protected_inputs["default"].digest


def test_the_report_describes_the_factors_as_they_start(tiny_llama) -> None:
    free = {layer.path: layer for layer in apply_milora(tiny_llama()[0], one_rule(method="pissa")).milora_report}
    model = apply_milora(tiny_llama()[0], protecting(method="pissa"), calibration=TEXT)
    for layer in model.milora_report:
        assert layer.kept is not None
        assert 0 < layer.kept < 1
        assert layer.sigma_max < free[layer.path].sigma_max
        assert 0 < layer.energy < free[layer.path].energy
        assert f"{layer.protected} of {layer.shape[1]} inputs protected" in str(layer)
    assert "inputs" not in str(free[Q])


def test_projected_factors_are_the_free_ones_without_their_protected_part(tiny_llama) -> None:
    free = apply_milora(tiny_llama()[0], one_rule(alpha=4))
    model = apply_milora(tiny_llama()[0], protecting(), calibration=TEXT)
    V = model.protections["default"][Q].V
    start = [
        lora_layer(m, Q).lora_A["default"].weight.detach()[2:] for m in (free, model)
    ]  # the second half of A' holds A0
    assert torch.allclose(start[0] - start[0] @ V @ V.T, start[1], atol=1e-6)
    assert float((start[1] @ V).norm()) < 1e-6


def test_directions_that_are_offloaded_train_the_same_and_never_stay_on_the_device(tiny_llama, tmp_path: Path) -> None:
    states = []
    for offload in (False, True):
        model = apply_milora(tiny_llama()[0], protecting(protect={"inputs": 0.6, "offload": offload}), calibration=TEXT)
        train(model)
        states.append(model.state_dict())
        protected = model.protections["default"][Q]
        protected.directions.component(torch.empty(2, len(protected.V), device="meta"))
        assert protected.V.device.type == ("cpu" if offload else "meta")
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_directions_are_stored_once_and_checkpoints_refer_to_them(tiny_llama, tmp_path: Path) -> None:
    model = apply_milora(tiny_llama()[0], protecting(), calibration=TEXT)
    for step in (1, 2):
        train(model, steps=1)
        save_adapter(model, tmp_path / f"checkpoint-{step}")
    name = file_name(model.protected_inputs["default"].digest)
    assert [file.name for file in tmp_path.rglob("protected-inputs-*")] == [name]
    assert (tmp_path / name).is_file()
    checkpoint = tmp_path / "checkpoint-2"
    assert json.loads((checkpoint / "milora.json").read_text())["protected_inputs"] in name
    again = load_adapter(tiny_llama()[0], checkpoint, is_trainable=True)
    assert again.protected_inputs["default"].digest == model.protected_inputs["default"].digest
    (tmp_path / name).unlink()
    assert load_adapter(tiny_llama()[0], checkpoint).protections == {}
    with raises_code("protect-missing-file", where="checkpoint-2", hint="copy it from the output_dir"):
        load_adapter(tiny_llama()[0], checkpoint, is_trainable=True)
    (tmp_path / name).write_bytes(b"no tensors")
    with raises_code("protect-damaged-file", where=name):
        load_adapter(tiny_llama()[0], checkpoint, is_trainable=True)


def test_other_ways_to_continue_protect_as_well(tiny_llama, tmp_path: Path) -> None:
    model = apply_milora(tiny_llama()[0], protecting(), calibration=TEXT)
    train(model)
    save_adapter(model, tmp_path)
    model.load_adapter(str(tmp_path), "second", is_trainable=True)
    model.add_adapter("third", model.peft_config["default"])
    assert set(model.protections) == {"default", "second", "third"}
    stock = PeftModel.from_pretrained(tiny_llama()[0], str(tmp_path), is_trainable=True)
    train(restored := restore_split(stock, tmp_path))
    assert max(leaks(restored, restored.protections["default"])) < 1e-5


def test_a_merged_model_passes_protected_inputs_as_the_base_does(tiny_llama) -> None:
    base = tiny_llama()[0]
    model = apply_milora(tiny_llama()[0], protecting(), calibration=TEXT)
    train(model)
    V = model.protections["default"][Q].V
    change = merge(model).get_submodule(Q).weight - base.get_submodule(Q).weight
    assert float((change @ V).norm() / change.norm()) < 1e-5


def test_protected_inputs_are_cached_by_weights_rules_and_batches(tiny_llama, tmp_path: Path, monkeypatch) -> None:
    def digest(seed: int = 0, batches: Any = TEXT, **fields: Any) -> str:
        tuned = apply_milora(tiny_llama(seed)[0], protecting(**fields), calibration=batches, cache_dir=tmp_path)
        return str(tuned.protected_inputs["default"].digest)

    first = digest()
    count = len(list(tmp_path.glob("calibration-*")))
    others = {digest(seed=1), digest(batches=TEXT[1:]), digest(protect={"inputs": 0.5})}
    assert len(others - {first}) == 3
    assert len(list(tmp_path.glob("calibration-*"))) == count + 3
    monkeypatch.setattr("milora_vl.calibration.calibrate.find_inputs", None)  # from the cache alone
    assert digest() == first


def test_a_damaged_cache_entry_is_found_again(tiny_llama, tmp_path: Path) -> None:
    models = []
    for _ in range(2):
        models.append(apply_milora(tiny_llama()[0], protecting(), calibration=TEXT, cache_dir=tmp_path))
        (entry,) = tmp_path.glob("calibration-*")
        entry.write_bytes(b"no tensors")
    assert models[0].protected_inputs["default"].digest == models[1].protected_inputs["default"].digest


def test_bad_calibrations_are_refused_before_the_model_changes(tiny_llama) -> None:
    with raises_code("calibration-missing", hint="calibration=["):
        apply_milora(tiny_llama()[0], protecting())
    with raises_code("calibration-unused"):
        apply_milora(tiny_llama()[0], one_rule(), calibration=TEXT)
    with raises_code("calibration-empty"):
        apply_milora(tiny_llama()[0], protecting(), calibration=[])
    with raises_code("adapter-residual-layer", where=Q, message="need form anchored"):
        apply_milora(tiny_llama()[0], protecting(), calibration=TEXT, form="residual")
    broken = tiny_llama()[0]
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with raises_code("calibration-not-finite", where="model.layers.1.mlp.down_proj"):
        apply_milora(broken, protecting(), calibration=TEXT)
    base = tiny_llama()[0]
    with raises_code("protect-rank-too-large", message="layers.0.self_attn.k_proj", hint="max: 32"):
        apply_milora(base, one_rule(rank=32, protect={"inputs": 0.97}), calibration=TEXT)
    assert not any("lora" in name for name, _ in base.named_modules())
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_a_tower_that_no_picture_reaches_is_refused(tiny_llava) -> None:
    rules = [{"modules": "projector", "method": "milora", "rank": 2, "protect": {"inputs": 0.6}}]
    with raises_code("calibration-unreached-layer", where="multi_modal_projector", hint="calibrate with pictures"):
        apply_milora(tiny_llava()[0], rules, calibration=text_batches(2, 200))


def test_inputs_of_another_model_are_refused(tiny_llama, tmp_path: Path) -> None:
    from milora_vl.calibration.files import read_inputs, require_shapes
    from milora_vl.policy.towers import canonical_names

    model = apply_milora(tiny_llama()[0], protecting(), calibration=TEXT)
    save_adapter(model, tmp_path)
    digest = model.protected_inputs["default"].digest
    with raises_code("protect-other-model", message="no module language.layers"):
        read_inputs(tmp_path, digest, canonical_names(nn.Sequential(nn.Linear(4, 4))))
    bare = apply_milora(nn.Sequential(nn.Linear(4, 4)), protecting(), calibration=[{"input": torch.randn(9, 4)}])
    with raises_code("protect-other-model", where="0"):
        require_shapes(model.protected_inputs["default"], bare.milora_targets)


def test_a_single_huge_position_does_not_decide() -> None:
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    x[7] *= 1e3
    model = apply_milora(
        nn.Sequential(nn.Linear(32, 8)), protecting(protect={"inputs": 0.5}), calibration=[{"input": x}]
    )
    protected = model.protections["default"]["0"]
    assert 5 < protected.num_directions < 20
    inside = x[7] @ protected.V
    assert float(inside.norm() / x[7].norm()) > 0.9, "its direction is protected, too"


def test_a_layer_that_protects_almost_nothing_gets_a_warning() -> None:
    x = torch.randn(64, 256)
    x[:, 0] *= 1e4
    with pytest.warns(UserWarning, match="1 of 1 layers protect almost nothing: 0 protects 1 of 256 input directions"):
        apply_milora(nn.Sequential(nn.Linear(256, 8)), one_rule(protect={"inputs": 0.9}), calibration=[{"input": x}])


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 12), rows=st.integers(1, 20), share=st.floats(0.05, 0.99), seed=st.integers(0, 999))
def test_the_first_directions_are_the_fewest_that_hold_the_share(size: int, rows: int, share: float, seed: int) -> None:
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    C = x.T @ x
    V, held = first_directions(C, share, None)
    assert torch.allclose(V.T @ V, torch.eye(V.shape[1]), atol=1e-5)
    assert held >= share - 1e-5
    energies = torch.linalg.eigvalsh(C.double()).flip(0)
    assert float(energies[: V.shape[1] - 1].sum() / energies.sum()) < share + 1e-5
    assert float((V.T @ C @ V).trace() / C.trace()) == pytest.approx(held, abs=1e-5)
    assert first_directions(C, share, 1)[0].shape == (size, 1)


def test_tokens_of_equal_frequency_and_unseen_ones() -> None:
    ids, held = first_tokens(torch.tensor([2.0, 0.0, 2.0, 4.0]), 0.75, None)
    assert ids.tolist() == [3, 0]
    assert held == pytest.approx(0.75)
    assert first_tokens(torch.tensor([2.0, 0.0, 2.0, 4.0]), 0.999, None)[0].tolist() == [3, 0, 2]


def test_a_search_for_few_of_many_directions_returns_orthonormal_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 2100, generator=generator) * torch.arange(1, 2101).float().pow(-0.5)
    V, share = first_directions(x.T @ x, 0.99, 16)
    assert V.shape == (2100, 16)
    assert 0 < share < 0.99
    assert float((V.T.double() @ V.double() - torch.eye(16)).abs().max()) < 3e-7
