"""Regenerate the report of a run after a command has added files to its folder."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from milora_vl.base.errors import UserError
from milora_vl.report.page import write_report


def try_write_report(run: Path, warn: Callable[[str], object]) -> Path | None:
    """Write report.html of a run and return its path. On any error, warn and return None: the results must not fail."""
    try:
        return write_report(run)
    except (UserError, OSError) as error:  # for example a full disk
        warn(f"no report: {error}")
    except Exception:
        warn(f"no report; run python -m milora_vl.report {run} to see why\n{traceback.format_exc(limit=1)}")
    return None


def regenerate_report(folder: Path) -> None:
    """Regenerate the report if `folder` is a run folder, and print its path or the reason of failure on stderr."""
    if (folder / "recipe.yaml").is_file():
        page = try_write_report(folder, lambda text: sys.stderr.write(f"{text}\n"))
        sys.stderr.write(f"report:  {page}\n" if page is not None else "")
