"""Data for LLaVA-style training: records, prompt formats, encoding with exact masks, collation, checks.

from milora_data import Record, load_records, encode, ImageTextCollator
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# Not on first use: importing the module `encode` later would put itself in the place of the function.
from .encode import Encoded, encode, encode_prompt

if TYPE_CHECKING:
    from .collate import ImageTextCollator
    from .errors import DataError, UserError
    from .images import expand_to_square, load_image
    from .records import Record, Turn, load_records, parse_record
    from .templates import TEMPLATES, Template

# Loaded on first use: the collator needs torch, which commands must not import before they have read their arguments.
_HOMES = {
    "ImageTextCollator": "collate",
    "DataError": "errors",
    "UserError": "errors",
    "expand_to_square": "images",
    "load_image": "images",
    "Record": "records",
    "Turn": "records",
    "load_records": "records",
    "parse_record": "records",
    "TEMPLATES": "templates",
    "Template": "templates",
}

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
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
