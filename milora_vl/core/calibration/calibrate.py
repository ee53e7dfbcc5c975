"""Protected inputs of a model, and which batches they need. Too little data gets a warning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from milora_vl.core.calibration.activations import find_inputs
from milora_vl.core.calibration.bases import (
    Calibration,
    CalibrationError,
    InputBasis,
    ProtectedInputs,
    leaving_ranks,
    sources_of,
)
from milora_vl.core.policy.rules import Target
from milora_vl.core.weights.distributed import rank_and_world_size

LEAST_HELD_OUT = 0.5  # of the share; a layer that holds less of held-out energy than this gets a warning
FEWEST = 0.01  # a layer that protects a smaller share of its input directions than this gets a warning


def protected_inputs(
    model: nn.Module,
    targets: Sequence[Target],
    calibration: Calibration | None,
    *,
    is_shown: bool = False,
) -> ProtectedInputs | None:
    """Return the protected inputs of all targets with `protect`, or None without such targets.

    A layer keeps as many free directions as its rank, so it may protect less than its rule asks for.
    `is_shown` shows a progress bar on stderr. Warns about layers that protect less than asked or almost nothing, and
    about too little data. Raises CalibrationError as `find_inputs` and `require_calibration`.
    """
    require_calibration(targets, calibration)
    wanted = [t for t in targets if t.protect]
    if calibration is None:
        return None
    found = find_inputs(model, wanted, calibration, is_shown=is_shown)
    lowered, changed = leaving_ranks(found, {t.path: t.rank for t in wanted if t.rank is not None})
    if rank_and_world_size()[0] == 0:
        _warn_of_little(found)
        _warn_of_little_data(found)
        _warn_of_lowered(lowered, changed)
    return lowered


def require_calibration(targets: Sequence[Target], calibration: Calibration | None) -> None:
    """Raise CalibrationError for calibration batches that are missing, that no rule needs, or that are no list."""
    wanted = [t for t in targets if t.protect]
    if not wanted and calibration is not None:
        raise CalibrationError(
            "no rule protects inputs, so the calibration would have no effect",
            code="calibration-unused",
            where="calibration",
            hint="add  protect: 0.95  to a rule, or remove the calibration",
        )
    if wanted and calibration is None:
        raise CalibrationError(
            f"{wanted[0].path} protects {wanted[0].protect:.0%} of its inputs, which needs calibration batches",
            code="calibration-missing",
            where="calibration",
            hint="pass  calibration=calibration_texts(model)  or batches of your own, or set  protect: 0",
        )
    for batches in () if calibration is None else sources_of(calibration):
        _require_batches(batches)


def _require_batches(batches: object) -> None:
    rows: Sequence[object] = batches if isinstance(batches, Sequence) else ()
    wrong = next((row for row in rows if not isinstance(row, Mapping)), None if rows is batches else batches)
    if wrong is not None:
        raise CalibrationError(
            f"expected a list of batches (mappings of tensors), found {type(wrong).__name__}",
            code="calibration-batch",
            where="calibration",
            hint='pass  calibration=[{"input_ids": ids, "attention_mask": mask}, ...]  with tensors (rows, length); '
            "list(loader) makes it from a DataLoader",
        )


def _warn_of_little(found: ProtectedInputs) -> None:
    few = [path for path, n in found.numbers.items() if found.bases[n].num_directions < FEWEST * found.bases[n].size]
    if few:
        basis = found.of(few[0])
        warnings.warn(
            f"{len(few):,} of {len(found.numbers):,} layers protect almost nothing: {few[0]} protects "
            f"{basis.num_directions} of {basis.size} input directions, which hold {basis.share:.1%} of its activation "
            "energy. A few directions dominate there; raise protect for these layers.",
            stacklevel=3,
        )


def _warn_of_lowered(found: ProtectedInputs, changed: Sequence[str]) -> None:
    if changed:
        lowest = min(changed, key=lambda path: found.of(path).share)
        warnings.warn(
            f"{len(changed):,} of {len(found.numbers):,} layers protect less than their rule asks for, so that their "
            f"rank fits; the lowest share is {found.of(lowest).share:.1%}, in {lowest}. A lower rank protects more.",
            stacklevel=3,
        )


def _warn_of_little_data(found: ProtectedInputs) -> None:
    """Warn about directions that describe the calibration batches, and not the inputs of the layer in general."""
    bases = {path: found.bases[number] for path, number in found.numbers.items()}
    unsure = [path for path, basis in bases.items() if _is_unsure(basis)]
    if unsure:
        basis = bases[unsure[0]]
        seen = "nothing was held out" if basis.held_out is None else f"{basis.held_out:.1%} on held-out data"
        warnings.warn(
            f"too little calibration data for {len(unsure):,} of {len(bases):,} layers: {unsure[0]} has {basis.size:,} "
            f"inputs and {basis.num_positions:,} positions; its directions hold {basis.share:.1%} of the activation "
            f"energy on them, and {seen}. Calibrate with more data.",
            stacklevel=3,
        )


def _is_unsure(basis: InputBasis) -> bool:
    if basis.held_out is not None:
        return basis.held_out < LEAST_HELD_OUT * basis.share
    return basis.num_positions < basis.size
