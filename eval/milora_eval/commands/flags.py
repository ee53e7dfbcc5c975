"""What several commands of `milora_eval` share: flags, and names for results folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from milora_vl.common.cli.parser import option

PLUGIN = option(
    "--plugin",
    action="append",
    default=[],
    metavar="NAME",
    help="own benchmark that the answers name: module:Class or file.py:Class. Its code runs.",
)
PROTOCOL = option("--protocol", metavar="NAME", help="official or llava, for benchmarks that have both")


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each path if it differs between the folders, else an earlier part, else the paths."""
    paths = [folder.resolve().parts for folder in folders]
    for position in range(1, min(map(len, paths)) + 1):
        names = [parts[-position] for parts in paths]
        if len(set(names)) == len(names):
            return names
    return list(map(str, folders))
