"""Conversations as token ids and labels: templates, chat templates, loss masks, truncation."""

from milora_data.encode.labels import Encoded, encode, encode_prompt

__all__ = ["Encoded", "encode", "encode_prompt"]
