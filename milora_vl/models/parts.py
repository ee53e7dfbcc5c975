"""The parts of a LLaVA by name (language model, vision tower, projector), its config, and the folder it is written to.

The language model is any causal LM whose head is a plain matrix on its last hidden states.
"""

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
from milora_vl.models import hub, original, vision
from milora_vl.models.assemble import TowerPlan, compose, llava_config, plan_tower, processor_for, whole_weights
from milora_vl.models.projector import load_projector, projector_file


def load_language(name: str) -> tuple[Any, Any]:
    """Load a causal LM in the dtype it was saved in, and its tokenizer. UserError where it cannot be a LLaVA's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if original.is_original(Path(name)):
        config = original.read_original(Path(name)).text_config()
        language: Any = hub.read_pretrained(AutoModelForCausalLM, name, config=config, dtype="auto")
        tokenizer = hub.read_pretrained(AutoTokenizer, name)
    else:
        language, tokenizer = hub.load_weights(name), hub.load_processor(name)
    if "vision_config" in language.config.to_dict():
        raise UserError(f"{name} is a vision-language model already; a LLaVA is composed of a text-only one")
    require_plain_head(language, name)
    return language.eval(), tokenizer


def require_plain_head(language: Any, name: str) -> None:
    """HF's LLaVA takes head(hidden) for the logits: refuse a model that caps or scales them, or has a bias there."""
    ids = torch.arange(1, 9)[None].to(language.device)
    with torch.no_grad():
        own = language(input_ids=ids).logits
        plain = torch.nn.functional.linear(
            language.base_model(input_ids=ids)[0], language.get_output_embeddings().weight
        )
    if not torch.allclose(own.float(), plain.float(), rtol=2e-2, atol=2e-2 * float(own.abs().max())):
        raise UserError(
            f"{name}: its logits are not its head times its last hidden states (a cap, a scale, a bias)\n"
            "Hugging Face's LLaVA has no place for that, so the model would be another one"
        )


FORMAT = 2  # to be raised with every change of what a base folder holds
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
    folder = Path(name)
    return original.read_original(folder).text_config() if original.is_original(folder) else hub.config_of(name)


def planned_config(parts: Parts) -> Any:
    """The config that the parts will have together, from their configs alone (for a dry run)."""
    text = language_config(parts.language)
    plan = plan_tower(vision.tower_config(parts.vision), layer=parts.select_layer, feature=parts.select_feature)
    image_token = text.vocab_size
    text.vocab_size = -(-(image_token + 1) // ROWS) * ROWS
    return llava_config(plan, text, image_token=image_token)


def base_folder(parts: Parts) -> tuple[Path, bool]:
    """The folder with these parts in Hugging Face's layout, and whether it was made now rather than found.

    It lies in the cache under a name of its contents; an adapter names it as its base, and stock PEFT loads both.
    """
    folder = cache_dir() / "models" / f"{_name(parts)}-{_digest(parts)}"
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

    if parts.vision_weights == vision.RANDOM:
        sys.stderr.write(f"warning: {parts.vision} gets random weights: for a try-out only\n")
    language, tokenizer = load_language(parts.language)
    plan = plan_tower(vision.tower_config(parts.vision), layer=parts.select_layer, feature=parts.select_feature)
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
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _tower(parts: Parts, plan: TowerPlan, dtype: torch.dtype) -> Any:
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

    if parts.projector and not original.is_original(Path(parts.projector)):
        projector_file(Path(parts.projector))
    for flag, name in (("the language model", parts.language), ("--vision_tower", parts.vision)):
        if name.startswith((".", "/")) and not Path(name).is_dir():
            raise UserError(f"{flag} {name}: no such folder")
