"""Load the weights of any named model; compose a LLaVA from named parts (`parts:` of a recipe, `compose`).

Every model without a timm tower (`smol-llava` has one) also loads without this package. The language model of a
composed one is any causal LM whose logits are a matrix times its last hidden states.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from milora_data.assets import cache_dir
from milora_vl.common.atomic_write import complete_folder
from milora_vl.common.cli.web import hub_is_known
from milora_vl.common.compat.transformers import forget_conversions, pass_texts_unchanged, quiet_bars, whole_weights
from milora_vl.common.errors import UserError, beside, first_line
from milora_vl.core.evaluation_mode import keep_weights_readable
from milora_vl.core.weights.tensor_files import read_weights
from milora_vl.models import base
from milora_vl.models.base import TIMM, Parts, is_original, parts_of_original, read_original, read_pretrained
from milora_vl.models.devices import Quantization, quantization_config, unquantized
from milora_vl.models.llava import ROWS, TowerPlan, compose
from milora_vl.models.names import BUILT_IN_MODELS
from milora_vl.models.projector import load_projector
from milora_vl.models.timm_tower import TimmTower

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def load_weights(
    name_or_path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    quantization: Quantization | BitsAndBytesConfig | None = None,
    device: torch.device | None = None,
) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.integrations import is_deepspeed_zero3_enabled

    name = in_hf_layout(name_or_path)
    source = base.source_of(name)
    config = base.read(AutoConfig.from_pretrained, source, name)
    if base.MARK in config.to_dict():
        raise UserError(
            f"{name} is in the layout of the original LLaVA code, which only loads from a folder",
            hint=f"first:  hf download {name} --local-dir FOLDER      then --model FOLDER",
        )
    auto = AutoModelForImageTextToText if "vision_config" in config.to_dict() else AutoModelForCausalLM
    arguments: dict[str, Any] = {"dtype": dtype or "auto"}
    if quantization is not None:
        chosen = quantization
        if isinstance(chosen, str):
            with whole_weights(), torch.device("meta"):
                chosen = quantization_config(chosen, unquantized(auto.from_config(config)))
        arguments |= {"quantization_config": chosen, "device_map": {"": device or "cpu"}}
    elif device is not None and device.type != "cpu" and not is_deepspeed_zero3_enabled():
        arguments["device_map"] = {"": device}  # the weights go there from the file, not through the machine's memory
    with quiet_bars() if name in BUILT_IN_MODELS or not sys.stderr.isatty() else nullcontext():
        model = base.read(auto.from_pretrained, source, name, **arguments)
    if is_deepspeed_zero3_enabled():
        forget_conversions(model)
    keep_weights_readable(model)
    pass_texts_unchanged(model)
    # The code in the folder was not used, so saved configs must not refer to it.
    vars(model.config).pop("auto_map", None)
    return model


def prepare(name: str) -> None:
    """Write the folder of a model that is built at first use: smol-llava, or one in LLaVA's original layout."""
    base.source_of(in_hf_layout(name))


def in_hf_layout(name: str | Path) -> str:
    """Return the name, or the converted (cached) folder of a model in LLaVA's original layout."""
    folder = Path(name)
    if not is_original(folder):
        return str(name)
    converted, is_new = base_folder(parts_of_original(folder))
    if is_new:
        sys.stderr.write(f"converted {folder} from LLaVA's original layout to Hugging Face's: {converted}\n")
    return str(converted)


FORMAT = 2  # increase it if older base folders become wrong
# Key of config.json with the name of the tower; Hugging Face's LLaVA has no field for it.
TOWER_NAME = "vision_tower_name"
RANDOM = "random"


def planned_folder(parts: Parts) -> Path:
    return cache_dir() / "models" / f"{_name(parts)}-{_digest(parts)}"


def base_folder(parts: Parts) -> tuple[Path, bool]:
    """Return the folder with these parts in Hugging Face's layout, and whether this call composed it.

    The folder is in the cache. An adapter refers to it as its base, and stock PEFT loads both.
    """
    folder = planned_folder(parts)
    if (folder / "config.json").is_file():
        return folder, False
    with FileLock(f"{folder}.lock"):  # as in `base.source_of`
        is_new = not (folder / "config.json").is_file()
        if is_new:
            with complete_folder(folder) as staged:
                write(parts, staged)
    return folder, is_new


@whole_weights()
def write(parts: Parts, folder: Path) -> None:
    if parts.vision_weights == RANDOM:
        sys.stderr.write(f"warning: {parts.vision} has random weights: use it only for tests\n")
    language, tokenizer = load_language(parts.language)
    plan = base.tower_plan(parts)
    tower = _tower(parts, plan, language.dtype)
    model = compose(tower, language, tokenizer, plan=plan, rows=ROWS)
    if parts.projector:
        load_projector(model, Path(parts.projector))
    tower_folder = Path(parts.vision)
    name = str(tower_folder.resolve()) if tower_folder.is_dir() else parts.vision
    model.config.update({TOWER_NAME: name})
    model.save_pretrained(folder)
    base.composed_processor(parts).save_pretrained(folder)
    sentencepiece = Path(parts.language) / "tokenizer.model"
    if sentencepiece.is_file():  # transformers 5 does not save it, and llama.cpp needs it
        shutil.copyfile(sentencepiece, folder / sentencepiece.name)


def _tower(parts: Parts, plan: TowerPlan, dtype: torch.dtype) -> Any:
    folder = Path(parts.language)
    if is_original(folder):
        inside = read_original(folder).tensors(base.TOWER_WEIGHTS)
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


def load_language(name: str) -> tuple[Any, Any]:
    """Load a causal LM in the dtype it was saved in, and its tokenizer. Raises UserError if a LLaVA cannot use it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = base.language_config(name)
    if "vision_config" in config.to_dict():
        message = "this is already a vision-language model; composing needs a text-only model"
        hint = "fine-tune it unchanged:  python -m milora_vl.train --model NAME"
        raise UserError(message, where=name, hint=hint)
    language = read_pretrained(AutoModelForCausalLM, name, config=config, dtype="auto")
    tokenizer = read_pretrained(AutoTokenizer, name)
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


def load_tower(name: str, config: Any, dtype: torch.dtype, weights: str | None = None) -> Any:
    from transformers import AutoModel

    if name.startswith(TIMM):
        tower: Any = TimmTower(config)
        if weights != RANDOM:
            tower.encoder.load_state_dict(_timm_state(config.architecture, weights))
        return tower.to(dtype).eval()
    if weights == RANDOM:
        return AutoModel.from_config(config).to(dtype).eval()
    return read_pretrained(AutoModel, name, config=config, dtype=dtype).eval()


def with_weights(config: Any, state: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """Return the tower with weights from LLaVA's files; their names may have the extra prefix `vision_model.`."""
    from transformers import AutoModel

    tower = AutoModel.from_config(config)
    expected = set(tower.state_dict())
    plain = {name if name in expected else name.removeprefix("vision_model."): t for name, t in state.items()}
    tower.load_state_dict({name: t for name, t in plain.items() if name in expected})
    return tower.to(dtype).eval()


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
