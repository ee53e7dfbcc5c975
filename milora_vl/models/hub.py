"""Models in Hugging Face's layout by name: a hub id, a folder, or one that this package makes at first use.

The processor is completed from the model's config, since many published ones do not say how many image tokens a picture
takes (LLaVA then fails on a count mismatch). `loading` adds folders in LLaVA's original layout.
"""

from __future__ import annotations

import json
import socket
import sys
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import nn

from milora_data.command import suggest
from milora_data.errors import UserError
from milora_vl import tiny
from milora_vl.models import original, smol_llava
from milora_vl.models.assemble import whole_weights
from milora_vl.models.image_tokens import extra_tokens
from milora_vl.models.names import MADE_HERE, MADE_IN_MEMORY, NAMED_MODELS, PART_OF, SAME_WEIGHTS, UnknownModelError
from milora_vl.models.quantized import Quantization, quantization_config
from milora_vl.models.quiet import quiet_bars
from milora_vl.models.timm_tower import register
from milora_vl.towers import keep_weights_readable

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def load_weights(
    name_or_path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    quantization: Quantization | BitsAndBytesConfig | None = None,
    device: torch.device | None = None,
) -> nn.Module:
    """Return a model without its processor, in the dtype it was saved in unless one is given.

    Raises UserError for an unknown name, a model that cannot be had, and a folder that holds none.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.integrations import is_deepspeed_zero3_enabled

    name = str(name_or_path)
    if name in MADE_IN_MEMORY:
        if quantization is not None:
            raise UserError(f"{name} is made in memory: there is no quantised one\nsave it to a folder and name that")
        return _named(_tiny(name)[0].to(dtype or torch.float32), name)
    source = source_of(name)
    config = _read(AutoConfig.from_pretrained, source, name)
    if original.MARK in config.to_dict():
        raise UserError(
            f"{name} is in the layout of the original LLaVA code, which is converted from a folder\n"
            f"first:  hf download {name} --local-dir FOLDER      then --model FOLDER"
        )
    auto = AutoModelForImageTextToText if "vision_config" in config.to_dict() else AutoModelForCausalLM
    arguments: dict[str, Any] = {"dtype": dtype or "auto"}
    if quantization is not None:
        chosen = quantization_config(quantization) if isinstance(quantization, str) else quantization
        arguments |= {"quantization_config": chosen, "device_map": {"": device or "cpu"}}
    with quiet_bars() if name in MADE_HERE or not sys.stderr.isatty() else nullcontext():
        model = _read(auto.from_pretrained, source, name, **arguments)
    if is_deepspeed_zero3_enabled():
        # HF then keeps renamings of old checkpoints that this one had no need of, and undoes them when it saves.
        vars(model).pop("_weight_conversions", None)
    keep_weights_readable(model)
    return _named(model, name)


def weights_folder(name: str) -> Path | None:
    """Return the folder with a model's files, from the hub where it is one of its; None for those made in memory.

    Raises UserError for an unknown name and a model that cannot be had.
    """
    from huggingface_hub import snapshot_download

    if name in MADE_IN_MEMORY:
        return None
    source = source_of(name)
    if Path(source).is_dir():
        return Path(source)
    return Path(_read(snapshot_download, source, name, allow_patterns=["*.json", "*.safetensors"]))


def load_processor(name: str | Path) -> Any:
    """Return the processor of a model (of a text-only one its tokenizer), without its weights.

    Raises UserError for an unknown name and a processor that cannot be had.
    """
    from transformers import AutoProcessor, AutoTokenizer

    name = str(name)
    if name in MADE_IN_MEMORY:
        return _tiny(name)[1]
    config = config_of(name)
    sees = "vision_config" in config.to_dict()
    processor = _read((AutoProcessor if sees else AutoTokenizer).from_pretrained, source_of(name), name)
    if sees:
        _complete(processor, config)
    return processor


def config_of(name: str) -> Any:
    """Return the HF config of a named model, a folder or a hub id; packaged ones first, which need no network."""
    from transformers import AutoConfig

    if name in MADE_IN_MEMORY:
        return _tiny(name)[0].config
    if name in PART_OF:
        whole, part, differing = PART_OF[name]
        inner = config_of(whole).to_dict()[part] | differing
        return AutoConfig.for_model(inner.pop("model_type"), **inner)
    packaged = files("milora_vl") / "configs" / f"{SAME_WEIGHTS.get(name, name)}.json"
    if packaged.is_file():
        register()
        content = json.loads(packaged.read_text(encoding="utf-8"))
        return AutoConfig.for_model(content.pop("model_type"), **content)
    return _read(AutoConfig.from_pretrained, source_of(name), name)


def read_pretrained(load: Any, name: str, **arguments: Any) -> Any:
    """`from_pretrained` of a class of transformers on a folder as it is, or a hub id; UserError where it fails."""
    with quiet_bars():
        return _read(load.from_pretrained, str(name), str(name), **arguments)


def _tiny(name: str) -> tuple[Any, Any]:
    with whole_weights():  # under ZeRO-3 HF would draw them part by part: another model
        return tiny.tiny_llava() if name == "tiny" else tiny.tiny_llama()


def _named(model: Any, name: str) -> nn.Module:
    """Let adapters record the name the user gave, not a folder of the cache."""
    if name in MADE_HERE:
        model.name_or_path = name
        model.config._name_or_path = name
    return model


def source_of(name: str) -> str:
    """Return the folder or hub id behind a name; makes smol-llava and smollm2 at first use."""
    if name.startswith("smol") and name in MADE_HERE:
        return str(smol_llava.made_folder(name))
    folder = Path(name)
    if folder.is_dir():
        register()
        if not (folder / "config.json").is_file():
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            raise UserError(f"{name} holds no model: it has no config.json\nfound: {found}")
        return name
    if name in NAMED_MODELS or name in SAME_WEIGHTS:
        return NAMED_MODELS[SAME_WEIGHTS.get(name, name)]
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return name
    near = suggest(name.lower(), NAMED_MODELS)
    raise UnknownModelError(
        f'unknown model "{name}"\n'
        + (f"did you mean: {', '.join(near)}\n" if near else "")
        + f"named:    {', '.join(NAMED_MODELS)}\n"
        "or:       a folder with a model, or a hub id such as llava-hf/llava-1.5-7b-hf"
    )


def _read(load: Any, source: str, name: str, **arguments: Any) -> Any:
    """Call a `from_pretrained`, without a question about running a model's own code; UserError where it fails."""
    from safetensors import SafetensorError

    local = Path(source).is_dir()
    try:
        return load(source, local_files_only=local or not _hub_is_known(), trust_remote_code=False, **arguments)
    except (SafetensorError, ValueError, ImportError, TypeError) as error:  # cut off, of no known kind, no tokenizer
        raise UserError(f"cannot read the model in {source}\n{_first_line(error)}") from None
    except OSError as error:
        if local:
            raise UserError(f"cannot read the model in {source}\n{_first_line(error)}") from None
        raise UserError(
            f"the weights of {name} are not here, and the model hub does not answer\n"
            f"looked for:  {source}, in the local cache and on the hub\n"
            f"said:        {_first_line(error)}\n"
            f"try:         hf download {source}      (where there is a network), or --model FOLDER with the weights\n"
            f"without:     python -m milora_vl.train --model {name} --dry-run      needs no weights"
        ) from None


def _hub_is_known() -> bool:
    """Whether the hub's name resolves; without a network the client would try for half a minute, noisily."""
    from huggingface_hub.constants import ENDPOINT

    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _complete(processor: Any, config: Any) -> None:
    """Set what the processor needs to count image tokens, and square padding, as LLaVA-1.5 was trained."""
    if config.model_type not in ("llava", "llava_next"):
        return
    processor.patch_size = config.vision_config.patch_size
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    processor.num_additional_image_tokens = extra_tokens(config)
    if config.model_type == "llava_next":
        processor.image_processor.image_grid_pinpoints = config.image_grid_pinpoints
    elif type(processor.image_processor).__name__.startswith("LlavaImageProcessor"):  # ...Fast, ...Pil
        processor.image_processor.do_pad = True
