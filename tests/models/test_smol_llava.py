"""The embedded default: a LLaVA like any other, made from package-index parts."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from milora_vl.interop.load_model import load_model
from milora_vl.models.assemble import compose, processor_for
from milora_vl.models.image_tokens import image_token_id, image_tokens
from milora_vl.models.loading import config_of
from milora_vl.models.timm_tower import TimmTower, TimmTowerConfig
from support.problems import raises_code


@pytest.fixture(scope="module")
def composed(tiny_llama):
    """A small LLaVA of a timm network with random weights and the tiny Llama."""
    config = TimmTowerConfig.of("tf_efficientnet_lite0", image_size=64, grid=2, levels=(2, 3))
    language, tokenizer = tiny_llama()
    model = compose(TimmTower(config).eval(), language, tokenizer)
    half = (0.5, 0.5, 0.5)
    return model, processor_for(tokenizer, image_size=64, patch_size=32, mean=half, std=half)


def test_a_composed_model_takes_pictures_and_reloads_with_the_same_logits(composed, tmp_path):
    model, processor = composed
    batch = processor(
        images=Image.new("RGB", (90, 50), "red"), text="USER: <image>\nHi ASSISTANT:", return_tensors="pt"
    )
    assert int((batch["input_ids"] == image_token_id(model.config)).sum()) == image_tokens(model.config) == 4
    logits = model(**batch).logits
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, its_processor = load_model(tmp_path)
    torch.testing.assert_close(again(**batch).logits, logits)
    assert its_processor.num_additional_image_tokens == 0


@pytest.mark.slow
def test_smol_llava_is_made_once_and_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path))
    model, _ = load_model("smol-llava")
    assert model.name_or_path == "smol-llava"
    assert image_tokens(model.config) == 16
    made = list((tmp_path / "models").iterdir())
    load_model("smol-llava")
    assert list((tmp_path / "models").iterdir()) == made


@pytest.mark.slow
def test_its_language_model_loads_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path))
    model, tokenizer = load_model("smollm2")
    assert model.name_or_path == "smollm2"
    assert model.config.vocab_size == config_of("smollm2").vocab_size == len(tokenizer)
    assert tokenizer.chat_template
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert not hasattr(model.config, "quantization_config")


def test_without_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    for name, value in {"MILORA_CACHE": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    with raises_code("asset-download", message="cannot download", hint="network connection"):
        load_model("smol-llava")
