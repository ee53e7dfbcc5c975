"""Data for LLaVA-style training: records, prompt formats, encoding with exact masks, collation, checks.

from milora_data import Record, load_records, encode, ImageTextCollator
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# `encode` is also the name of a module: imported here, the function wins, whatever is imported later.
from .encode import Encoded, encode, encode_prompt
from .errors import DataError, UserError
from .images import expand_to_square, load_image
from .records import Record, Turn, load_records, parse_record
from .templates import TEMPLATES, Template

if TYPE_CHECKING:
    from .collate import ImageTextCollator

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
    from .collate import ImageTextCollator

    return ImageTextCollator
