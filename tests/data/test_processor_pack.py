"""Packed rows of models with their own processor: the same loss and gradients as the records alone, or a refusal."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AutoConfig
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from milora_data.batches.pack import PACKED, require_packable
from milora_data.batches.processor_collator import ProcessorCollator
from milora_vl import collator_for
from milora_vl.models.losses import summed_loss
from support import any_family
from support.problems import raises_code
from support.versions import needs_spans
from support.vlm_families import VLM_FAMILIES, model_of, processor_of
from support.vlm_runs import mixed_records, record

pytestmark = [pytest.mark.filterwarnings("ignore"), needs_spans]
# Without scores' scale, the tiny Gemma 4 shows how float32 rounds the angles of later places.
ROUNDED = {"gemma4": 1e-3}
LACKS = {"smolvlm": find_spec("num2words") is None}
KINDS = {name: family.config_of or name for name, family in VLM_FAMILIES.items()}
ALL = [name for name, kind in KINDS.items() if kind in PACKED and not LACKS.get(name)]


@pytest.fixture
def make(pictures: Path) -> Callable[..., tuple[Any, ProcessorCollator]]:
    def family(name: str, **options: Any) -> tuple[Any, ProcessorCollator]:
        processor = processor_of(name)
        model = model_of(name, processor)
        collate = collator_for(model, processor, image_folder=pictures, **options)
        assert isinstance(collate, ProcessorCollator)
        return model, collate

    return family


def loss_and_gradients(model: Any, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the summed loss over all batches, and its gradient for every parameter that has one."""
    model.zero_grad()
    losses = [summed_loss(model, batch, chunked=False)[0] for batch in batches]
    torch.stack(losses).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": torch.stack(losses).sum().detach(), **gradients}


def require_equal(together: dict[str, Tensor], alone: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        atol = tolerance * max(float(value.abs().max()), 0.1)
        torch.testing.assert_close(together[name], value, rtol=0, atol=atol, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PACKED - set(KINDS.values())))
def test_a_tiny_model_of_a_family_packs_like_its_records(name: str, pictures: Path) -> None:
    config, processor = any_family.tiny_family(name)
    model = any_family.tiny_model(config).eval()
    collate = collator_for(model, processor, image_folder=pictures)
    values = mixed_records()[:4]
    together = loss_and_gradients(model, [collate([values])])
    require_equal(together, loss_and_gradients(model, [collate([value]) for value in values]))


def test_gemma_4_packs_with_pictures_that_see_all_of_themselves(make: Any) -> None:
    model, collate = make("gemma4")
    text = model.config.get_text_config()
    text.use_bidirectional_attention, text.sliding_window = "vision", 16
    records = mixed_records()
    together = loss_and_gradients(model, [collate([records[:3], records[3:]])])
    alone = loss_and_gradients(model, [collate([value]) for value in records])
    require_equal(together, alone, ROUNDED["gemma4"])


@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "sdpa") for name in ALL), ("qwen2_5_vl", "eager"), ("gemma3", "eager")]
)
def test_a_packed_row_has_the_loss_and_gradients_of_its_records(name: str, attention: str, make: Any) -> None:
    model, collate = make(name)
    model.set_attn_implementation(attention)
    records = mixed_records(single=name == "paligemma")
    batch = collate([records[:3], records[3:]])
    assert len(batch["input_ids"]) == 2
    assert "attention_mask" not in batch
    together = loss_and_gradients(model, [batch])
    alone = loss_and_gradients(model, [collate([value]) for value in records])
    require_equal(together, alone, ROUNDED.get(name, 1e-4))


@pytest.mark.parametrize("name", [name for name in ALL if name != "paligemma"])
def test_a_hidden_picture_changes_no_loss_of_packed_texts(name: str, make: Any) -> None:
    model, collate = make(name)
    texts = [record([("human", "A?"), ("gpt", f"B{' and C' * count}")], []) for count in range(4)]
    plain = loss_and_gradients(model, [collate([texts[:3], texts[3:]])])
    collate.always_shows_images = True
    shown = loss_and_gradients(model, [collate([texts[:3], texts[3:]])])
    assert shown.keys() > plain.keys(), "the tower was not used"
    require_equal({key: shown[key] for key in plain}, plain, ROUNDED.get(name, 1e-4))
    assert not any(shown[key].abs().max() for key in shown.keys() - plain.keys())


@pytest.mark.parametrize("name", ["qwen2_5_vl", "glm4v"])
def test_a_record_keeps_the_positions_of_its_pictures(name: str, make: Any) -> None:
    model, collate = make(name)
    values = mixed_records()[:3]
    batch = collate([values])
    assert batch["position_ids"].shape == (4, *batch["input_ids"].shape)
    alone = [collate([value]) for value in values]
    expected = [
        model.model.get_rope_index(one["input_ids"], one["mm_token_type_ids"], one["image_grid_thw"])[0]
        for one in alone
    ]
    assert torch.equal(batch["position_ids"][1:], torch.cat(expected, dim=-1))
    lengths = [one["input_ids"].shape[1] for one in alone]
    assert torch.equal(batch["position_ids"][0, 0], torch.cat([torch.arange(length) for length in lengths]))


def varlen(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any) -> tuple[Tensor, None]:
    """Attention within the borders that transformers gives flash attention for positions; windows are longer here.

    The families that are left out refuse flash attention.
    """
    assert mask is None
    assert len(query) == 1
    (borders, _), _ = prepare_fa_kwargs_from_position_ids(options["position_ids"])
    parts = zip(*(x.split(borders.diff().tolist(), dim=2) for x in (query, key, value)), strict=True)
    scale = options["scaling"]
    outs = [F.scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True) for part in parts]
    return torch.cat(outs, dim=2).transpose(1, 2), None


@pytest.mark.parametrize(
    "name", [name for name in ALL if name not in ("gemma3", "gemma4", "paligemma")]
)  # these refuse flash
def test_flash_attention_finds_the_records_of_a_flat_row(name: str, make: Any) -> None:
    AttentionInterface.register("varlen", varlen)
    model, collate = make(name, packing="flat")
    records = mixed_records()
    alone = loss_and_gradients(model, [collate([value]) for value in records])
    batch = collate([records[:2], records[2:]])
    assert len(batch["input_ids"]) == 1
    model.config.get_text_config()._attn_implementation = "varlen"
    require_equal(loss_and_gradients(model, [batch]), alone)


def test_broken_and_cut_records_of_a_row_are_what_they_are_alone(
    make: Any, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (pictures / "cut.png").write_bytes((pictures / "0.png").read_bytes()[:40])
    values = mixed_records()
    broken = record([("human", "<image>\nWhat?"), ("gpt", "A cat.")], ["cut.png"])
    long = record([("human", "Say it."), ("gpt", "long " * 40)], [])
    model, collate = make("qwen2_5_vl", bad_images="skip", max_length=120)
    with caplog.at_level(logging.WARNING):
        batch = collate([[broken], [values[0], broken, long], [values[1], values[2]]])
    assert len(batch["input_ids"]) == 2
    assert "cut.png" in caplog.text
    kept = [values[0], long, values[1], values[2]]
    counts = collate.counts()
    assert (counts["skipped"], counts["cut"]) == (2, 1)
    require_equal(loss_and_gradients(model, [batch]), loss_and_gradients(model, [collate([one]) for one in kept]))
    assert (batch["labels"][batch["position_ids"][0] == 0] == -100).all()


def test_a_family_that_cannot_is_refused_with_the_reason(make: Any, pictures: Path) -> None:
    _, collate = make("mllama")
    with raises_code("packing-unsupported-model", message="attends to all pictures of the row", hint="group_by_length"):
        collate([mixed_records(single=True)[:2]])
    for kind, reason in {
        "idefics2": "no test compares packed rows",
        "qwen3_5": "it has layers of type linear_attention",
        "bloom": "it takes no positions",
    }.items():
        with raises_code("packing-unsupported-model", message=reason):
            require_packable(AutoConfig.for_model(kind))
    for kind in ("llama", "llava", "llava_next", "gemma2", "gpt2"):
        require_packable(AutoConfig.for_model(kind))
    with raises_code("collate-unsupported-layout", message="model_config", hint="collator_for"):
        ProcessorCollator(processor_of("qwen2_5_vl"), image_folder=pictures)([mixed_records()[:2]])
