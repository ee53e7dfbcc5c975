"""What servers do with a LoRA folder, read in their source: vLLM 0.32.0, SGLang 0.5.23, transformers 5.24."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milora_vl.core.policy.towers import find_towers
from milora_vl.export.request import VLLM_RANKS
from milora_vl.interop.lora_folder import read_config
from milora_vl.models.loading import meta_model

# By model_type: models whose towers take a LoRA in vLLM, and models whose projector has layers that refuse one.
VLLM_TOWERS = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm")
VLLM_PLAIN_PROJECTORS = ("internvl", "llava_onevision")
RENAMED = ("clip_vision_model", "siglip_vision_model")  # in LLaVA, vLLM's names have `vision_model.` in them
TOWER_FLAG = "--enable-tower-connector-lora"
SERVERS = (
    ("lora", "vLLM needs --enable-lora --max-lora-rank {limit}"),
    ("towers", "vLLM ignores the part for the {towers} without " + TOWER_FLAG + " (experimental)"),
    ("clip", "vLLM crashed on a small LLaVA with a CLIP tower with " + TOWER_FLAG + ": use --to merged"),
    ("lost", "vLLM ignores the part for the {lost}, also with " + TOWER_FLAG + ": use --to merged"),
    ("plain projector", "vLLM refuses the folder for its projector: use --to merged"),
    ("whole", "vLLM refuses modules trained in full: use --with_base or --to merged"),
    ("scales", "vLLM before 0.32 ignores alpha_pattern: use --to rank-N"),
    ("projector", "SGLang refuses the folder for its projector: use --to merged"),
    ("vision", "SGLang mixes the vision tower with the language tower, or refuses it: use --to merged"),
    ("whole", "SGLang ignores modules trained in full: use --with_base or --to merged"),
    ("ranks", "SGLang refuses modules of several ranks: use --to rank-N"),
    ("scales", "SGLang ignores alpha_pattern: use --to rank-N"),
    ("lora", "transformers serve refuses LoRA folders: use --to merged"),
)


def notes_of(folder: Path, base: Any) -> list[str]:
    """Return the rows of SERVERS that hold for a written LoRA folder on a base with this HF config."""
    lora, family, parts = read_config(folder), base.model_type, base.to_dict()
    tower_of, paths = find_towers(meta_model(base)).tower_of, list(lora.target_modules or ())
    towers = [tower for tower in ("projector", "vision") if tower in map(tower_of, paths)]
    lost, tower = [] if family in VLLM_TOWERS else towers, parts.get("vision_config", {}).get("model_type")
    if "llava" in family and "vision" in towers and tower in RENAMED:
        lost = ["vision"]
    ranks = [(lora.rank_pattern or {}).get(f"^{path}", lora.r) for path in paths]  # as our exports write the keys
    alphas = [(lora.alpha_pattern or {}).get(f"^{path}", lora.lora_alpha) for path in paths]
    is_refused = "projector" in towers and family in VLLM_PLAIN_PROJECTORS
    holds = {
        "lora": True,
        "towers": bool(towers) and family in VLLM_TOWERS,
        "clip": bool(towers) and family in VLLM_TOWERS and tower == "clip_vision_model",
        "lost": bool(lost) and not is_refused,
        "plain projector": is_refused,
        "projector": "projector" in towers,
        "vision": "vision" in towers,
        "whole": bool(lora.modules_to_save),
        "ranks": len(set(ranks)) > 1,
        "scales": any(alpha / rank != lora.lora_alpha / lora.r for alpha, rank in zip(alphas, ranks, strict=True)),
    }
    sizes = VLLM_RANKS[2:]  # vLLM's default is 16
    limit = next((size for size in sizes if size >= max(ranks)), f"N, at most {sizes[-1]}: use --to rank-N")
    names = {"limit": limit, "towers": " and ".join(towers), "lost": " and ".join(lost)}
    return [text.format(**names) for fact, text in SERVERS if holds[fact]]
