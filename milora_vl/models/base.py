"""A base model without its weights, found by its name: folder or hub id, config, parts, meta model, processor.

A name is one of `names`, a hub id, or a folder in Hugging Face's layout or in LLaVA's original one: a config.json that
describes a Llama and names its CLIP tower. Its key `mm_vision_tower` tells them apart; `model_type` does not: in
LLaVA-1.5 it is `llava`, which transformers mistakes for its own class.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from torch import Tensor, nn

from milora_data.assets import cache_dir
from milora_data.encode.tokens import share_template
from milora_data.pictures.pixels import Tiling
from milora_vl.common.cli.web import hub_is_known
from milora_vl.common.compat.transformers import quiet_bars, whole_weights
from milora_vl.common.errors import UserError, beside, first_line, suggest
from milora_vl.core.adapter.folders import AdapterError, has_config, local_folder, newest_of_unfinished, projector_file
from milora_vl.core.adapter.sidecar import Sidecar
from milora_vl.core.policy.towers import Towers, find_towers
from milora_vl.core.weights.matrices import distance
from milora_vl.core.weights.tensor_files import read_weights
from milora_vl.models import smol_llava
from milora_vl.models.llava import (
    IMAGE_TOKEN,
    TowerPlan,
    complete_processor,
    composed_config,
    image_tokens,
    plan_tower,
    processor_for,
    tiling_of,
    uses_processor,
)
from milora_vl.models.names import BUILT_IN_MODELS, NAMED_MODELS, PART_OF, SAME_WEIGHTS
from milora_vl.models.timm_tower import TimmTowerConfig, as_map, register


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


# text: no pictures. llava: our collator prepares the pictures. processor: the model's own processor prepares them.
BaseKind = Literal["text", "llava", "processor"]


@dataclass(frozen=True)
class Base:
    """A base model without its weights. Its meta model and its processor are made when they are first needed."""

    name: str
    config: Any
    kind: BaseKind
    tiling: Tiling | None = None  # LLaVA-1.6 only
    parts: Parts | None = None  # what it is composed of before it loads; None for a model that exists

    @classmethod
    def of(cls, name: str, config: Any, parts: Parts | None = None) -> Base:
        kind: BaseKind = "text"
        if "vision_config" in config.to_dict():
            kind = "processor" if uses_processor(config) else "llava"
        return cls(name, config, kind, tiling_of(config), parts)

    @cached_property
    def meta(self) -> nn.Module:
        """The model on the meta device, which allocates no memory."""
        return meta_model(self.config)

    @cached_property
    def towers(self) -> Towers:
        return find_towers(self.meta)

    @cached_property
    def processor(self) -> Any:
        return load_processor(self.name)

    @property
    def reads_pictures(self) -> bool:
        return self.kind != "text"

    @property
    def own_pictures(self) -> bool:
        """Return whether the model's own processor prepares its pictures, by its own prompt format."""
        return self.kind == "processor"

    @property
    def tokens_of_a_picture(self) -> int:
        return image_tokens(self.config) if self.kind == "llava" else 0


def find_base(name: str, parts: Parts | None = None) -> Base:
    """Return the base of a run: a model by its name, composed of `parts` if it reads no images itself.

    Loads no weights. Raises UserError for an unknown name, or a config that is not available.
    """
    folder = Path(name)
    if is_original(folder):
        composed, parts = parts_of_original(folder), None
    else:
        config = _read_config(name)
        if parts is None or "vision_config" in config.to_dict():
            return Base.of(name, config)
        composed = parts
    return Base.of(name, planned_config(composed), parts)


def config_of(name: str) -> Any:
    """Return the HF config of a named model, a folder or a hub id. Packaged configs need no network."""
    return find_base(name).config


def at_revision(name: str) -> str:
    """Return the name of a model with its version: of a built-in one, or the newest commit on the hub.

    Folders and timm's networks have none. Raises UserError for a model that is not available.
    """
    from transformers import AutoConfig

    if name in BUILT_IN_MODELS or name.startswith(TIMM) or Path(name).is_dir():
        return _folder_names().get(name, name)
    read(AutoConfig.from_pretrained, source_of(name), name)  # the hub's cache then has what a training loads
    snapshot = local_folder(hub_id(name))
    return f"{hub_id(name)}@{snapshot and snapshot.name}"


def require_weights(base: Base, saved: Sidecar) -> None:
    """Raise AdapterError if no weight in the files of a base is one that an adapter was made for.

    A weight may have any name there, as transformers renames, and be transposed. What is not on this machine, or
    packed, is not compared; `fitted` compares what is loaded.
    """
    folder = _folder_here(base.name)
    made_for = {one.shape: one for one in [*saved.fingerprints.values()][::-1]}
    files = _weight_files(folder) if folder else ()
    floats = (W for names, read_tensor in files for W in map(read_tensor, names) if W.dim() == 2 and W.dtype in FLOATS)
    fits = (distance(made_for[W.shape], W) <= 1 for each in floats for W in (each, each.T) if W.shape in made_for)  # type: ignore[index]
    if not next(fits, True) and not any(fits):
        message = f"this is not the base model that the adapter was made for: {folder} holds none of its weights"
        hint = "name the base model that adapter_config.json names"
        raise AdapterError(message, code="adapter-wrong-base", hint=hint)


def _folder_here(name: str) -> Path | None:
    return local_folder(str(folder_of(name)) if name in BUILT_IN_MODELS else hub_id(name))


def require_parts(parts: Parts | None, projector: str | None) -> None:
    """Raise UserError if a folder of the parts, or the file with the weights of the projector, is missing."""
    if projector and not is_original(Path(projector)):
        projector_file(Path(projector))
    named = (("language model", parts.language), ("vision tower", parts.vision)) if parts else ()
    for part, name in named:
        if name.startswith((".", "/")) and not Path(name).is_dir():
            raise UserError(
                f"no such folder; it should hold the {part}", code="path-missing", where=name, hint=beside(Path(name))
            )


def _read_config(name: str) -> Any:
    from transformers import AutoConfig

    register()
    if name in PART_OF:
        whole, part, differing = PART_OF[name]
        inner = _read_config(whole).to_dict()[part] | differing
        return AutoConfig.for_model(inner.pop("model_type"), **inner)
    content = _packaged_config(name)
    if content is not None:
        return AutoConfig.for_model(content.pop("model_type"), **content)
    return read(AutoConfig.from_pretrained, source_of(name), name)


def _packaged_config(name: str) -> dict[str, Any] | None:
    file = files("milora_vl.models") / "configs" / f"{SAME_WEIGHTS.get(name, name)}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def planned_config(parts: Parts) -> Any:
    """Return the config of the composed model from the configs of its parts, for a dry run."""
    text, tower = language_config(parts.language), tower_config(parts.vision)
    return composed_config(text, tower, layer=parts.select_layer, feature=parts.select_feature)


def tower_plan(parts: Parts) -> TowerPlan:
    return plan_tower(tower_config(parts.vision), layer=parts.select_layer, feature=parts.select_feature)


def language_config(name: str) -> Any:
    folder = Path(name)
    return read_original(folder).text_config() if is_original(folder) else _read_config(name)


TIMM = "timm/"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def tower_config(name: str) -> Any:
    if name.startswith(TIMM):
        size, grid = _timm_sizes(name.removeprefix(TIMM))
        return TimmTowerConfig.of(name.removeprefix(TIMM), image_size=size, grid=grid)
    config = _read_config(name)
    if "vision_config" in config.to_dict():
        config = config.vision_config
    if name in BUILT_IN_MODELS or "image_size" not in config.to_dict():
        message = f"not a vision tower that another model can use: {config.model_type}"
        hint = "expected:  CLIP, SigLIP, a ViT, or timm/NAME"
        raise UserError(message, where=name, hint=hint)
    return config


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


def source_of(name: str) -> str:
    """Return the folder or hub id of a model; builds a built-in one, also if an adapter names a folder elsewhere."""
    folder, built = Path(name), built_in(name)
    if built == name or (built and not folder.is_dir()):
        made = folder_of(built)
        if not (made / "config.json").is_file():
            with FileLock(f"{made}.lock"):  # the processes of a run wait here, and in no collective
                if not (made / "config.json").is_file():
                    smol_llava.build(built, made)
        return str(made)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            newest = newest_of_unfinished(folder, "--model")
            raise UserError(
                "no model in this folder: it has no config.json", where=name, hint=newest or f"found: {names}"
            )
        return name
    if name in NAMED_MODELS or name in SAME_WEIGHTS:
        return hub_id(name)
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return name
    near = suggest(name.lower(), NAMED_MODELS)
    raise UserError(
        f'unknown model "{name}"',
        code="model-unknown",
        hint=(f"did you mean: {', '.join(near)}\n" if near else "") + f"known:    {', '.join(NAMED_MODELS)}\n"
        "or:       a folder with a model, or a hub id such as llava-hf/llava-1.5-7b-hf",
    )


def hub_id(name: str) -> str:
    """Return the id on the model hub behind a name; any other name unchanged.

    >>> hub_id("liuhaotian/llava-v1.5-7b"), hub_id("mine/model")
    ('llava-hf/llava-1.5-7b-hf', 'mine/model')
    """
    name = SAME_WEIGHTS.get(name, name)
    return NAMED_MODELS.get(name, name)


def folder_of(name: str) -> Path:
    return cache_dir() / "models" / _folder_names()[name]


@cache
def _folder_names() -> dict[str, str]:
    version, projector = smol_llava.FOLDER_VERSION, hashlib.sha256(smol_llava.PROJECTOR.read_bytes()).hexdigest()
    return {
        "smol-llava": f"smol-llava-{version}-{projector[:12]}",
        "smol-llava-unaligned": f"smol-llava-{version}-unaligned",
        "smollm2": f"smollm2-{version}",
        "tiny": f"tiny-{version}",
        "tiny-text": f"tiny-text-{version}",
    }


def built_in(name: str) -> str | None:
    """Return the built-in model that `name` means: its name, or its folder, perhaps on another machine; else None."""
    return next((each for each, folder in _folder_names().items() if name == each or Path(name).name == folder), None)


def is_to_build(name: str) -> bool:
    """Return whether a name belongs to a built-in model of downloaded parts whose folder does not exist yet."""
    return name in ("smol-llava", "smol-llava-unaligned", "smollm2") and not (folder_of(name) / "config.json").is_file()


def read_pretrained(load: Any, name: str, **arguments: Any) -> Any:
    with quiet_bars():
        return read(load.from_pretrained, source_of(name), name, **arguments)


def read(load: Any, source: str, name: str, **arguments: Any) -> Any:
    """Return what `load`, a `from_pretrained` or `snapshot_download`, reads from `source`, without remote code."""
    from huggingface_hub.errors import RepositoryNotFoundError
    from safetensors import SafetensorError

    register()
    local = Path(source).is_dir()
    try:
        return load(source, local_files_only=local or not hub_is_known(), trust_remote_code=False, **arguments)
    except ImportError as error:
        raise _missing_package(source, error) or _unreadable(source, error) from None
    except (SafetensorError, ValueError, TypeError) as error:  # truncated, unknown type, no tokenizer
        raise _unreadable(source, error) from None
    except OSError as error:
        if local:
            raise _unreadable(source, error) from None
        unknown = any(isinstance(cause, RepositoryNotFoundError) for cause in (error, error.__cause__))
        plan = f"\nwithout:     python -m milora_vl.train --model {name} --dry-run      needs only its config"
        raise UserError(
            f"the model hub has no {source}, or you may not read it"
            if unknown
            else f"{name} is not on this machine, and the model hub does not answer",
            code="model-not-available",
            hint="check the name; a private or gated model needs a token: HF_TOKEN"
            if unknown
            else f"searched:    {source}, in the local cache and on the hub\n"
            f"error:       {first_line(error)}\n"
            f"try:         hf download {source}      (on a machine with a network), or name a folder that holds it"
            + ("" if _packaged_config(name) is None else plan),
        ) from None


def _missing_package(source: str, error: ImportError) -> UserError | None:
    """Return the error of a package that the model needs, as transformers names it; None if it names none."""
    named = re.search(r"pip install (?:-U )?([A-Za-z0-9_.-]*[A-Za-z0-9])", str(error))
    package = named.group(1) if named else error.name if isinstance(error, ModuleNotFoundError) else None
    if not package:
        return None
    message, hint = f"this model needs the package {package}, which is not installed", f"pip install {package}"
    return UserError(message, code="package-missing", where=source, hint=hint)


def _unreadable(source: str, error: Exception) -> UserError:
    from transformers.utils import is_sentencepiece_available

    hint = "copy or download its files again; a model needs config.json, its weights and its tokenizer"
    if not is_sentencepiece_available():
        hint += "\na tokenizer.model without a tokenizer.json needs:  pip install sentencepiece protobuf"
    message = f"cannot read the model: {first_line(error)}"
    return UserError(message, code="model-unreadable", where=source, hint=hint)


MARK = "mm_vision_tower"
PROJECTOR_WEIGHTS = re.compile(r"^model\.mm_projector\.(.+)")
TOWER_WEIGHTS = re.compile(r"^model\.vision_tower\.vision_tower\.(.+)")
# model_type of LLaVA -> model_type of its language model in transformers.
_LANGUAGE = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
# The values of LLaVA-1.5, which Hugging Face's LLaVA supports; None is a missing key.
_SUPPORTED: dict[str, tuple[str | bool | None, ...]] = {
    "model_type": tuple(_LANGUAGE),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_use_im_start_end": (False, None),
    "mm_patch_merge_type": ("flat", None),
    "image_aspect_ratio": ("pad", "square", None),
}


@dataclass(frozen=True, slots=True)
class Original:
    folder: Path
    vision_tower: str
    select_layer: int
    select_feature: str
    text: Mapping[str, Any]  # config of the language model

    def text_config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.for_model(**self.text)

    def tensors(self, names: re.Pattern[str]) -> dict[str, Tensor]:
        """Return the weights whose names match, by the group of the pattern. Reads no other weights."""
        matching: dict[str, Tensor] = {}
        for keys, read in _weight_files(self.folder):
            for key in keys:
                match = names.match(key)
                if match:
                    matching[match[1]] = read(key)
        return matching


def is_original(folder: Path) -> bool:
    return MARK in _config(folder) and not has_config(folder)


def read_original(folder: Path) -> Original:
    """Read the config of such a folder. Raises UserError for settings that Hugging Face's LLaVA does not support."""
    config = _config(folder)
    for name, supported in _SUPPORTED.items():
        if config.get(name) not in supported:
            raise UserError(
                "a LLaVA in its original layout that Hugging Face's LLaVA cannot hold: "
                f"{name} {config.get(name)}, expected {' or '.join(str(value) for value in supported if value)}",
                where=str(folder),
                hint="for LLaVA-1.6, use a model in Hugging Face's layout (llava-hf/llava-v1.6-...)",
            )
    dropped = ("model_type", "architectures", "_name_or_path", "transformers_version", "auto_map", "image_aspect_ratio")
    text = {k: v for k, v in config.items() if k not in dropped and not re.match(r"(use_)?mm_|tune_mm|freeze_mm", k)}
    text = {name: value for name, value in text.items() if not name.startswith(("image_", "tokenizer_"))}
    return Original(
        folder,
        str(config[MARK]),
        int(config.get("mm_vision_select_layer", -2)),
        str(config.get("mm_vision_select_feature", "patch")),
        {"model_type": _LANGUAGE[config["model_type"]], **text},
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _weight_files(folder: Path) -> Iterator[tuple[list[str], Callable[[str], Tensor]]]:
    from safetensors import safe_open

    files = sorted(folder.glob("model*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as opened:
            yield list(opened.keys()), opened.get_tensor
    for file in [] if files else sorted(folder.glob("pytorch_model*.bin")):
        state = read_weights(file, mmap=True)
        yield list(state), lambda key, state=state: state[key].clone()  # type: ignore[misc]


def parts_of_original(folder: Path) -> Parts:
    config = read_original(folder)
    tower = config.vision_tower
    beside = folder / tower
    tower = str(beside) if not Path(tower).is_dir() and beside.is_dir() else tower
    return Parts(str(folder), tower, str(folder), config.select_layer, config.select_feature)


def meta_model(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    has_images = "vision_config" in config.to_dict()
    with whole_weights(), torch.device("meta"):
        return (AutoModelForImageTextToText if has_images else AutoModelForCausalLM).from_config(config)


def load_processor(name: str | Path) -> Any:
    """Return the processor of a model with pictures, else its tokenizer. No weights are read."""
    from transformers import AutoProcessor, AutoTokenizer

    name = str(name)
    config = config_of(name)
    if "vision_config" not in config.to_dict():
        return read(AutoTokenizer.from_pretrained, source_of(name), name)
    if is_original(Path(name)):
        processor = composed_processor(parts_of_original(Path(name)))
    else:
        processor = read(AutoProcessor.from_pretrained, source_of(name), name)
    share_template(processor)
    complete_processor(processor, config)
    return processor


def composed_processor(parts: Parts) -> Any:
    """Return the processor of a composed model, from its tokenizer and its tower."""
    from transformers import AutoTokenizer

    tokenizer = read_pretrained(AutoTokenizer, parts.language)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    plan = tower_plan(parts)
    mean, std = picture_statistics(parts.vision)
    return processor_for(
        tokenizer,
        image_size=plan.image_size,
        patch_size=plan.config.patch_size,
        mean=mean,
        std=std,
        strategy=plan.strategy,
        extra_tokens=plan.extra_tokens,
    )


# Mean and standard deviation of CLIP, for towers without a preprocessor.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


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


def split_processor(processor: Any) -> tuple[Any, Any | None]:
    from transformers import ProcessorMixin

    if isinstance(processor, ProcessorMixin):
        return processor.tokenizer, processor.image_processor
    return processor, None


def tokenizer_at_hand(name: str) -> Any | None:
    """Return the tokenizer of a model that is on this machine, else None; asks no hub."""
    from transformers import AutoProcessor, AutoTokenizer

    source = _folder_here(name) or hub_id(name)
    for auto in (AutoProcessor, AutoTokenizer):  # the processor may hold the chat template
        try:
            loaded = auto.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError):
            continue
        tokenizer, pictures = split_processor(loaded)
        if pictures is not None:
            share_template(loaded)
        return tokenizer
    return None
