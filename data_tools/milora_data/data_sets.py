"""What the commands share that create a data set: `emoji`, `easy-vqa`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from milora_vl.common.cli.command_line import next_step
from milora_vl.common.errors import UserError


def create(folder: Path, output_format: str, write: Callable[[Path], dict[str, int]]) -> int:
    """Call `write(folder)` unless the data set exists, print the number of records per file; return the exit code.

    Raises UserError if the folder contains other files.
    """
    if all((folder / name).exists() for name in ("README.md", "test.json", "images")):
        sys.stderr.write(f"{folder} contains the data set already; remove the folder to create it again\n")
        return 0
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"{folder} is not empty and does not contain this data set",
            code="output-exists",
            hint="nothing was written\ntry: another --output_dir",
        )
    counts = write(folder)
    if output_format == "json":
        sys.stdout.write(json.dumps({"folder": str(folder), "records": counts}) + "\n")
    else:
        sys.stdout.write("".join(f"{folder / name}: {n:,} records\n" for name, n in counts.items()))
    next_step("milora_data", "show", folder / "train.json", "--limit", 3)
    return 0
