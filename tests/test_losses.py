"""The loss with logits only where something is predicted equals the model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from milora_vl.training.losses import summed_loss, supervised_columns, takes_columns


def batch(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (3, 12), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, :9] = -100
    labels[:, 6] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("by_columns", [True, False])
def test_equal_to_the_models_own_loss_and_gradient(tiny_llama: Callable[..., Any], by_columns: bool) -> None:
    model = tiny_llama()[0].train()
    inputs = batch(model)
    own = model(**inputs).loss
    own.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    summed, count, _ = summed_loss(model, inputs, by_columns=by_columns)
    (summed / count).backward()
    torch.testing.assert_close(summed / count, own)
    torch.testing.assert_close(model.lm_head.weight.grad, gradient)


def test_logits_are_made_for_the_needed_columns_only(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()[0]
    assert takes_columns(model)
    inputs = batch(model)
    columns = supervised_columns(inputs["labels"])
    assert columns.tolist() == [3, 4, 6, 7, 8, 9, 10]
    _, count, outputs = summed_loss(model, inputs, by_columns=True)
    assert outputs["logits"].shape[1] == len(columns)
    assert count == 14 + 3


def test_a_batch_without_targets_gives_zero_with_a_gradient(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()[0].train()
    inputs = batch(model)
    inputs["labels"].fill_(-100)
    summed, count, _ = summed_loss(model, inputs, by_columns=True)
    summed.backward()
    assert (float(summed.detach()), count) == (0.0, 0)
    assert model.lm_head.weight.grad.abs().sum() == 0
