"""`CalibrationError`, the error class of the calibration."""

from __future__ import annotations

from milora_vl.base.errors import UserError


class CalibrationError(UserError):
    """A calibration that cannot find protected inputs. `where` is a module path or a file."""
