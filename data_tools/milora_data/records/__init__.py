"""One record of a data set: parsed, checked, and stored in little memory."""

from milora_data.records.record import Record, Turn, parse_record

__all__ = ["Record", "Turn", "parse_record"]
