"""Data for LLaVA-style training: records, prompt formats, encoding with exact masks, collation, checks.

from milora_data import Record, load_records, encode, ImageTextCollator
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# `encode` is also the name of a module: imported here, the function wins, whatever is imported later.
from milora_data.encode import Encoded, encode, encode_prompt
from milora_data.errors import DataError, UserError
from milora_data.images import expand_to_square, load_image
from milora_data.records import Record, Turn, load_records, parse_record
from milora_data.templates import TEMPLATES, Template

if TYPE_CHECKING:
    from milora_data.collate import ImageTextCollator

__all__ = [
    "TEMPLATES",
    "DataError",
    "Encoded",
    "ImageTextCollator",
    "Record",
    "Template",
    "Turn",
    "UserError",
    "encode",
    "encode_prompt",
    "expand_to_square",
    "load_image",
    "load_records",
    "parse_record",
]


def __getattr__(name: str) -> Any:
    if name != "ImageTextCollator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # It needs torch, which commands must not import before they have read their arguments.
    from milora_data.collate import ImageTextCollator

    return ImageTextCollator
