"""Compose a LLaVA from named parts (`parts:` of a recipe, `compose`), load its vision tower, and write it to a folder.

The language model is any causal LM whose logits are a matrix times its last hidden states.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milora_data.assets import cache_dir
from milora_vl.common.atomic_write import complete_folder
from milora_vl.common.cli.console import beside
from milora_vl.common.cli.web import hub_is_known
from milora_vl.common.compat.transformers import whole_weights
from milora_vl.common.errors import UserError, first_line
from milora_vl.core.weights.tensor_files import read_weights
from milora_vl.models import original, pretrained
from milora_vl.models.assemble import TowerPlan, compose, llava_config, plan_tower, processor_for
from milora_vl.models.names import BUILT_IN_MODELS
from milora_vl.models.projector import load_projector, projector_file
from milora_vl.models.timm_tower import TimmTower, TimmTowerConfig, as_map


def load_language(name: str) -> tuple[Any, Any]:
    """Load a causal LM in the dtype it was saved in, and its tokenizer. Raises UserError if a LLaVA cannot use it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = language_config(name)
    if "vision_config" in config.to_dict():
        message = "this is already a vision-language model; composing needs a text-only model"
        hint = "fine-tune it unchanged:  python -m milora_vl.train --model NAME"
        raise UserError(message, where=name, hint=hint)
    language = pretrained.read_pretrained(AutoModelForCausalLM, name, config=config, dtype="auto")
    tokenizer = pretrained.read_pretrained(AutoTokenizer, name)
    require_plain_head(language, name)
    return language.eval(), tokenizer


def require_plain_head(language: Any, name: str) -> None:
    """Raise UserError for a model that caps, scales or shifts its logits: HF's LLaVA computes head(hidden)."""
    ids = torch.arange(1, 9)[None].to(language.device)
    with torch.no_grad():
        logits = language(input_ids=ids).logits
        plain = torch.nn.functional.linear(
            language.base_model(input_ids=ids)[0], language.get_output_embeddings().weight
        )
    if not torch.allclose(logits.float(), plain.float(), rtol=2e-2, atol=2e-2 * float(logits.abs().max())):
        message = "its logits are not its head times its last hidden states (a cap, a scale, a bias)"
        hint = "Hugging Face's LLaVA does not support this; use another language model"
        raise UserError(message, where=name, hint=hint)


FORMAT = 2  # increase it if older base folders become wrong


# Key of config.json with the name of the tower; Hugging Face's LLaVA has no field for it.
TOWER_NAME = "vision_tower_name"


# The vocabulary is padded to a multiple of this, as in Hugging Face's conversion of LLaVA.
ROWS = 64


@dataclass(frozen=True, slots=True)
class Parts:
    """A language model, a vision tower and optionally a trained projector: folders, ids or files."""

    language: str
    vision: str
    projector: str | None = None  # mm_projector.bin, mm_projector.safetensors or a folder with one
    select_layer: int = -2  # as in LLaVA-1.5: the second to last layer
    select_feature: str = "patch"
    vision_weights: str | None = None

    def describe(self) -> str:
        projector = f"projector {self.projector}" if self.projector else "a new projector"
        return f"{self.language} + {self.vision} (layer {self.select_layer}, {self.select_feature}) + {projector}"


def parts_of_original(folder: Path) -> Parts:
    config = original.read_original(folder)
    tower = config.vision_tower
    beside = folder / tower
    tower = str(beside) if not Path(tower).is_dir() and beside.is_dir() else tower
    return Parts(str(folder), tower, str(folder), config.select_layer, config.select_feature)


def language_config(name: str) -> Any:
    folder = Path(name)
    return original.read_original(folder).text_config() if original.is_original(folder) else pretrained.config_of(name)


def planned_config(parts: Parts) -> Any:
    """Return the config of the composed model from the configs of its parts, for a dry run."""
    text = language_config(parts.language)
    plan = plan_tower(tower_config(parts.vision), layer=parts.select_layer, feature=parts.select_feature)
    image_token = text.vocab_size
    text.vocab_size = -(-(image_token + 1) // ROWS) * ROWS
    return llava_config(plan, text, image_token=image_token)


def planned_folder(parts: Parts) -> Path:
    return cache_dir() / "models" / f"{_name(parts)}-{_digest(parts)}"


def base_folder(parts: Parts) -> tuple[Path, bool]:
    """Return the folder with these parts in Hugging Face's layout, and whether this call composed it.

    The folder is in the cache. An adapter refers to it as its base, and stock PEFT loads both.
    """
    folder = planned_folder(parts)
    if (folder / "config.json").is_file():
        return folder, False
    with complete_folder(folder) as staged:
        write(parts, staged)
    return folder, True


@whole_weights()
def write(parts: Parts, folder: Path) -> None:

    if parts.vision_weights == RANDOM:
        sys.stderr.write(f"warning: {parts.vision} has random weights: use it only for tests\n")
    language, tokenizer = load_language(parts.language)
    plan = plan_tower(tower_config(parts.vision), layer=parts.select_layer, feature=parts.select_feature)
    tower = _tower(parts, plan, language.dtype)
    model = compose(tower, language, tokenizer, plan=plan, rows=ROWS)
    if parts.projector:
        load_projector(model, Path(parts.projector))
    mean, std = picture_statistics(parts.vision)
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
    sentencepiece = Path(parts.language) / "tokenizer.model"
    if sentencepiece.is_file():  # transformers 5 does not save it, and llama.cpp needs it
        shutil.copyfile(sentencepiece, folder / sentencepiece.name)


def _tower(parts: Parts, plan: TowerPlan, dtype: torch.dtype) -> Any:
    folder = Path(parts.language)
    if original.is_original(folder):
        inside = original.read_original(folder).tensors(original.TOWER)
        if inside:  # the tower was trained too
            return with_weights(plan.config, inside, dtype)
    return load_tower(parts.vision, plan.config, dtype, parts.vision_weights)


def _name(parts: Parts) -> str:
    return Path(parts.language).name.lower().replace(".", "_") + "-" + Path(parts.vision).name.lower()[:24]


def _digest(parts: Parts) -> str:
    stamps = {name: _stamp(Path(value)) for name, value in asdict(parts).items() if isinstance(value, str)}
    content = json.dumps([FORMAT, asdict(parts), stamps], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


def require_parts(parts: Parts) -> None:

    if parts.projector and not original.is_original(Path(parts.projector)):
        projector_file(Path(parts.projector))
    for part, name in (("language model", parts.language), ("vision tower", parts.vision)):
        if name.startswith((".", "/")) and not Path(name).is_dir():
            raise UserError(
                f"no such folder; it should hold the {part}", code="path-missing", where=name, hint=beside(Path(name))
            )


TIMM = "timm/"

RANDOM = "random"

# Mean and standard deviation of CLIP, for towers without a preprocessor.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def tower_config(name: str) -> Any:
    if name.startswith(TIMM):
        size, grid = _timm_sizes(name.removeprefix(TIMM))
        return TimmTowerConfig.of(name.removeprefix(TIMM), image_size=size, grid=grid)
    config = pretrained.config_of(name)
    if "vision_config" in config.to_dict():
        config = config.vision_config
    if name in BUILT_IN_MODELS or "image_size" not in config.to_dict():
        message = f"not a vision tower that another model can use: {config.model_type}"
        hint = "expected:  CLIP, SigLIP, a ViT, or timm/NAME"
        raise UserError(message, where=name, hint=hint)
    return config


def load_tower(name: str, config: Any, dtype: torch.dtype, weights: str | None = None) -> Any:
    from transformers import AutoModel

    if name.startswith(TIMM):
        tower: Any = TimmTower(config)
        if weights != RANDOM:
            tower.encoder.load_state_dict(_timm_state(config.architecture, weights))
        return tower.to(dtype).eval()
    if weights == RANDOM:
        return AutoModel.from_config(config).to(dtype).eval()
    return pretrained.read_pretrained(AutoModel, name, config=config, dtype=dtype).eval()


def with_weights(config: Any, state: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """Return the tower with weights from LLaVA's files; their names may have the extra prefix `vision_model.`."""
    from transformers import AutoModel

    tower = AutoModel.from_config(config)
    expected = set(tower.state_dict())
    plain = {name if name in expected else name.removeprefix("vision_model."): t for name, t in state.items()}
    tower.load_state_dict({name: t for name, t in plain.items() if name in expected})
    return tower.to(dtype).eval()


def picture_statistics(name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and standard deviation for the images of a tower; the default is CLIP's."""
    from transformers import AutoImageProcessor

    if name.startswith(TIMM):
        import timm

        settings = timm.get_pretrained_cfg(name.removeprefix(TIMM))
        return (settings.mean, settings.std) if settings is not None else (CLIP_MEAN, CLIP_STD)
    try:
        local = Path(name).is_dir()
        processor = AutoImageProcessor.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError):
        sys.stderr.write(f"warning: {name} has no image mean and standard deviation: using the values of CLIP\n")
        return CLIP_MEAN, CLIP_STD
    return processor.image_mean, processor.image_std


def _timm_sizes(architecture: str) -> tuple[int, int]:
    """Return pixels and tokens per side of the trained network. Raises UserError if its output is not square."""
    import timm

    if not timm.is_model(architecture):
        near = timm.list_models(f"{architecture.split('_')[0]}*")[:3]
        raise UserError(f"timm has no model {architecture!r}", hint=f"similar: {', '.join(near)}, ..." if near else "")
    settings = timm.get_pretrained_cfg(architecture)
    size = int(settings.input_size[-1]) if settings is not None else 224
    with torch.device("meta"):
        encoder: Any = timm.create_model(architecture, pretrained=False, num_classes=0).eval()
        try:
            features = as_map(encoder, encoder.forward_features(torch.empty(1, 3, size, size)))
        except (ValueError, AttributeError) as error:
            message = f"not usable as a vision tower: {error}"
            hint = "use a network of timm with feature maps, or an encoder such as openai/clip-vit-large-patch14-336"
            raise UserError(message, where=f"timm/{architecture}", hint=hint) from None
    grid = int(features.shape[-1])
    return size - size % grid, grid  # Inception's 299 pixels do not divide into 8 tokens


def _timm_state(architecture: str, weights: str | None) -> Any:
    import timm

    if weights is not None:
        file = Path(weights)
        if not file.is_file():
            raise UserError(
                f"no such file: {weights}", code="path-missing", where="--vision_weights", hint=beside(file)
            )
        state = read_weights(file)
        expected = timm.create_model(architecture, pretrained=False, num_classes=0).state_dict()
        missing = [key for key in expected if key not in state]
        if missing:
            raise UserError(
                f"the file does not fit timm's {architecture}: {missing[0]} and {len(missing) - 1} more are missing",
                where=str(weights),
                hint="name the timm architecture that the file was made for",
            )
        return {key: state[key] for key in expected}
    settings = timm.get_pretrained_cfg(architecture)
    if not hub_is_known() and not _is_cached(settings):  # the client would retry for a minute
        raise _no_weights(architecture, "the host of the hub is not known here")
    try:
        return timm.create_model(architecture, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # timm and the hub client raise many classes
        raise _no_weights(architecture, first_line(error)) from None


def _is_cached(settings: Any) -> bool:
    from huggingface_hub import try_to_load_from_cache

    if settings is None or not settings.hf_hub_id:
        return True
    names = {"model.safetensors", "pytorch_model.bin", settings.hf_hub_filename or "model.safetensors"}
    return any(isinstance(try_to_load_from_cache(settings.hf_hub_id, name), str) for name in names)


def _no_weights(architecture: str, reason: str) -> UserError:
    message = f"the weights of timm's {architecture} are not here, and the hub does not answer"
    hint = f"error: {reason}\nuse --vision_weights FILE, or --vision_weights random for tests"
    return UserError(message, code="model-not-available", where=f"timm/{architecture}", hint=hint)
