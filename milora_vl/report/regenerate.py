"""The report of a run written anew by the programs that add something to its folder."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from milora_data.errors import UserError
from milora_vl.report.page import write_report


def write_anew(run: Path, warn: Callable[[str], object]) -> Path | None:
    """Write report.html of a run and return its path; None after a warning: no drawing may fail what was measured."""

    try:
        return write_report(run)
    except (UserError, OSError) as error:  # a full disk, most often
        warn(f"no report: {error}")
    except Exception:
        warn(f"no report; run python -m milora_vl.report {run} to see why\n{traceback.format_exc(limit=1)}")
    return None


def rewrite_report(folder: Path) -> None:
    """Write the report of a folder that is a run's anew, and say on stderr where it is, or why not."""
    if (folder / "recipe.yaml").is_file():
        page = write_anew(folder, lambda text: sys.stderr.write(f"{text}\n"))
        sys.stderr.write(f"report:  {page}\n" if page is not None else "")
