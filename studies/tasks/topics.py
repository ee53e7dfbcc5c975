"""Names of things with their topics: the names of emoji ("oil drum") and their sub-categories ("office").

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
    table = json.loads((fetch("emoji_data") / "emoji.json").read_text(encoding="utf-8"))
    named = {
        entry["name"].lower(): entry["subcategory"]
        for entry in table
        if entry["name"] and entry["category"] not in ("Component", "Flags")
    }
    members = Counter(named.values())
    kept = sorted((text, topic) for text, topic in named.items() if members[topic] >= MIN_MEMBERS)
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0)).tolist()
    return [kept[place] for place in order]
