"""The loss in chunks equals the model's own, with its gradients, even if the model changes its logits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from milora_vl.core.adapter.apply import apply_milora
from milora_vl.models import losses
from milora_vl.models.losses import add_chunked_loss, inner_model, summed_loss
from support.family_configs import FAMILIES, TEXT_ONLY, build
from support.family_configs import batch as family_batch


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (3, 12), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, :9] = -100
    labels[:, 6] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    model.zero_grad()
    return found


def assert_equal_to_own(model: nn.Module, base: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    own = model(**inputs).loss
    own.backward()
    expected = gradients(model)
    assert add_chunked_loss(base)
    summed, count = summed_loss(model, inputs, chunked=True)
    (summed / count).backward()
    torch.testing.assert_close(summed / count, own, rtol=1e-5, atol=1e-6)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = torch.linalg.vector_norm(found[name] - gradient)  # sums in another order: single numbers may be far off
        assert float(error) <= 1e-4 * float(torch.linalg.vector_norm(gradient)) + 1e-6, name


@pytest.mark.parametrize("positions", [1, 4, 1000])
def test_equal_to_the_models_own_loss_and_gradients(
    positions: int, tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()[0].train()
    monkeypatch.setattr(losses, "CHUNK", positions * model.config.vocab_size)
    assert_equal_to_own(model, model, batch())


def test_a_head_that_is_the_embedding_gets_the_gradients_of_both(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()[0].train()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    monkeypatch.setattr(losses, "CHUNK", 4 * model.config.vocab_size)
    assert_equal_to_own(model, model, batch())


def families() -> list[Any]:
    """The peculiar ones, and the others as slow tests."""
    peculiar = {"llava", "gemma2", "aya_vision", "gpt2", "opt", "paligemma", "blip-2"}
    return [
        name if name in peculiar else pytest.param(name, marks=pytest.mark.slow) for name in [*FAMILIES, *TEXT_ONLY]
    ]


@pytest.mark.parametrize("name", families())
def test_every_family_with_an_inner_model_and_a_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma caps its logits. Cohere, the base of Aya, scales them."""
    model = build(name)  # in eval mode: some drop out in training
    if inner_model(model) is None:
        assert not add_chunked_loss(model)
        return
    monkeypatch.setattr(losses, "CHUNK", 5 * 64)
    inputs = family_batch(name)
    labels = inputs["input_ids"].clone()
    labels[:, :8] = -100
    assert_equal_to_own(model, model, {**inputs, "labels": labels})


def test_under_peft_checkpointing_and_an_adapter_on_the_head(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama()[0]
    monkeypatch.setattr(losses, "CHUNK", 4 * base.config.vocab_size)
    rules = [
        {"modules": "language", "method": "milora", "protect": 0, "rank": 4},
        {"modules": "lm_head", "method": "milora", "protect": 0, "rank": 4},
    ]
    model = apply_milora(base, rules).train()
    model.enable_input_require_grads()
    base.gradient_checkpointing_enable()
    assert_equal_to_own(model, base, batch())


def test_logits_are_made_once_for_supervised_positions_only_a_few_at_a_time(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()[0].train()
    monkeypatch.setattr(losses, "CHUNK", 4 * model.config.vocab_size)
    assert add_chunked_loss(model)
    shapes: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[:-1].numel()))
    summed, count = summed_loss(model, batch(), chunked=True)
    summed.backward()
    assert count == 17 == sum(shapes) - 1  # one more to see what the inner model gives
    assert max(shapes) <= 4
    with torch.no_grad():
        assert torch.equal(summed_loss(model, batch(), chunked=True)[0], summed)


def test_a_deep_copy_computes_with_its_own_weights(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()[0]
    assert add_chunked_loss(model)
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data.zero_()
    for chunked in (True, False):
        summed, count = summed_loss(copied, batch(), chunked=chunked)
        assert float(summed) == pytest.approx(count * math.log(model.config.vocab_size))
    assert type(copied).__name__ == "LlamaForCausalLM"


def test_the_loss_is_bit_for_bit_that_of_autograd(tiny_llama: Callable[..., Any]) -> None:
    """One chunk holds all positions, so nothing is summed in another order than the model's own loss sums it."""
    model = tiny_llama()[0].train()
    inputs = {name: value[:1] for name, value in batch().items()}
    labels = inputs["labels"][0, 1:]
    hidden = model.model(inputs["input_ids"]).last_hidden_state[0, :-1][labels != -100].detach().requires_grad_()
    own = nn.functional.cross_entropy(model.lm_head(hidden), labels[labels != -100], reduction="sum")
    (expected,) = torch.autograd.grad(own, hidden)
    chunked = losses.GradientsAtOnce.apply(model.lm_head, hidden, (labels[labels != -100],))
    (found,) = torch.autograd.grad(chunked, hidden)
    assert torch.equal(chunked, own)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_a_batch_without_targets_gives_zero_with_a_gradient(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()[0].train()
    inputs = batch()
    inputs["labels"].fill_(-100)
    assert add_chunked_loss(model)
    summed, count = summed_loss(model, inputs, chunked=True)
    summed.backward()
    assert (float(summed.detach()), count) == (0.0, 0)
    assert model.lm_head.weight.grad.abs().sum() == 0
