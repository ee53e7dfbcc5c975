"""A batch whose rows share their first tokens has the losses and gradients of its separate rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from milora_data.encode.tokens import IGNORE
from milora_vl.models.losses import add_chunked_loss, summed_loss
from milora_vl.tiny import tiny_llava
from milora_vl.train import shared_prefix
from milora_vl.train.command import main as train
from milora_vl.train.shared_prefix import ATTENTION, can_share, share, use_attention
from support.train_runs import losses, training

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
PREFIX = (1, 7, 9, 12, 30)
RESTS = ([5, 6, 7, 8], [5, 6], [9, 1, 2, 3, 4, 5, 6], [8])


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def batch(rests: Any = RESTS, prefix: Any = PREFIX) -> dict[str, Tensor]:
    """Rows padded on the right, with labels from the second token of each rest on."""
    rows = [[*prefix, *rest] for rest in rests]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, IGNORE)
    labels[:, : len(prefix) + 1] = IGNORE
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def outcome(model: nn.Module, inputs: dict[str, Tensor], *, chunked: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    loss, count = summed_loss(model, inputs, chunked=chunked)
    loss.backward()
    found = {"loss": loss.detach(), "count": torch.tensor(count)}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def shared(model: Any, inputs: dict[str, Tensor], image_token: int | None = None) -> dict[str, Tensor]:
    return share(inputs, image_token=image_token, dtype=model.dtype)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_losses_and_gradients_are_those_of_separate_rows(family: str, chunked: bool) -> None:
    made: dict[str, Any] = {
        "llama": lambda: llama(),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    }
    torch.manual_seed(0)
    model = made[family]().double()
    model.set_attn_implementation("eager")
    expected = outcome(model, batch())
    assert use_attention(model)
    one_row = shared(model, batch())
    assert one_row["input_ids"].shape == (1, 4 + 4 * 8)
    got = outcome(model, one_row, chunked=chunked and add_chunked_loss(model))
    assert got.keys() == expected.keys()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6)


@given(
    rests=st.lists(st.lists(st.integers(1, 39), min_size=1, max_size=9), min_size=1, max_size=5),
    prefix=st.lists(st.integers(1, 39), max_size=12),
)
@settings(max_examples=40, deadline=None)
def test_any_batch(rests: list[list[int]], prefix: list[int]) -> None:
    model = llama().double()
    model.set_attn_implementation("eager")
    inputs = batch(rests, prefix)
    expected = outcome(model, inputs)
    assert use_attention(model)
    torch.testing.assert_close(outcome(model, shared(model, inputs)), expected, rtol=1e-4, atol=2e-6)


def test_pictures_stay_with_their_rows() -> None:
    model: Any = tiny_llava()[0].double()
    token = model.config.image_token_id
    prefix = [5, 6, 7, 8, 9, 10]
    inputs = batch([[token] * 16 + [11, 12], [token] * 16 + [13, 14, 15, 16], [token] * 16 + [17]], prefix)
    inputs["labels"][inputs["labels"] == token] = IGNORE
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model.set_attn_implementation("eager")
    expected = outcome(model, inputs | {"pixel_values": pixels})
    assert use_attention(model)
    one_row = shared(model, inputs | {"pixel_values": pixels}, token)
    assert len(one_row["input_ids"]) == 1
    torch.testing.assert_close(outcome(model, one_row), expected, rtol=1e-4, atol=2e-6)
    wrong = outcome(model, one_row | {"pixel_values": pixels.flip(0)})
    assert not torch.allclose(wrong["loss"], expected["loss"])


def test_the_prefix_ends_before_a_picture_and_before_an_answer() -> None:
    pictures = batch([[3, 3, 4, 5], [3, 3, 6, 7]], [1, 2, 8, 9, 3, 3])
    assert share(pictures, image_token=3, dtype=torch.float32)["position_ids"].tolist()[0].count(3) == 2
    answers = batch([[5, 6], [7, 8]], [1, 2, 8, 9])
    answers["labels"][:, 2] = answers["input_ids"][:, 2]
    assert share(answers, image_token=None, dtype=torch.float32)["position_ids"].tolist()[0].count(1) == 2


@pytest.mark.parametrize(
    "changed",
    [
        lambda inputs: {name: value[:1] for name, value in inputs.items()},
        lambda inputs: inputs | {"input_ids": inputs["input_ids"] + torch.arange(4)[:, None]},
        lambda inputs: {name: value.flip(1) for name, value in inputs.items()},  # padded on the left
        lambda inputs: inputs | {"position_ids": torch.zeros_like(inputs["input_ids"])},  # packed
        lambda inputs: inputs | {"attention_mask": inputs["attention_mask"][:, None, None]},
        lambda inputs: inputs | {"labels": inputs["input_ids"]},
        lambda inputs: {name: value for name, value in inputs.items() if name != "attention_mask"},
    ],
)
def test_a_batch_that_saves_nothing_is_unchanged(changed: Any) -> None:
    inputs = changed(batch())
    assert share(inputs, image_token=None, dtype=torch.float32) is inputs


def test_other_batches_are_those_of_transformers_eager_attention() -> None:
    model = llama().eval()
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    prompt = {name: value[:, :6] for name, value in inputs.items()}
    results = []
    for prepare in (lambda: model.set_attn_implementation("eager"), lambda: use_attention(model)):
        prepare()
        answer = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
        results.append((model(**inputs).logits, answer))
    assert model.config._attn_implementation == ATTENTION
    torch.testing.assert_close(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1])


def test_gradient_checkpointing_sees_the_same_rows() -> None:
    model = llama().double().train()
    assert use_attention(model)
    expected = outcome(model, shared(model, batch()))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(outcome(model, shared(model, batch())), expected)


def test_a_training_with_eager_attention_shares_and_learns_the_same(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []

    def watched(inputs: dict[str, Any], **how: Any) -> dict[str, Any]:
        made = share(inputs, **how)
        sizes.append((inputs["input_ids"].numel(), made["input_ids"].numel()))
        return made

    monkeypatch.setattr(shared_prefix, "share", watched)
    held_out = ["--eval_data_path", str(tiny_data / "val.json"), "--eval_strategy", "steps", "--eval_steps", "3"]
    flags = ["--rank", "4", "--lora_dropout", "0", *held_out]
    for name in ("sdpa", "eager"):
        assert train(training(tiny_data, tmp_path / name, "--attn_implementation", name, *flags)) == 0
    assert len(sizes) > 6  # the evaluation too
    assert all(after < 0.9 * before for before, after in sizes)
    for (step, loss), (other, expected) in zip(losses(tmp_path / "eager"), losses(tmp_path / "sdpa"), strict=True):
        assert step == other
        assert loss == pytest.approx(expected, rel=1e-4)


def test_models_with_a_window_or_dropout_share_nothing() -> None:
    assert not use_attention(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)))
    dropped = LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.1))
    assert use_attention(dropped)
    assert not can_share(dropped)
    model = llama()
    assert not can_share(model)
    assert use_attention(model)
    assert can_share(model)
    model.add_module("dropout", nn.Dropout(0.1))
    assert not can_share(model)
