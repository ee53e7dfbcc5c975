"""Forgetting and changed weights of adapters that PEFT made, of the kinds that are more than factors on matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from milora_vl import load_model
from milora_vl.analyze.layers import layers_of, rows_of
from milora_vl.forgetting.__main__ import main as forgetting
from milora_vl.forgetting.measure import measure_forgetting
from milora_vl.models.tiny import tiny_llama
from support.versions import SAVES_BIASES


def trained(base: str, folder: Path, **config: Any) -> Any:
    """A LoRA of PEFT with every trained number away from its start, saved in `folder`."""
    torch.manual_seed(0)
    model = get_peft_model(load_model(base)[0], LoraConfig(r=2, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(folder))
    return model


def saved_base(folder: Path, **config: Any) -> str:
    """A tiny Llama in a folder, with another config."""
    model, tokenizer = tiny_llama()
    model = type(model)(type(model.config)(**{**model.config.to_dict(), **config}))
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def analysed(folder: Path, base: str | None = None) -> dict[str, dict[str, Any]]:
    _, layers = layers_of(str(folder), base)
    return {row["path"]: row for row in rows_of(layers, "cpu", 8, folder / "rows.jsonl")}


@pytest.mark.skipif(not SAVES_BIASES, reason="this PEFT loses them")
def test_biases_trained_along_are_forgotten_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT leaves them in the base when the adapter is switched off: a separate base is needed."""
    base = saved_base(tmp_path / "base", attention_bias=True)
    model = trained(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], bias="lora_only")
    with pytest.raises(ValueError, match="give base="):
        measure_forgetting(model, load_model(base)[1], num_tokens=300)
    flags = ["--num_tokens", "300", "--on", "text"]
    assert forgetting(["--model", base, "--adapter", str(tmp_path / "adapter"), *flags]) == 0
    found = json.loads((tmp_path / "adapter" / "forgetting.json").read_text())["text"]
    apart = measure_forgetting(model, load_model(base)[1], base=load_model(base)[0], num_tokens=300)
    assert found["kl"] == pytest.approx(apart.kl, rel=1e-6)
    analysed(tmp_path / "adapter")
    assert "also trained what is no matrix: bias" in capsys.readouterr().err


@pytest.mark.parametrize("config", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_head_that_is_tied_has_a_weight(config: dict[str, Any], tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", tie_word_embeddings=True)
    model = trained(base, tmp_path / "adapter", **{"target_modules": ["q_proj"], **config})
    row = analysed(tmp_path / "adapter")["lm_head"]
    change = model.merge_and_unload().lm_head.weight - load_model(base)[0].lm_head.weight
    assert row["update_norm"] == pytest.approx(float(change.detach().norm()), rel=1e-4)
