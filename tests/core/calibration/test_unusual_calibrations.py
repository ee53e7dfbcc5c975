"""Calibrations of unusual models and batches: modules that run twice, experts, odd values, little data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from milora_vl import apply_milora, calibration_texts
from milora_vl.core.calibration.activations import for_each_input
from milora_vl.core.calibration.bases import InputBasis
from milora_vl.core.policy import Policy
from support.adapter_cases import one_rule
from support.family_configs import build
from support.problems import raises_problem

NOISE = torch.Generator().manual_seed(0)


def rows(count: int = 40, size: int = 16, large: int = 4) -> Tensor:
    """Return inputs (count, size), whose first `large` entries are much larger than the others."""
    return torch.randn(count, size, generator=NOISE) * torch.tensor([5.0] * large + [0.1] * (size - large))


def share(x: Tensor, V: Tensor) -> float:
    return float((x @ V).square().sum() / x.square().sum())


def calibrated(
    model: nn.Module, batches: Any, protect: float = 0.9, modules: str = "language"
) -> dict[str, InputBasis]:
    targets = Policy.parse(one_rule(modules=modules, protect=protect)).resolve(model)
    return for_each_input(model, targets, batches, lambda _, __, inputs: inputs)


class Twice(nn.Module):
    """A layer that runs twice, as ALBERT's run many times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x)) * torch.arange(16.0) + 5)


def test_every_call_of_a_module_that_runs_twice_counts() -> None:
    model, batches = Twice(), [{"x": rows()} for _ in range(8)]
    seen: list[Tensor] = []
    handle = model.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for batch in batches[:7]:
        model(**batch)
    handle.remove()
    basis = calibrated(model, batches)["layer"]
    assert share(torch.cat(seen), basis.V) == pytest.approx(basis.share, abs=0.02)


class Either(nn.Module):
    """A model of ids or of vectors, as a tower that two kinds of batches reach."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.layer = nn.Linear(16, 16)

    def forward(self, input_ids: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        return self.layer(x if input_ids is None else self.words(input_ids))


@pytest.mark.parametrize(("share", "held", "directions"), [(0.6, 19 / 29, [1]), (0.7, 1.0, [1, 0])])
def test_an_attention_sink_counts_as_ten_positions(share, held, directions) -> None:
    vectors = torch.zeros(1, 20, 16)
    vectors[0, 0, 0] = 100.0  # the first position, with 10,000 times the energy of each other
    vectors[0, 1:, 1] = 1.0
    basis = calibrated(Either(), [{"x": vectors}], share, "layer")["layer"]
    assert basis.share == pytest.approx(held)
    assert basis.V.abs().argmax(dim=0).tolist() == directions


IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize("batches", [{"input_ids": IDS}, ["hello"], [IDS]])
def test_what_is_no_list_of_batches_is_refused(tiny_llama: Any, batches: Any) -> None:
    with raises_problem(where="calibration", message="expected a list of batches"):
        calibrated(tiny_llama()[0], batches)


def test_too_little_data_gets_a_warning() -> None:
    x = torch.randn(18, 512, generator=NOISE)
    model, rule = lambda: nn.Sequential(nn.Linear(512, 8)), one_rule(protect=0.9)
    batches = [{"input": x[:16]}, {"input": x[16:]}]
    with pytest.warns(UserWarning, match="1 of 1 layers: 0 has 512 inputs and 16 positions; .* on held-out data"):
        apply_milora(model(), rule, calibration=batches)
    basis = calibrated(model(), batches)["0"]
    assert basis.held_out == pytest.approx(share(x[-2:], basis.V), rel=1e-4)
    assert basis.held_out < 0.2 < 0.9 < basis.share
    with pytest.warns(UserWarning, match="0 has 512 inputs and 1 positions; .* nothing was held out"):
        apply_milora(model(), rule, calibration=[{"input": x[:1]}])


def test_a_model_that_has_written_texts_reads_embeddings_of_another_batch() -> None:
    model = build("qwen2_5_vl")  # it keeps the places of pictures of its last batch
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = 1, 2
    calibration_texts(model, count=2, length=4)
    embeds = model.get_input_embeddings()(IDS.expand(3, 3))
    assert model(inputs_embeds=embeds).logits.shape[:2] == (3, 3)


def test_every_position_of_an_encoder_and_a_decoder_counts() -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}
    base = T5ForConditionalGeneration(T5Config(vocab_size=99, decoder_start_token_id=0, **sizes)).eval()
    ids, answers = (torch.randint(2, 99, (24, 20), generator=NOISE) for _ in range(2))
    batches = [{"input_ids": a, "labels": b} for a, b in zip(ids.split(4), answers.split(4), strict=True)]
    found = calibrated(base, batches, 0.5, "*Attention.[qk]")
    assert {basis.num_positions for basis in found.values()} == {20 * 20}
