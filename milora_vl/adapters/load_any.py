"""Adapters of other code on a loaded model: LLaVA's own LoRA folders, and those trained on a residual base.

They are told by their files, never by their names, and become adapters of the model in memory; nothing is written.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from milora_data.errors import UserError
from milora_vl.adapter_io import load_adapter
from milora_vl.adapters.folders import holds_residual
from milora_vl.adapters.imported import import_adapter, refuse_mutating
from milora_vl.adapters.plain import write_plain
from milora_vl.adapters.source import Source, find_source
from milora_vl.lora.sidecar import FILE_NAME


def load_any(model: nn.Module, folder: Path) -> Any:
    """Return `model` with the adapter in `folder`, of whatever kind.

    Raises AdapterError and UserError for one that does not fit, and UserError for one that was trained on a residual
    base and does not bring its initial factors: on the untouched base it would load and be wrong.
    """
    if not _is_adapter(folder):
        return load_adapter(model, folder)  # says what is missing
    source = find_source(folder)
    if source.kind == "plain" and _is_lora(source.folder):
        try:
            refuse_mutating(source.folder)
        except UserError as error:
            raise UserError(f"{error}\nwith:  python -m milora_vl.export {folder} --to adapter ...") from None
    if source.kind in ("ours", "plain") or _is_residual_of(model, source):
        return load_adapter(model, source.folder)
    adapter = import_adapter(source, model, str(model.name_or_path)).adapter
    with tempfile.TemporaryDirectory() as scratch:
        write_plain(adapter, Path(scratch))
        if adapter.sidecar is not None:
            (Path(scratch) / FILE_NAME).write_text(adapter.sidecar.to_json(), encoding="utf-8")
        return load_adapter(model, scratch)


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() or holds_residual(folder)


def _is_lora(folder: Path) -> bool:
    try:
        content = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError:
        return False  # load_adapter says so
    return bool(content.get("peft_type") == "LORA")


def _is_residual_of(model: nn.Module, source: Source) -> bool:
    """Whether the model is the residual base itself, on which the trained factors are right as they are."""
    return source.residual is not None and Path(str(model.name_or_path)).resolve() == source.residual.resolve()
