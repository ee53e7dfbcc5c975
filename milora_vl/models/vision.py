"""Load a vision tower by name: CLIP, SigLIP, other encoders of transformers, any network of timm; mean and std."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milora_vl.common.cli.console import beside
from milora_vl.common.cli.web import hub_is_known
from milora_vl.common.errors import UserError, first_line
from milora_vl.core.weights.tensor_files import read_weights
from milora_vl.models import pretrained
from milora_vl.models.names import BUILT_IN_MODELS
from milora_vl.models.timm_tower import TimmTower, TimmTowerConfig, as_map

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
    cls = type(_meta(config))
    return pretrained.read_pretrained(cls, name, config=config, dtype=dtype).eval()


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


def _meta(config: Any) -> Any:
    from transformers import AutoModel
    from transformers.modeling_utils import set_zero3_state

    with torch.device("meta"), set_zero3_state():  # ZeRO-3 must not shard this model
        return AutoModel.from_config(config)


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
