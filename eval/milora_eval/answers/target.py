"""The model and adapter that an evaluation measures, from its folders; base or final, checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from milora_vl.common.errors import UserError
from milora_vl.core.adapter.checkpoints import step_of
from milora_vl.core.adapter.folders import base_of, holds_adapter, require_adapter, require_no_base


@dataclass(frozen=True, slots=True)
class EvalTarget:
    """The model to load, its adapter (or None), and the base to compare with (None: the model itself).

    `which` is base, final or checkpoint-N, or with a scale final-scale-0.5. `scale` is the size of the update. `dtype`
    and `device` are names, as in the flags.
    """

    model: str
    adapter: Path | None
    base: str | None
    which: str
    scale: float = 1.0
    dtype: str | None = None
    device: str | None = None

    @property
    def has_base(self) -> bool:
        """Whether there is an untrained model to compare with."""
        return self.adapter is not None or self.base is not None

    @property
    def folder(self) -> Path:
        """The trained folder: the adapter's if there is one, else the model's."""
        return self.adapter or Path(self.model)


def eval_target(
    model: str,
    adapter: Path | None,
    base: str | None,
    scale: float = 1.0,
    *,
    dtype: str | None = None,
    device: str | None = None,
) -> EvalTarget:
    """Resolve the flags of a model that is loaded. Raises UserError if they contradict each other."""
    require_no_base(model, adapter, base)
    folder = Path(model)
    if adapter is None and holds_adapter(folder):
        model, adapter = base_of(folder), folder
    if adapter is not None:
        require_adapter(adapter, "--adapter", "milora_eval", "run", "--model", model, "--adapter")
        return EvalTarget(model, adapter, None, named(_which(adapter), scale), scale, dtype, device)
    if base is None and scale != 1:
        raise UserError(
            "needs an update to scale: an adapter, or a fully trained model and its base",
            code="flag-needs-another",
            where="--scale",
            hint="add:  --adapter FOLDER   or   --base MODEL",
        )
    is_trained = base is not None or (folder / "recipe.yaml").is_file() or _is_checkpoint(folder)
    which = named(_which(folder), scale) if is_trained else "base"
    return EvalTarget(model, None, base, which, scale, dtype, device)


def named(which: str, scale: float) -> str:
    """Return the name of the results of a model with a scaled update.

    >>> named("final", 1.0), named("final", 0.5)
    ('final', 'final-scale-0.5')
    """
    return which if scale == 1 else f"{which}-scale-{scale:g}"


def _is_checkpoint(folder: Path) -> bool:
    return step_of(folder) >= 0


def _which(folder: Path) -> str:
    return folder.name if _is_checkpoint(folder) else "final"
