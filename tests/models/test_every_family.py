"""Families of transformers as their processors and module trees come, and the page that lists what works with them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from milora_data.batches.processor_collator import ProcessorCollator
from milora_data.batches.processor_inputs import usable_inputs
from milora_data.records.record import Turn
from milora_vl import collator_for
from milora_vl.core.policy.policy import Policy
from milora_vl.core.policy.towers import find_towers
from milora_vl.models.generate import Prompt, generate
from support import family_table
from support.any_family import tiny_family, tiny_model
from support.family_table import COLUMNS, FAMILIES, PAGE, RESULTS, check, rows_of
from support.problems import raises_code
from support.versions import needs_spans

RECORDED = json.loads(RESULTS.read_text())
SLOW = ("lighton_ocr", "kimi_k25", "ernie4_5_vl_moe", "qwen3_5_moe", "cosmos3_edge", "qianfan_ocr")
pytestmark = [pytest.mark.filterwarnings("ignore"), needs_spans]
same_version = pytest.mark.skipif(
    RECORDED["transformers"] != family_table.transformers.__version__, reason="the page is of another transformers"
)


def test_the_page_is_made_of_the_recorded_results() -> None:
    with PAGE.open(encoding="utf-8", newline="") as opened:
        assert [tuple(row) for row in csv.reader(opened)] == rows_of(RECORDED)
    assert all(set(row) == set(COLUMNS) and all(row.values()) for row in RECORDED["families"].values())


@same_version
def test_every_registered_family_has_a_row() -> None:
    assert list(RECORDED["families"]) == list(FAMILIES)


def marked() -> list[Any]:
    """Every family: one quickly, the others as slow tests."""
    marks = {"ovis2": (), **dict.fromkeys(SLOW, pytest.mark.slow)}
    return [pytest.param(name, marks=marks.get(name, pytest.mark.slow)) for name in FAMILIES]


@same_version
@pytest.mark.parametrize("name", marked())
def test_what_worked_with_a_family_works(name: str, tmp_path: Path) -> None:
    assert check(name, tmp_path) == RECORDED["families"][name]


def test_a_processor_that_hides_where_it_puts_the_tokens_of_a_picture_is_refused() -> None:
    """The loss mask is found by characters: it would be on other tokens than the answer."""
    _, processor = tiny_family("idefics2")
    with raises_code("", message="it does not report where"):
        usable_inputs(processor, "idefics2")


def test_pixels_in_a_half_type_become_those_of_all_other_families(pictures: Path) -> None:
    _, processor = tiny_family("llama4")
    batch = ProcessorCollator(processor, image_folder=pictures)([family_table.ASKED])
    assert batch["pixel_values"].dtype == torch.float32


@pytest.mark.parametrize("name", ["qianfan_ocr", "cosmos3_edge", "hunyuan_vl"])
def test_what_a_processor_needs_is_found_out_from_it(name: str, pictures: Path) -> None:
    """Qianfan expands another token than it writes, Cosmos has to be asked for kinds of tokens, HunYuan for a frame."""
    config, processor = tiny_family(name)
    model = tiny_model(config)
    batch = collator_for(model, processor, image_folder=pictures)([family_table.ASKED])
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == "A cat.<|im_end|>"
    assert model(**batch).loss > 0


def test_experts_for_pictures_are_language_and_their_gates_have_no_adapter() -> None:
    towers = find_towers(tiny_model(tiny_family("ernie4_5_vl_moe")[0]))
    assert towers.roots == {
        "language": ("model.language_model",),
        "projector": ("model.resampler_model",),
        "vision": ("model.vision_tower",),
    }
    model = tiny_model(tiny_family("qwen3_5_moe")[0])
    gates = [path for path, module in model.named_modules() if getattr(module, "out_features", 0) == 1]
    hit = {target.path for target in family_table.targets_of(model)}
    assert gates
    assert not hit & set(gates)


def test_experts_in_one_tensor_are_refused_and_the_other_layers_get_adapters() -> None:
    model = tiny_model(tiny_family("qwen3_vl_moe")[0])
    with pytest.warns(UserWarning, match=r"no hook sees them.*target_parameters.*Attention and shared layers"):
        targets = Policy.parse([{"modules": "language", "method": "milora", "rank": 2}]).resolve(model)
    assert {target.path.rpartition(".")[2] for target in targets} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with raises_code("policy-no-match", hint="no hook sees them"):
        Policy.parse([{"modules": "*.mlp.experts", "method": "milora", "rank": 2}]).resolve(model)


def test_a_model_whose_config_declares_no_vision_part_is_asked_nothing_about_pictures(pictures: Path) -> None:
    config, processor = tiny_family("chameleon")
    prompt = Prompt((Turn("user", "<image>\nA?"),), (Image.open(pictures / "0.png"),))
    with raises_code("model-reads-only-text", message="chameleon"):
        generate(tiny_model(config), processor, [prompt])
