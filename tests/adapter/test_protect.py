"""Updates that stay out of the first singular directions of their weights: three forms of one constraint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn

from milora_vl import apply_milora, keep_protected, load_adapter, merge, reinit_peft, restore_split, save_adapter
from milora_vl.adapter.install import anchors_of, base_layer, lora_layer, trained_factors
from milora_vl.adapter.protection import Directions, Protected
from milora_vl.policy.rules import Protect
from milora_vl.weights.matrices import as_matrix
from support.adapter_cases import Pictures, move, one_rule, picture_batch, tiny_gpt2, token_batch
from support.problems import raises_code
from support.protected import FORMS, HARD, TOP, form_name, overlaps

METHODS = ["milora", "lora"]
IDS = token_batch(200)
Q = "model.layers.0.self_attn.q_proj"


def optimizer_of(model: nn.Module, kind: type = torch.optim.AdamW, **options: Any) -> torch.optim.Optimizer:
    settings = {"lr": 1e-2, **({"weight_decay": 0.1} if kind is torch.optim.AdamW else {}), **options}
    return kind([p for p in model.parameters() if p.requires_grad], **settings)


def train(model: nn.Module, steps: int = 4, accumulation: int = 1, ids: Tensor = IDS, **options: Any) -> list[float]:
    """Some steps with the directions kept; the model may hold no rule that protects."""
    optimizer = optimizer_of(model, **options)
    keep_protected(model, optimizer)
    losses = []
    for _ in range(steps):
        for part in ids.chunk(accumulation):
            loss = model(input_ids=part, labels=part).loss
            (loss / accumulation).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("form", HARD, ids=form_name)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_update_has_nothing_in_the_protected_directions(tiny_llama, form, method: str, dtype) -> None:
    model = apply_milora(tiny_llama()[0].to(dtype), one_rule(method=method, alpha=4, protect=form))
    losses = train(model)
    assert losses[-1] < losses[0]
    assert max(overlaps(model)) < 1e-5
    free = apply_milora(tiny_llama()[0].to(dtype), one_rule(method=method, alpha=4))
    train(free)
    assert min(overlaps(free)) > 0.05


@pytest.mark.parametrize("form", FORMS, ids=form_name)
@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_starts_at_the_base_to_the_last_bit(tiny_llama, form, method: str) -> None:
    """And outside, under a hard constraint. The base is bf16: an anchor kept outside is float32, as what trains is."""
    base = tiny_llama()[0].to(torch.bfloat16)
    expected = base(IDS).logits
    model = apply_milora(base, one_rule(method=method, dropout=0.1, protect=form))
    assert torch.equal(model.train()(IDS).logits, expected)
    layer, protected = lora_layer(model, Q), model.protections["default"][Q]
    if method == "milora":
        assert not any(delta.any() for delta in trained_factors(layer, "default"))
    start = anchors_of(layer, "default") if method == "milora" else trained_factors(layer, "default")
    assert (protected.overlap(start) < 1e-6) == (form in HARD)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(IDS).logits, tiny_llama()[0].to(torch.bfloat16)(IDS).logits)


@pytest.mark.parametrize("form", HARD, ids=form_name)
@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_layer_is_kept_outside(form, method: str) -> None:
    model = apply_milora(Pictures(), [{"modules": "*", "method": method, "rank": 2, "protect": form | {"top": 2}}])
    optimizer = optimizer_of(model)
    keep_protected(model, optimizer)
    for _ in range(3):
        model(*picture_batch()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(model.milora_targets) == 3
    assert max(overlaps(model, top=2)) < 1e-5


def test_conv1d_is_kept_outside() -> None:
    model = apply_milora(tiny_gpt2(), one_rule(protect={"top": TOP}))
    train(model, ids=token_batch(40))
    assert max(overlaps(model)) < 1e-5


def test_a_penalty_reduces_the_overlap_the_more_the_larger_it_is(tiny_llama) -> None:
    found = []
    for weight in (None, 10.0, 100.0, 1e9):
        protect = None if weight is None else {"top": TOP, "by": "penalty", "weight": weight}
        torch.manual_seed(0)
        rules = (
            one_rule(method="lora", alpha=4) if protect is None else one_rule(method="lora", alpha=4, protect=protect)
        )
        model = apply_milora(tiny_llama()[0], rules)
        train(model, steps=8)
        found.append(sum(overlaps(model)))
    assert found == sorted(found, reverse=True)
    assert found[1] < 0.9 * found[0]
    assert found[2] < 0.6 * found[0]
    assert found[3] < 1e-3 * found[0]  # a projection is the limit


def test_a_penalty_is_decoupled_from_gradients_and_goes_by_the_learning_rate_of_its_rule(tiny_llama) -> None:
    """Without any gradient, one step takes lr w / (1 + lr w) of what is inside: half of it at w = 1/lr."""
    rules = one_rule(method="lora", protect={"top": TOP, "by": "penalty", "weight": 100.0})
    model = apply_milora(tiny_llama()[0], rules)
    (A, _), protected = trained_factors(lora_layer(model, Q), "default"), model.protections["default"][Q]
    before, whole = protected.inside(A, 0), A.detach().clone()
    optimizer = optimizer_of(model, torch.optim.SGD, lr=1e-2)
    keep_protected(model, optimizer)
    keep_protected(model, optimizer)  # a second time changes nothing
    optimizer.step()
    assert torch.allclose(A, whole - before / 2, atol=1e-7)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.allclose(A, whole - before / 2, atol=1e-7)


def test_projection_and_basis_differ_in_what_adam_sees_alone(tiny_llama) -> None:
    runs: dict[tuple[str, type], Any] = {}
    for form in HARD:
        for kind in (torch.optim.SGD, torch.optim.AdamW):
            model = apply_milora(tiny_llama()[0], one_rule(protect=form))
            optimizer = optimizer_of(model, kind)
            keep_protected(model, optimizer)
            for _ in range(3):
                model(input_ids=IDS, labels=IDS).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            runs[form_name(form), kind] = model, optimizer
    A = {run: trained_factors(lora_layer(model, Q), "default")[0] for run, (model, _) in runs.items()}
    sgd, adam = torch.optim.SGD, torch.optim.AdamW
    assert torch.allclose(A["projection", sgd], A["basis", sgd], atol=1e-7)
    assert not torch.allclose(A["projection", adam], A["basis", adam], atol=1e-4)
    for form, limit in (("projection", None), ("basis", 1e-5)):
        model, optimizer = runs[form, adam]
        moment = optimizer.state[A[form, adam]]["exp_avg"]
        inside = float(model.protections["default"][Q].inside(moment, 0).norm() / moment.norm())
        assert inside < limit if limit else inside > 0.1


def test_basis_is_the_training_of_factors_written_outside() -> None:
    """OPLoRA's (I - U U') B A (I - V V'), with the projections in the forward and AdamW on A and B as they are."""
    torch.manual_seed(0)
    base, x = nn.Linear(12, 10, bias=False), torch.randn(5, 12)
    model = apply_milora(nn.Sequential(copy.deepcopy(base)), one_rule(method="lora", protect=HARD[1]))
    start = [factor.detach().clone() for factor in trained_factors(lora_layer(model, "0"), "default")]
    W = base.weight.detach()
    U, _, Vh = torch.linalg.svd(W)
    left, right = torch.eye(10) - U[:, :TOP] @ U[:, :TOP].T, torch.eye(12) - Vh[:TOP].T @ Vh[:TOP]
    A, B = (nn.Parameter(factor) for factor in start)
    theirs = torch.optim.AdamW([A, B], lr=1e-2, weight_decay=0.1)
    ours = optimizer_of(model)
    keep_protected(model, ours)
    for _ in range(5):
        update = left @ B @ A @ right
        for output, optimizer in ((x @ (W + update).T, theirs), (model(x), ours)):
            output.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    change = lora_layer(model, "0").get_delta_weight("default")
    assert torch.allclose(change, left @ B @ A @ right, atol=1e-5)
    assert float(change.detach().norm()) > 0.01


@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_accumulated_gradients_are_those_of_a_larger_batch(tiny_llama, form) -> None:
    ids = token_batch(200, rows=4)
    weights = []
    for accumulation in (1, 4):
        model = apply_milora(tiny_llama()[0], one_rule(protect=form))
        train(model, accumulation=accumulation, ids=ids, kind=torch.optim.SGD)
        weights.append([p.detach() for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*weights, strict=True))


def test_training_that_protects_nothing_is_refused_at_its_first_gradient(tiny_llama) -> None:
    model = apply_milora(tiny_llama()[0], one_rule(protect={"top": TOP}))
    loss = model(input_ids=IDS, labels=IDS).loss
    with raises_code("adapter-not-protected", hint="keep_protected(model, optimizer)"):
        loss.backward()


def gradient(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.ones(1, 12)).square().sum().backward()


def small(form: Any) -> Any:
    torch.manual_seed(0)
    rules = one_rule(method="lora", protect=form)
    model = apply_milora(nn.Sequential(nn.Linear(12, 10, bias=False)), rules)
    with torch.no_grad():  # B starts at zero, so A has no gradient at first
        trained_factors(lora_layer(model, "0"), "default")[1].normal_()
    return model


@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_a_step_that_was_not_projected_stops_the_training(form) -> None:
    model = small(form)
    kept, other = optimizer_of(model), optimizer_of(model)
    keep_protected(model, kept)
    gradient(model)
    kept.step()
    gradient(model)
    other.step()
    with raises_code("adapter-not-protected", hint="every optimizer"):
        gradient(model)
    keep_protected(model, other)
    for optimizer in (other, kept, other):
        gradient(model)
        optimizer.step()
    gradient(model)
    if form in HARD:
        assert max(overlaps(model)) < 1e-5


@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_a_second_adapter_needs_protection_of_its_own(form) -> None:
    model = small(form)
    model.add_adapter("second", model.peft_config["default"])
    first = optimizer_of(model)
    keep_protected(model, first)
    gradient(model)
    first.step()
    model.set_adapter("second")
    with raises_code("adapter-not-protected"):
        gradient(model)
    ours, theirs = (model.protections[name]["0"] for name in ("default", "second"))
    assert ours.inputs is theirs.inputs  # the directions are in memory once


@pytest.mark.parametrize("form", HARD, ids=form_name)
def test_a_second_call_covers_an_adapter_that_was_added_since(form) -> None:
    model = small(form)
    optimizer = optimizer_of(model)
    keep_protected(model, optimizer)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    optimizer.add_param_group({"params": list(trained_factors(lora_layer(model, "0"), "second"))})
    keep_protected(model, optimizer)
    for name in ("second", "default", "second"):
        model.set_adapter(name)
        gradient(model)
        optimizer.step()
    for name, protected in model.protections.items():
        assert protected["0"].overlap(trained_factors(lora_layer(model, "0"), name)) < 1e-5


@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_a_copy_of_a_model_is_guarded_too(form, tmp_path: Path) -> None:
    model = small(form)
    optimizer = optimizer_of(model)
    keep_protected(model, optimizer)
    twin, both = copy.deepcopy((model, optimizer))
    with raises_code("adapter-not-protected"):
        gradient(twin)
    keep_protected(twin, both)
    gradient(twin)
    gradient(model)  # the copy does not change what holds for the model
    torch.save(model, tmp_path / "model.pt")
    with raises_code("adapter-not-protected"):
        gradient(torch.load(tmp_path / "model.pt", weights_only=False))


def test_an_optimizer_that_steps_other_tensors_is_refused(tiny_llama) -> None:
    """As DeepSpeed's, which puts flat parts of the factors in their place."""
    model = apply_milora(tiny_llama()[0], one_rule(protect={"top": TOP}))
    with raises_code("adapter-sharded-optimizer"):
        keep_protected(model, torch.optim.AdamW([nn.Parameter(torch.ones(3))]))
    optimizer = optimizer_of(model)
    keep_protected(model, optimizer)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(3))]
    with raises_code("adapter-sharded-optimizer"):
        optimizer.step()


def test_an_optimizer_that_accelerate_has_wrapped_is_kept_too(tiny_llama) -> None:
    model = apply_milora(tiny_llama()[0], one_rule(protect={"top": TOP}))
    tuned, optimizer = Accelerator(cpu=True).prepare(model, optimizer_of(model))
    keep_protected(tuned, optimizer)
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert max(overlaps(model)) < 1e-5


def test_saving_tells_of_an_update_that_reaches_inside(tiny_llama, tmp_path: Path) -> None:
    model = apply_milora(tiny_llama()[0], one_rule(protect={"top": TOP}))
    save_adapter(model, tmp_path)
    move(model)
    with pytest.warns(UserWarning, match="reaches into protected directions .14 modules of"):
        save_adapter(model, tmp_path)


@pytest.mark.parametrize("form", FORMS, ids=form_name)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_a_stock_adapter_and_trains_on_protected(
    tiny_llama, tmp_path: Path, form, method: str
) -> None:
    model = apply_milora(tiny_llama()[0], one_rule(method=method, alpha=4, protect=form))
    train(model)
    expected = model.eval()(IDS).logits
    save_adapter(model, tmp_path)
    stock = PeftModel.from_pretrained(tiny_llama()[0], str(tmp_path))
    assert torch.allclose(stock.eval()(IDS).logits, expected, atol=1e-5)
    answers = load_adapter(tiny_llama()[0], tmp_path)
    assert answers.protections == {}
    assert answers.milora_targets[0].protect == Protect(**form)
    again = load_adapter(tiny_llama()[0], tmp_path, is_trainable=True)
    twin = copy.deepcopy(model)
    assert train(again.train()) == train(twin.train())
    if form in HARD:
        assert max(overlaps(again)) < 1e-5
    assert torch.allclose(merge(model).eval()(IDS).logits, expected, atol=1e-5)


def test_other_ways_to_go_on_protect_as_well(tiny_llama, tmp_path: Path) -> None:
    """A second adapter from a folder, a copy as TRL adds it, and stock PEFT's loading followed by restore_split."""
    model = apply_milora(tiny_llama()[0], one_rule(protect={"top": TOP}))
    save_adapter(model, tmp_path)
    model.load_adapter(str(tmp_path), "second", is_trainable=True)
    model.add_adapter("third", model.peft_config["default"])
    assert set(model.protections) == {"default", "second", "third"}
    model.delete_adapter("third")
    assert set(model.protections) == {"default", "second"}
    stock = PeftModel.from_pretrained(tiny_llama()[0], str(tmp_path), is_trainable=True)
    train(restored := restore_split(stock, tmp_path))
    assert max(overlaps(restored)) < 1e-5


def test_the_residual_form_is_kept_outside_too(tiny_llama, tmp_path: Path) -> None:
    model = apply_milora(tiny_llama()[0], one_rule(protect={"top": TOP}), form="residual")
    train(model)
    save_adapter(model, tmp_path)
    again = load_adapter(tiny_llama()[0], tmp_path, is_trainable=True)
    train(again)
    save_adapter(again, tmp_path)
    anchored = load_adapter(tiny_llama()[0], tmp_path)
    assert max(overlaps(anchored)) < 1e-5


def test_the_report_and_the_factor_cache_know_of_it(tiny_llama, tmp_path: Path) -> None:
    rules = [*one_rule(protect={"top": TOP}), {"modules": "language.mlp", "method": "lora", "protect": {"top": 6}}]
    model = apply_milora(tiny_llama()[0], rules, cache_dir=tmp_path)
    assert {(layer.method, layer.protected) for layer in model.milora_report} == {("milora", TOP)}
    assert "top 4 protected" in str(model.milora_report[0])
    stored = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert len(stored) == 8 + 14  # minor parts, and principal parts
    again = apply_milora(tiny_llama()[0], rules, cache_dir=tmp_path)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == stored
    for path, protected in model.protections["default"].items():
        W = as_matrix(base_layer(model, path), base_layer(model, path).weight.detach())
        top = torch.linalg.svdvals(W)[: protected.protect.top]
        assert protected.energy == pytest.approx(float(top.square().sum() / W.square().sum()), rel=1e-4)
        assert protected.num_bytes == 4 * protected.protect.top * sum(W.shape)
        assert torch.equal(protected.V, again.protections["default"][path].V)


def test_a_fresh_lora_of_anyone_is_unprotected(tiny_llama) -> None:
    from peft import LoraConfig, get_peft_model

    stock = get_peft_model(tiny_llama()[0], LoraConfig(r=2, target_modules=["q_proj"]))
    keep_protected(stock, optimizer_of(stock))
    assert reinit_peft(stock).protections == {"default": {}}


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), width=st.integers(2, 9), top=st.integers(1, 4), seed=st.integers(0, 999))
def test_removing_twice_is_removing_once_and_leaves_the_rest(rows: int, width: int, top: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    basis = torch.linalg.qr(draw(width, min(top, width))).Q
    protected = Protected("x", Protect(top=top), Directions(basis), Directions(basis), 0.0)
    A, B = draw(rows, width), draw(width, rows)
    once = [A.clone(), B.clone()]
    protected.remove(once)
    assert protected.overlap(once) < 1e-4 or max(t.norm() for t in once) < 1e-4
    assert torch.allclose(once[0] + protected.inside(A, 0), A, atol=1e-5)
    twice = [factor.clone() for factor in once]
    protected.remove(twice)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(once, twice, strict=True))
