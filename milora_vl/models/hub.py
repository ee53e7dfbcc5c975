"""Load weights, config and processor by hub id or folder, in Hugging Face's layout; missing fields of the processor.

The processor gets missing fields from the model's config: many published processors do not define the number of image
tokens, and then LLaVA fails with a count mismatch. `loading` adds folders in LLaVA's original layout.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from contextlib import nullcontext
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from milora_data.encode.tokens import share_template
from milora_vl import tiny
from milora_vl.adapter.folders import newest_of_unfinished
from milora_vl.base.errors import UserError, first_line
from milora_vl.base.hub_host import hub_is_known
from milora_vl.cli.command_line import suggest
from milora_vl.compat.transformers import forget_conversions, whole_weights
from milora_vl.models import original, smol_llava
from milora_vl.models.image_tokens import complete_processor
from milora_vl.models.names import (
    BUILT_IN_MODELS,
    MADE_IN_MEMORY,
    NAMED_MODELS,
    PART_OF,
    SAME_WEIGHTS,
    UnknownModelError,
    hub_id,
)
from milora_vl.models.quantized import Quantization, quantization_config, unquantized
from milora_vl.models.quiet import quiet_bars
from milora_vl.policy.towers import keep_weights_readable

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def load_weights(
    name_or_path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    quantization: Quantization | BitsAndBytesConfig | None = None,
    device: torch.device | None = None,
) -> nn.Module:
    """Return a model without its processor, in `dtype` or the dtype it was saved in.

    Raises UserError for an unknown name, a model that is not available, and a folder without a model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.integrations import is_deepspeed_zero3_enabled

    name = str(name_or_path)
    if name in MADE_IN_MEMORY:
        if quantization is not None:
            raise UserError(
                f"{name} exists only in memory and cannot be quantised",
                code="quantization-in-memory",
                hint="save it to a folder and load that folder",
            )
        return _named(_tiny(name)[0].to(dtype or torch.float32), name)
    source = source_of(name)
    config = _read(AutoConfig.from_pretrained, source, name)
    if original.MARK in config.to_dict():
        raise UserError(
            f"{name} is in the layout of the original LLaVA code, which only loads from a folder",
            code="model-original-layout",
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
    with quiet_bars() if name in BUILT_IN_MODELS or not sys.stderr.isatty() else nullcontext():
        model = _read(auto.from_pretrained, source, name, **arguments)
    if is_deepspeed_zero3_enabled():
        forget_conversions(model)
    keep_weights_readable(model)
    vars(model.config).pop(
        "auto_map", None
    )  # the code in the folder was not used, so saved configs must not refer to it
    return _named(model, name)


def weights_folder(name: str) -> Path | None:
    """Return the folder with a model's files, downloaded if needed; None for models in memory.

    Raises UserError for an unknown name and a model that is not available.
    """
    from huggingface_hub import snapshot_download

    if name in MADE_IN_MEMORY:
        return None
    source = source_of(name)
    if Path(source).is_dir():
        return Path(source)
    return Path(_read(snapshot_download, source, name, allow_patterns=["*.json", "*.safetensors", "tokenizer.model"]))


def load_processor(name: str | Path) -> Any:
    """Return the processor of a model, or the tokenizer of a text-only model, without loading weights.

    Raises UserError for an unknown name and a processor that is not available.
    """
    from transformers import AutoProcessor, AutoTokenizer

    name = str(name)
    if name in MADE_IN_MEMORY:
        return _tiny(name)[1]
    config = config_of(name)
    has_images = "vision_config" in config.to_dict()
    processor = _read((AutoProcessor if has_images else AutoTokenizer).from_pretrained, source_of(name), name)
    if has_images:
        share_template(processor)
        complete_processor(processor, config)
    return processor


def config_of(name: str) -> Any:
    """Return the HF config of a named model, a folder or a hub id. Packaged configs need no network."""
    from transformers import AutoConfig

    if name in MADE_IN_MEMORY:
        return copy.deepcopy(_tiny_config(name))
    if name in PART_OF:
        whole, part, differing = PART_OF[name]
        inner = config_of(whole).to_dict()[part] | differing
        return AutoConfig.for_model(inner.pop("model_type"), **inner)
    content = _packaged_config(name)
    if content is not None:
        return AutoConfig.for_model(content.pop("model_type"), **content)
    return _read(AutoConfig.from_pretrained, source_of(name), name)


def _packaged_config(name: str) -> dict[str, Any] | None:
    """Return the content of a named model's config in this package, or None."""
    file = files("milora_vl") / "configs" / f"{SAME_WEIGHTS.get(name, name)}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def read_pretrained(load: Any, name: str, **arguments: Any) -> Any:
    """Call `from_pretrained` of a transformers class on a folder or hub id. Raises UserError if it fails."""
    with quiet_bars():
        return _read(load.from_pretrained, str(name), str(name), **arguments)


def _tiny(name: str) -> tuple[Any, Any]:
    with whole_weights():  # ZeRO-3 would initialize shards, which gives other random weights
        return tiny.tiny_llava() if name == "tiny" else tiny.tiny_llama()


@cache
def _tiny_config(name: str) -> Any:
    return _tiny(name)[0].config


def _named(model: Any, name: str) -> nn.Module:
    """Set the name that adapters record: the name that the user typed, not a cache folder."""
    if name in BUILT_IN_MODELS:
        model.name_or_path = name
        model.config.name_or_path = name
    return model


def source_of(name: str) -> str:
    """Return the folder or hub id behind a name; builds smol-llava and smollm2 at first use.

    Raises UserError for a folder without a model, and UnknownModelError if the name is unknown.
    """
    if name.startswith("smol") and name in BUILT_IN_MODELS:
        return str(smol_llava.made_folder(name))
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            newest = newest_of_unfinished(folder, "--model")
            raise UserError(
                "no model in this folder: it has no config.json",
                code="model-not-in-folder",
                where=name,
                hint=newest.lstrip() or f"found: {names}",
            )
        return name
    if name in NAMED_MODELS or name in SAME_WEIGHTS:
        return hub_id(name)
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return name
    near = suggest(name.lower(), NAMED_MODELS)
    raise UnknownModelError(
        f'unknown model "{name}"',
        code="model-unknown",
        hint=(f"did you mean: {', '.join(near)}\n" if near else "") + f"known:    {', '.join(NAMED_MODELS)}\n"
        "or:       a folder with a model, or a hub id such as llava-hf/llava-1.5-7b-hf",
    )


def _read(load: Any, source: str, name: str, **arguments: Any) -> Any:
    """Call a `from_pretrained` without remote code. Raises UserError if it fails."""
    from safetensors import SafetensorError

    local = Path(source).is_dir()
    try:
        return load(source, local_files_only=local or not hub_is_known(), trust_remote_code=False, **arguments)
    except ImportError as error:
        raise _missing_package(source, error) or _unreadable(source, error) from None
    except (
        SafetensorError,
        ValueError,
        TypeError,
    ) as error:  # truncated, unknown type, no tokenizer
        raise _unreadable(source, error) from None
    except OSError as error:
        if local:
            raise _unreadable(source, error) from None
        raise UserError(
            f"{name} is not on this machine, and the model hub does not answer",
            code="model-not-available",
            hint=f"searched:    {source}, in the local cache and on the hub\n"
            f"error:       {first_line(error)}\n"
            f"try:         hf download {source}      (on a machine with a network), or name a folder that holds it"
            + (
                ""
                if _packaged_config(name) is None
                else f"\nwithout:     python -m milora_vl.train --model {name} --dry-run      needs only its config"
            ),
        ) from None


def _missing_package(source: str, error: ImportError) -> UserError | None:
    """Return the error of a package that the model needs, as transformers names it; None if it names none."""
    named = re.search(r"pip install (?:-U )?([A-Za-z0-9_.-]*[A-Za-z0-9])", str(error))
    package = named.group(1) if named else error.name if isinstance(error, ModuleNotFoundError) else None
    if not package:
        return None
    return UserError(
        f"this model needs the package {package}, which is not installed",
        code="package-missing",
        where=source,
        hint=f"pip install {package}",
    )


def _unreadable(source: str, error: Exception) -> UserError:
    return UserError(
        f"cannot read the model: {first_line(error)}",
        code="model-unreadable",
        where=source,
        hint="copy or download its files again; a model needs config.json, its weights and its tokenizer",
    )
