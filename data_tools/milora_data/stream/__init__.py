"""Records of files and folders: all at once, or as a stream."""

from milora_data.stream.record_stream import RecordStream, record_stream
from milora_data.stream.sources import load_records

__all__ = ["RecordStream", "load_records", "record_stream"]
