"""Before training, the adapted model is the base model: to the last bit, in any dtype, in train mode too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from milora_vl import apply_milora
from support.adapter_cases import LLAVA_POLICY, Pictures, llava_batch, one_rule, picture_batch, tiny_gpt2, token_batch


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigma", ["keep", "none", {"floor": 0.5}])
def test_a_llava_is_unchanged(tiny_llava, training: bool, dtype: torch.dtype, sigma) -> None:
    rules = [{**LLAVA_POLICY[0], "sigma": sigma}, *LLAVA_POLICY[1:]]
    base = tiny_llava()[0].to(dtype).train(training)
    model = apply_milora(tiny_llava()[0].to(dtype), rules).train(training)
    batch = llava_batch(base)
    assert torch.equal(model(**batch).logits, base(**batch).logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize("method", ["milora", "pissa", "random", "lora"])
def test_a_gpt2_with_conv1d_layers_is_unchanged(method: str) -> None:
    base, model = tiny_gpt2(), apply_milora(tiny_gpt2(), one_rule(method=method, dropout=0.05))
    ids = token_batch()
    assert torch.equal(model(ids).logits, base(ids).logits)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 33), st.data(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_any_linear_layer_is_unchanged(rows: int, columns: int, batch: int, data, dtype: torch.dtype) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    torch.manual_seed(rows)
    base = nn.Sequential(nn.Linear(columns, rows)).to(dtype)
    x = torch.randn(batch, columns).to(dtype)
    expected = base(x)
    model = apply_milora(base, one_rule(rank=rank, dropout=0.3, alpha=3)).train()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("rank", range(1, 71))
def test_a_single_row_is_unchanged(rank: int) -> None:
    torch.manual_seed(rank)
    base, x = nn.Sequential(nn.Linear(rank, rank)), torch.randn(1, rank)
    expected = base(x)
    assert torch.equal(apply_milora(base, one_rule(rank=rank))(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_convolutions_and_embeddings_are_unchanged(dtype: torch.dtype) -> None:
    pixels, words = picture_batch()
    rules = [{"modules": "*", "method": "milora", "protect": 0, "rank": 3}, {"modules": "words", "method": "lora"}]
    model = apply_milora(Pictures().to(dtype), rules)
    assert torch.equal(model(pixels.to(dtype), words), Pictures().to(dtype)(pixels.to(dtype), words))
