"""Where a named model is, its config, and `from_pretrained` with errors that a user can act on.

Here a model is in Hugging Face's layout; `loading` adds folders in LLaVA's original layout.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from milora_vl.common.cli.console import suggest
from milora_vl.common.cli.web import hub_is_known
from milora_vl.common.compat.transformers import quiet_bars
from milora_vl.common.errors import UserError, first_line
from milora_vl.core.adapter.folders import newest_of_unfinished
from milora_vl.models.names import NAMED_MODELS, PART_OF, SAME_WEIGHTS, hub_id
from milora_vl.models.smol_llava import built_in, made_folder
from milora_vl.models.timm_tower import register


def config_of(name: str) -> Any:
    """Return the HF config of a named model, a folder or a hub id. Packaged configs need no network."""
    from transformers import AutoConfig

    register()
    if name in PART_OF:
        whole, part, differing = PART_OF[name]
        inner = config_of(whole).to_dict()[part] | differing
        return AutoConfig.for_model(inner.pop("model_type"), **inner)
    content = _packaged_config(name)
    if content is not None:
        return AutoConfig.for_model(content.pop("model_type"), **content)
    return read(AutoConfig.from_pretrained, source_of(name), name)


def _packaged_config(name: str) -> dict[str, Any] | None:
    file = files("milora_vl.models") / "configs" / f"{SAME_WEIGHTS.get(name, name)}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def read_pretrained(load: Any, name: str, **arguments: Any) -> Any:
    with quiet_bars():
        return read(load.from_pretrained, source_of(name), name, **arguments)


def source_of(name: str) -> str:
    """Return the folder or hub id of a model; builds a built-in one, also if an adapter names a folder elsewhere."""
    folder, built = Path(name), built_in(name)
    if built == name or (built and not folder.is_dir()):
        return str(made_folder(built))
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
