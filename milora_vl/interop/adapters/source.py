"""Recognize the kind of an adapter folder by its files: ours, plain PEFT, LLaVA's, or with a residual base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from milora_vl.common.cli.command_line import beside
from milora_vl.common.errors import UserError
from milora_vl.core.adapter.folders import (
    holds_llava_adapter,
    no_adapter_in,
    not_a_folder,
)
from milora_vl.core.adapter.save_load import require_adapter_files
from milora_vl.core.adapter.sidecar import FILE_NAME
from milora_vl.interop.adapters.residual import initial_of, residual_of, trained_inside

AdapterKind = Literal["ours", "plain", "llava", "residual"]


@dataclass(frozen=True, slots=True)
class Source:
    """A folder and its kind; for `residual` also the folders of the residual base and of the initial factors."""

    kind: AdapterKind
    folder: Path
    residual: Path | None = None
    initial: Path | None = None


def find_source(folder: Path, residual: Path | None = None, initial: Path | None = None) -> Source:
    """Return the kind of `folder`; `residual` and `initial` name folders that it does not contain.

    Raises UserError if the folder has no adapter, and AdapterError if files cannot be read.
    """
    problem = not_a_folder(folder)
    if problem is not None:
        raise UserError(problems=[problem])
    for path in (residual, initial):
        if path is not None and not path.is_dir():
            raise UserError("no such folder", code="path-missing", where=str(path), hint=beside(path))
    trained = trained_inside(folder)
    if trained is None:
        raise UserError(problems=[no_adapter_in(folder, "", "milora_vl.export", "--to", "FORM")])
    for path in (trained, initial):
        if path is not None:
            require_adapter_files(path)
    residual = residual or residual_of(folder)
    if holds_llava_adapter(trained):
        return Source("llava", trained)
    if residual is None and initial is None and (trained / FILE_NAME).is_file():
        return Source("ours", trained)
    initial = initial or initial_of([folder, trained, *([residual] if residual else [])], trained)
    if residual is not None or initial is not None:
        return Source("residual", trained, residual, initial)
    return Source("plain", trained)
