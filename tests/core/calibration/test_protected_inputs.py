"""The calibration finds the input directions that hold a share of a layer's energy; its positions, cache, errors."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from milora_vl import apply_milora
from milora_vl.core.adapter.fixed_a import calibration_key
from milora_vl.core.calibration.activations import for_each_input
from milora_vl.core.calibration.bases import InputBasis, first_directions, positions_of
from milora_vl.core.calibration.texts import _Draw
from milora_vl.core.policy import Policy
from support.adapter_cases import one_rule
from support.calibrated import protecting, text_batches
from support.problems import raises_code, raises_problem

TEXT = text_batches(vocabulary=200)
Q = "model.layers.0.self_attn.q_proj"


pytestmark = pytest.mark.filterwarnings("ignore:too little calibration data")  # few batches


def found(base: nn.Module, batches: Any = TEXT, **fields: Any) -> dict[str, InputBasis]:
    return for_each_input(base, Policy.parse(protecting(**fields)).resolve(base), batches, lambda _, __, inputs: inputs)


def starts(model: Any) -> dict[str, torch.Tensor]:
    """Every fixed A, by name."""
    return {name: buffer for name, buffer in model.named_buffers() if ".lora_A." in name}


def test_layers_that_read_the_same_input_share_their_directions(tiny_llama) -> None:
    inputs = found(tiny_llama()[0])
    block = "model.layers.0."
    groups = ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj mlp.up_proj"]
    shared = [{id(inputs[block + name]) for name in group.split()} for group in groups]
    assert [len(numbers) for numbers in shared] == [1, 1, 1]
    assert len(set.union(*shared)) == 3
    assert len(set(map(id, inputs.values()))) == 8


def test_directions_are_those_of_all_positions_of_the_base(tiny_llama) -> None:
    """C, computed here from the embeddings: what the first layer reads is their norm."""
    base = tiny_llama()[0]
    basis = found(base)[Q]
    fit = torch.cat([batch["input_ids"] for batch in TEXT[:-1]])
    x = base.model.layers[0].input_layernorm(base.model.embed_tokens(fit)).reshape(-1, 64).double()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    count = basis.V.shape[1]
    assert float(values[-count:].sum() / values.sum()) == pytest.approx(basis.share, rel=1e-5)
    assert float(values[-count + 1 :].sum() / values.sum()) < 0.6 <= basis.share
    expected = vectors[:, -count:].float()
    assert torch.linalg.matrix_norm(expected @ expected.T - basis.V @ basis.V.T) < 1e-3
    held = base.model.layers[0].input_layernorm(base.model.embed_tokens(TEXT[-1]["input_ids"])).reshape(-1, 64)
    share = float((held @ basis.V).square().sum() / held.square().sum())
    assert basis.held_out == pytest.approx(share, rel=1e-4)


def test_a_calibration_makes_the_logits_of_one_position(tiny_llama) -> None:
    base, lengths = tiny_llama()[0], list[int]()
    base.lm_head.register_forward_hook(lambda module, args, logits: lengths.append(logits.shape[1]))
    apply_milora(base, protecting(), calibration=[{**batch, "labels": batch["input_ids"]} for batch in TEXT])
    assert set(lengths) == {1}


def test_the_result_does_not_depend_on_the_number_of_passes(tiny_llama, monkeypatch) -> None:
    whole = found(tiny_llama()[0])
    monkeypatch.setattr("milora_vl.core.calibration.activations.free_memory", lambda _: 1)
    layerwise = found(tiny_llama()[0])
    assert all(torch.equal(one.V, layerwise[path].V) for path, one in whole.items())


def test_the_protection_of_a_model_says_what_the_calibration_found(tiny_llama) -> None:
    base = tiny_llama()[0]
    inputs = found(base)
    model = apply_milora(base, protecting(), calibration=TEXT)
    assert list(model.milora_protection) == [target.path for target in model.milora_targets]
    for path, protection in model.milora_protection.items():
        basis = inputs[path]
        assert (protection.directions, protection.inputs) == (basis.V.shape[1], len(basis.V))
        assert (protection.energy, protection.held_out) == (basis.share, basis.held_out)
        assert 0 < protection.kept < 1
        assert protection.overlap < 1e-6


def test_protected_inputs_are_cached_by_weights_rules_and_batches(tiny_llama, tmp_path: Path, monkeypatch) -> None:
    def tuned(seed: int = 0, batches: Any = TEXT, **fields: Any) -> Any:
        return apply_milora(tiny_llama(seed)[0], protecting(**fields), calibration=batches, cache_dir=tmp_path)

    first = tuned()
    count = len(list(tmp_path.glob("calibration-*")))
    same = tiny_llama()[0]
    same.config.rms_norm_eps *= 2
    assert calibration_key(same, first.milora_targets, TEXT) != calibration_key(
        tiny_llama()[0], first.milora_targets, TEXT
    )
    for other in (tuned(seed=1), tuned(batches=TEXT[1:]), tuned(protect=0.5)):
        assert other.milora_protection != first.milora_protection
    assert len(list(tmp_path.glob("calibration-*"))) == count + 3
    about = {path: asdict(one) for path, one in first.milora_protection.items()}
    wrong = {path: one | {"directions": "3"} for path, one in about.items()}
    same, half, flat = torch.Tensor.clone, torch.Tensor.half, torch.Tensor.flatten
    for change, content in ((half, about), (flat, about), (same, wrong), (same, [])):  # entries that do not fit
        for file in tmp_path.glob("calibration-*"):
            tensors = {path: change(A) for path, A in load_file(file).items()}
            save_file(tensors, file, metadata={"content": json.dumps(content)})
        again = tuned()
        assert again.milora_protection == first.milora_protection
        assert all(torch.equal(A, starts(again)[name]) for name, A in starts(first).items())
    monkeypatch.setattr("milora_vl.core.adapter.fixed_a.for_each_input", None)  # from the cache alone
    assert tuned().milora_protection == first.milora_protection


def test_bad_calibrations_are_refused_before_the_model_changes(tiny_llama) -> None:
    for rules in (protecting(), [{"modules": "language", "method": "milora", "rank": 2}]):  # the default protects
        with raises_code("", where="calibration", hint="calibration=calibration_texts(model)"):
            apply_milora(tiny_llama()[0], rules)
    with raises_problem():
        apply_milora(tiny_llama()[0], one_rule(), calibration=TEXT)
    with raises_code("", where="calibration"):
        apply_milora(tiny_llama()[0], protecting(), calibration=[])
    for name, first in (("mlp.up_proj", "mlp.up_proj"), ("input_layernorm", "self_attn.q_proj")):
        broken = tiny_llama()[0]
        broken.get_submodule(f"model.layers.1.{name}").weight.data.view(-1)[0] = torch.nan
        with raises_problem(where=f"model.layers.1.{first}"):
            apply_milora(broken, protecting(), calibration=TEXT)
    assert not any("lora" in name for name, _ in broken.named_modules())
    assert not any(module._forward_pre_hooks for module in broken.modules())
    with raises_code("policy-rank-too-large", where="policy[0].rank"):  # no share leaves so many directions
        apply_milora(
            tiny_llama()[0], one_rule(modules="lm_head", method="lora", rank=300, protect=0.6), calibration=TEXT
        )


def test_a_layer_whose_rank_needs_the_protected_directions_protects_a_lower_share(tiny_llama, tmp_path: Path) -> None:
    rules = [
        *protecting(rank=24, protect=0.97, method="lora"),
        {"modules": "language.layers[0].self_attn.k_proj", "rank": 2},
    ]
    with pytest.warns(UserWarning, match=r"of 14 layers protect less .* lowest share is \d\d\.\d%, in model.layers"):
        model = apply_milora(tiny_llama()[0], rules, calibration=TEXT)
    full, lowered = (model.milora_protection[Q.replace("q_proj", name)] for name in ("k_proj", "q_proj"))
    assert lowered.directions == lowered.inputs - 24 < full.directions  # both layers read one input
    assert lowered.energy < 0.97 <= full.energy
    assert lowered.held_out is not None
    assert lowered.held_out < full.held_out
    V = found(tiny_llama()[0], protect=0.97)[Q].V[:, : lowered.directions]
    assert float((starts(model)[f"base_model.model.{Q}.lora_A.default.weight"] @ V).abs().max()) < 1e-5
    model.save_pretrained(str(tmp_path))
    modules = json.loads((tmp_path / "milora.json").read_text())["modules"]
    assert modules[Q]["protection"]["energy"] == lowered.energy


def test_a_layer_that_protects_almost_nothing_gets_a_warning() -> None:
    x = torch.randn(64, 256) * torch.tensor([1e4, *[1.0] * 255])
    with pytest.warns(UserWarning, match="1 of 1 layers protect almost nothing: 0 protects 1 of 256 input directions"):
        apply_milora(nn.Sequential(nn.Linear(256, 8)), one_rule(protect=0.9), calibration=[{"input": x}])


def test_a_tower_that_no_picture_reaches_is_refused(tiny_llava) -> None:
    rules = [{"modules": "projector", "method": "milora", "rank": 2, "protect": 0.6}]
    with raises_problem(where="multi_modal_projector", hint="calibrate with pictures"):
        apply_milora(tiny_llava()[0], rules, calibration=text_batches(2, 200))


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 12), rows=st.integers(1, 20), share=st.floats(0.05, 0.99), seed=st.integers(0, 999))
def test_the_first_directions_are_the_fewest_that_hold_the_share(size: int, rows: int, share: float, seed: int) -> None:
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    C = x.T @ x
    V, held = first_directions(C, share, size)
    assert torch.allclose(V.T @ V, torch.eye(V.shape[1]), atol=1e-5)
    assert held >= share - 1e-5
    energies = torch.linalg.eigvalsh(C.double()).flip(0)
    assert float(energies[: V.shape[1] - 1].sum() / energies.sum()) < share + 1e-5
    assert float((V.T @ C @ V).trace() / C.trace()) == pytest.approx(held, abs=1e-5)


def test_a_solver_that_fails_in_float32_gets_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(C: torch.Tensor, eigh: Any = torch.linalg.eigh) -> Any:
        if C.dtype == torch.float32:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return eigh(C)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    V, _ = first_directions(torch.diag(torch.tensor([1.0, 6.0, 3.0])), 0.6, 3)
    assert V.abs().tolist() == [[0], [1], [0]]


def test_a_small_source_counts_as_much_as_a_large_one() -> None:
    model, few = nn.Sequential(nn.Linear(32, 8)), torch.eye(32)[30:31].repeat(4, 1)
    many = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0)) * (torch.arange(32) < 20) / 20**0.5
    together = found(model, [{"input": many}, {"input": few}])["0"]
    assert float((few[0] @ together.V).norm()) < 0.01
    apart = found(model, {"many": [{"input": many}], "few": [{"input": few}]})["0"]
    assert float((few[0] @ apart.V).norm()) == pytest.approx(1)
    values = torch.linalg.eigvalsh(many.T @ many / 4000 + few.T @ few / 4).flip(0)
    assert apart.share == pytest.approx(float(values[: apart.V.shape[1]].sum() / values.sum()), rel=1e-4)


def test_ids_of_texts_are_drawn_from_the_softmax() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    draw = _Draw(torch.Generator().manual_seed(0), 0, lambda _: None)
    drawn = draw(torch.zeros(20_000, 1, dtype=torch.long), scores.repeat(20_000, 1)).argmax(dim=-1)
    shares = drawn.bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, scores[0].softmax(dim=-1), rtol=0, atol=0.01)
    assert shares[3] == 0


def test_all_batches_weigh_by_their_positions() -> None:
    batches = [{"input_ids": torch.ones(1, n, dtype=torch.long)} for n in (3, 7)]
    weights = positions_of(batches, image_token=None)
    assert [w.sum().item() for w in weights if w is not None] == pytest.approx([3, 7])


@pytest.mark.parametrize(("rows", "is_real"), [(3, 0), (0, 1)])
def test_a_calibration_without_tokens_is_refused(rows, is_real) -> None:
    ids = torch.ones(rows, 5, dtype=torch.long)
    with raises_code("", hint="pass batches with input_ids"):
        positions_of([{"input_ids": ids, "attention_mask": is_real * ids}], image_token=None)
    with raises_code("", where="calibration"):
        positions_of([], image_token=None)
