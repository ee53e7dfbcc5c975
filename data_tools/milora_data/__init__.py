"""The public Python names: `Record`, `load_records`, `encode`, `ImageTextCollator`, each imported at its first use.

from milora_data import Record, load_records, encode, ImageTextCollator
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# `encode` is also the name of a module. This import binds the function, and importing the module later keeps it.
from milora_data.encode.labels import Encoded, encode, encode_prompt
from milora_data.encode.templates import TEMPLATES, Template
from milora_data.pictures.load import expand_to_square, load_image
from milora_data.records import parse_record
from milora_data.records.record import Record, Turn
from milora_data.stream import load_records
from milora_vl.common.errors import DataError, UserError

if TYPE_CHECKING:
    from milora_data.batches.image_text_collator import ImageTextCollator

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
    # It imports torch, which is too slow for commands that only parse their arguments.
    from milora_data.batches.image_text_collator import ImageTextCollator

    return ImageTextCollator
