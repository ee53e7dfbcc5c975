"""Which parts a LLaVA is made of, what its config says, and the folder it is written to, once."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from milora_data.assets import cache_dir
from milora_data.errors import UserError
from milora_vl.composing import original, vision
from milora_vl.composing.whole import whole_weights

FORMAT = 2  # to be raised when a base folder that was made before would be wrong
# Where config.json says which tower a base was made of: Hugging Face's LLaVA has no field for that.
TOWER_NAME = "vision_tower_name"
# Rows of the vocabulary: a multiple of this, as Hugging Face's own conversion of LLaVA has it.
ROWS = 64


@dataclass(frozen=True, slots=True)
class Parts:
    """A language model, a vision tower and, where one is trained already, a projector; folders, ids or files."""

    language: str
    vision: str
    projector: str | None = None  # mm_projector.bin, mm_projector.safetensors or a folder with one
    select_layer: int = -2  # LLaVA-1.5's: the last layer but one
    select_feature: str = "patch"
    vision_weights: str | None = None

    def describe(self) -> str:
        """For people."""
        projector = f"projector {self.projector}" if self.projector else "a new projector"
        return f"{self.language} + {self.vision} (layer {self.select_layer}, {self.select_feature}) + {projector}"


def parts_of_original(folder: Path) -> Parts:
    """The parts of a whole model in LLaVA's original layout: all but the tower lie in its own files."""
    found = original.read_original(folder)
    tower = found.vision_tower
    beside = folder / tower
    tower = str(beside) if not Path(tower).is_dir() and beside.is_dir() else tower
    return Parts(str(folder), tower, str(folder), found.select_layer, found.select_feature)


def language_config(name: str) -> Any:
    """Config of the language model: a text-only model, or the Llama inside a folder in LLaVA's original layout."""
    from milora_vl import models

    folder = Path(name)
    return original.read_original(folder).text_config() if original.is_original(folder) else models.config_of(name)


def llava_config(plan: Any, text: Any, *, image_token: int) -> Any:
    """HF's LlavaConfig of the parts; `plan` is a TowerPlan. Says in `text` too whether its head stays tied."""
    from transformers import LlavaConfig

    text.tie_word_embeddings = bool(text.tie_word_embeddings) and _can_tie(text)
    config: Any = LlavaConfig(
        vision_config=plan.config,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=plan.tokens,
        vision_feature_layer=plan.layer,
        vision_feature_select_strategy=plan.strategy,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return config


def _can_tie(text: Any) -> bool:
    """HF's LLaVA ties its head to `embed_tokens` of the language model by name; GPT-2 and others call it otherwise."""
    from transformers import AutoModel

    with torch.device("meta"):
        return "embed_tokens" in dict(AutoModel.from_config(text).named_children())


def planned_config(parts: Parts) -> Any:
    """The config that the parts will have together, from their configs alone (for a dry run)."""
    text = language_config(parts.language)
    plan = vision.plan_tower(vision.tower_config(parts.vision), layer=parts.select_layer, feature=parts.select_feature)
    image_token = text.vocab_size
    text.vocab_size = -(-(image_token + 1) // ROWS) * ROWS
    return llava_config(plan, text, image_token=image_token)


def planned_folder(parts: Parts) -> Path:
    """The folder in the cache that a base of these parts has, or will have: its name tells its contents."""
    return cache_dir() / "models" / f"{_name(parts)}-{_digest(parts)}"


def base_folder(parts: Parts) -> tuple[Path, bool]:
    """The folder with these parts in Hugging Face's layout, and whether it was made now rather than found.

    It lies in the cache under a name of its contents; an adapter names it as its base, and stock PEFT loads both.
    """
    folder = planned_folder(parts)
    if (folder / "config.json").is_file():
        return folder, False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".composing-") as scratch:
        made = Path(scratch) / "model"
        with whole_weights():
            write(parts, made)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").is_file():
                raise
    return folder, True


@whole_weights()
def write(parts: Parts, folder: Path) -> None:
    """Compose the parts and write model and processor into `folder`. UserError where they do not fit together."""
    from milora_vl.compose import compose, processor_for
    from milora_vl.composing.language import load_language
    from milora_vl.projector import load_projector

    if parts.vision_weights == vision.RANDOM:
        sys.stderr.write(f"warning: {parts.vision} gets random weights: for a try-out only\n")
    language, tokenizer = load_language(parts.language)
    plan = vision.plan_tower(vision.tower_config(parts.vision), layer=parts.select_layer, feature=parts.select_feature)
    tower = _tower(parts, plan, language.dtype)
    model = compose(tower, language, tokenizer, plan=plan, rows=ROWS)
    if parts.projector:
        load_projector(model, Path(parts.projector))
    mean, std = vision.picture_statistics(parts.vision)
    processor = processor_for(
        tokenizer,
        image_size=plan.image_size,
        patch_size=plan.config.patch_size,
        mean=mean,
        std=std,
        strategy=plan.strategy,
        extra_tokens=plan.extra_tokens,
    )
    tower_folder = Path(parts.vision)
    name = str(tower_folder.resolve()) if tower_folder.is_dir() else parts.vision
    model.config.update({TOWER_NAME: name})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _tower(parts: Parts, plan: vision.TowerPlan, dtype: torch.dtype) -> Any:
    folder = Path(parts.language)
    if original.is_original(folder):
        inside = original.read_original(folder).tensors(original.TOWER)
        if inside:  # a tower that was trained too
            return vision.with_weights(plan.config, inside, dtype)
    return vision.load_tower(parts.vision, plan.config, dtype, parts.vision_weights)


def _name(parts: Parts) -> str:
    return Path(parts.language).name.lower().replace(".", "_") + "-" + Path(parts.vision).name.lower()[:24]


def _digest(parts: Parts) -> str:
    """A name for the contents: ids as they are, files by size and time, the projector by its bytes' place in both."""
    seen = {name: _stamp(Path(value)) for name, value in asdict(parts).items() if isinstance(value, str)}
    content = json.dumps([FORMAT, asdict(parts), seen], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


def require_parts(parts: Parts) -> None:
    """Check what can be checked before anything is loaded. UserError names the part that is not there."""
    from milora_vl.projector import projector_file

    if parts.projector and not original.is_original(Path(parts.projector)):
        projector_file(Path(parts.projector))
    for flag, name in (("the language model", parts.language), ("--vision_tower", parts.vision)):
        if name.startswith((".", "/")) and not Path(name).is_dir():
            raise UserError(f"{flag} {name}: no such folder")
