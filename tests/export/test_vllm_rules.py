"""An export by the rules of vLLM's vllm/lora/peft_helper.py and lora/utils.py, of October 2026.

vLLM reads these keys of adapter_config.json and ignores all others silently. Versions before 0.32 also ignore
rank_pattern and alpha_pattern, so an export for servers has one rank and one scale.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from milora_vl import apply_milora, load_model, save_adapter
from milora_vl.export import export
from support.adapter_cases import LLAVA_POLICY, move

LARGEST_RANK = 512  # of --max-lora-rank
REQUIRED = {"r", "lora_alpha", "target_modules"}
READ = {
    *REQUIRED, "bias", "modules_to_save", "use_rslora", "use_dora", "lora_bias", "init_lora_weights",
    "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora", "rank_pattern", "alpha_pattern",
}  # fmt: skip
# Keys that say nothing about the weights, so that vLLM may ignore them.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_type", "peft_version",
    "revision", "task_type", "fan_in_fan_out", "corda_config", "eva_config", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "layers_pattern", "layers_to_transform", "qalora_group_size",
    "exclude_modules", "ensure_weight_tying",
}  # fmt: skip


def refused(config: dict[str, Any]) -> list[str]:
    """Why vLLM refuses an adapter."""
    reasons = [f"{key} is missing" for key in sorted(REQUIRED - config.keys())]
    saved = [name for name in config.get("modules_to_save") or () if name not in ("classifier", "score")]
    reasons += [f"modules_to_save {saved}"] if saved else []
    reasons += ["bias"] if config.get("bias", "none") != "none" else []
    flags = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
    reasons += [name for name in flags if config.get(name)]
    start = config.get("init_lora_weights", True)
    known = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
    reasons += ["init_lora_weights"] if isinstance(start, str) and start not in known else []
    largest = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    reasons += ["rank"] if largest > LARGEST_RANK else []
    return reasons


def scaling_of(config: dict[str, Any], module: str) -> float:
    def found(pattern: dict[str, Any], default: Any) -> Any:
        return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)

    rank = found(config.get("rank_pattern") or {}, config["r"])
    alpha = found(config.get("alpha_pattern") or {}, config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


@pytest.fixture(scope="module")
def trained(tiny_llava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter of several ranks and scales on its language tower."""
    root = tmp_path_factory.mktemp("served")
    for part in tiny_llava():
        part.save_pretrained(root / "base")
    model = apply_milora(load_model(root / "base")[0], LLAVA_POLICY[:3])
    move(model)
    save_adapter(model, root / "a")
    return root


def read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("form", ["adapter", "rank-12"])
def test_vllm_computes_the_update_of_an_export(trained: Path, tmp_path: Path, form: str) -> None:
    export(trained / "a", form, tmp_path / "out")
    config, weights = read(tmp_path / "out"), load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert refused(config) == []
    ignored = {key: value for key, value in config.items() if key not in READ | HARMLESS}
    assert {key for key, value in ignored.items() if value} == set()
    patterns = (config["rank_pattern"], config["alpha_pattern"])
    assert patterns == ({}, {}) if form != "adapter" else all(patterns)
    stock = PeftModel.from_pretrained(load_model(trained / "base")[0], trained / "a").get_base_model()
    names = {match[1] for key in weights if (match := re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key))}
    assert len(weights) == 2 * len(names) == 2 * 14
    for module in names:
        A, B = (weights[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        wanted = stock.get_submodule(module).get_delta_weight("default")
        assert torch.allclose(scaling_of(config, module) * B @ A, wanted, atol=1e-5), module
