"""The model and adapter that an evaluation measures, from its folders; base or final, checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from milora_vl.common.errors import UserError
from milora_vl.core.adapter.folders import base_of, holds_adapter, require_adapter, require_no_base, step_of


@dataclass(frozen=True, slots=True)
class EvalTarget:
    """The model to load, its adapter (or None), and the base to compare with (None: the model itself).

    `which` is base, final or checkpoint-N. `scales` are the sizes of the update to evaluate, in rising order; 0 is the
    base. `dtype` and `device` are names, as in the flags.
    """

    model: str
    adapter: Path | None
    base: str | None
    which: str
    scales: tuple[float, ...] = (1.0,)
    dtype: str | None = None
    device: str | None = None

    @property
    def folder(self) -> Path:
        return self.adapter or Path(self.model)

    def named(self, scale: float) -> str:
        """Return the name of the results with an update of this size.

        >>> [EvalTarget("tiny", Path("run"), None, "final").named(scale) for scale in (0, 0.5, 1)]
        ['base', 'final-scale-0.5', 'final']
        """
        if scale == 0:
            return "base"
        return self.which if scale == 1 else f"{self.which}-scale-{scale:g}"


def eval_target(
    model: str,
    adapter: Path | None,
    base: str | None,
    scales: tuple[float, ...] = (1.0,),
    *,
    with_base: bool = False,
    dtype: str | None = None,
    device: str | None = None,
) -> EvalTarget:
    """Resolve the flags of a model that is loaded. Raises UserError if they contradict each other."""
    require_no_base(model, adapter, base)
    folder = Path(model)
    if adapter is None and holds_adapter(folder):
        model, adapter = base_of(folder), folder
    if adapter is None and base is None and (with_base or scales != (1.0,)):
        raise UserError(
            "needs an update: an adapter, or a fully trained model and its base",
            code="flag-needs-another",
            where="--with_base" if with_base else "--scale",
            hint="add:  --adapter FOLDER   or   --base MODEL",
        )
    scales = tuple(sorted({*scales, *([0.0] if with_base else [])}))
    if adapter is not None:
        require_adapter(adapter, "--adapter", "milora_eval", "run", "--model", model, "--adapter")
        return EvalTarget(model, adapter, None, _which(adapter), scales, dtype, device)
    is_trained = base is not None or (folder / "recipe.yaml").is_file() or step_of(folder) >= 0
    return EvalTarget(model, None, base, _which(folder) if is_trained else "base", scales, dtype, device)


def _which(folder: Path) -> str:
    return folder.name if step_of(folder) >= 0 else "final"
