"""Load adapters of other code onto a model: LLaVA's LoRA folders, and adapters trained on a residual base.

The files of a folder, not its name, decide what it is. The adapters are converted in memory.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from milora_vl.adapter.files import load_adapter
from milora_vl.adapter.folders import CONFIG, has_config, holds_residual
from milora_vl.base.errors import UserError, expected_format
from milora_vl.foreign.arithmetic import require_linear
from milora_vl.foreign.imported import import_adapter, refuse_mutating
from milora_vl.foreign.plain import write_plain
from milora_vl.foreign.source import Source, find_source


def load_any(model: nn.Module, folder: Path) -> Any:
    """Return `model` with the adapter in `folder`, which may be of any kind.

    Raises AdapterError and UserError for an adapter that does not fit, and UserError for an adapter that was
    trained on a residual base and lacks its initial factors: it would load on the unchanged base and be wrong.
    """
    if not (has_config(folder) or holds_residual(folder)):
        return load_adapter(model, folder)  # reports what is missing
    message, hint = "the files of this adapter do not belong together", "restore the files of one save"
    with expected_format(message, code="adapter-damaged-file", where=str(folder), hint=hint):
        return _load_from(model, folder, find_source(folder))


def _load_from(model: nn.Module, folder: Path, source: Source) -> Any:
    if source.kind == "plain" and _is_lora(source.folder):
        try:
            refuse_mutating(source.folder)
        except UserError as error:
            command = f"with:  python -m milora_vl.export {folder} --to adapter ..."
            *others, last = error.problems
            raise UserError(problems=[*others, replace(last, hint=f"{last.hint}\n{command}".lstrip())]) from None
    if source.kind in ("ours", "plain") or _is_residual_of(model, source):
        return load_adapter(model, source.folder)
    adapter = import_adapter(source, model, str(model.name_or_path)).adapter
    with tempfile.TemporaryDirectory() as scratch:
        write_plain(adapter, Path(scratch))
        if adapter.sidecar is not None:
            adapter.sidecar.write(Path(scratch), adapter.anchors)
        return load_adapter(model, scratch)


def require_scalable(model: nn.Module, folder: Path) -> None:
    """Raise UserError for an adapter whose update has no scale on this model.

    On a residual base, the factors hold the start too: their scale is not the scale of the update.
    """
    source = find_source(folder)
    if _is_residual_of(model, source):
        raise UserError(
            "the model is the residual base, so a scale would also change the components that it lacks",
            code="adapter-not-scalable",
            where="--scale",
            hint="use the unchanged base model:  --model BASE",
        )
    require_linear(source.folder, "--scale")


def _is_lora(folder: Path) -> bool:
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError:
        return False  # load_adapter reports it
    return bool(content.get("peft_type") == "LORA")


def _is_residual_of(model: nn.Module, source: Source) -> bool:
    """Return whether the model is the residual base, which the trained factors fit without conversion."""
    return source.residual is not None and Path(str(model.name_or_path)).resolve() == source.residual.resolve()
