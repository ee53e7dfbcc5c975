"""Records of files and folders: all at once (`load_records`), or as a stream (`record_stream`, which needs torch)."""

from typing import TYPE_CHECKING, Any

from milora_data.stream.sources import load_records

if TYPE_CHECKING:
    from milora_data.stream.dataset import RecordStream, record_stream

__all__ = ["RecordStream", "load_records", "record_stream"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("milora_data.stream.dataset"), name)
