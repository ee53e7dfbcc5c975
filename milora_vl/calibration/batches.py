"""Check the calibration batches that a user passes, before the model runs on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from milora_vl.calibration.errors import CalibrationError
from milora_vl.policy.towers import image_token_of

Batch = Mapping[str, Any]
_HINT = 'pass a list of batches:  calibration=[{"input_ids": ids, "attention_mask": mask}, ...]  with (rows, length)'


def checked_batches(model: nn.Module, batches: Iterable[Batch]) -> list[Batch]:
    """Return the batches as a list.

    Raises CalibrationError unless they are mappings, and `input_ids` and masks of equal shape (rows, length), with ids
    that the model has.
    """
    if isinstance(batches, Mapping | Tensor | str | bytes) or not isinstance(batches, Iterable):
        raise _error(f"expected a list of batches, got a {type(batches).__name__}")
    found = list(batches)
    size, image_token = _vocabulary(model), image_token_of(model)
    for number, batch in enumerate(found):
        where = f"calibration[{number}]"
        if not isinstance(batch, Mapping):
            raise _error(f"expected arguments of the model's forward by name, got a {type(batch).__name__}", where)
        for prefix in ("", "decoder_"):
            ids, mask = batch.get(f"{prefix}input_ids"), batch.get(f"{prefix}attention_mask")
            if ids is None:
                continue
            _check_ids(ids, mask, prefix, where)
            words = ids if image_token is None else ids[ids != image_token]
            if size is not None and words.numel() and not 0 <= int(words.min()) <= int(words.max()) < size:
                wrong = int(words.min()) if int(words.min()) < 0 else int(words.max())
                raise _error(
                    f"{prefix}input_ids has the id {wrong}, but the ids of this model are 0 to {size - 1}",
                    where,
                    "use the tokenizer of this model",
                )
    return found


def _check_ids(ids: Any, mask: Any, prefix: str, where: str) -> None:
    if not isinstance(ids, Tensor):
        raise _error(f"{prefix}input_ids is a {type(ids).__name__}, expected a tensor (rows, length)", where)
    shape = tuple(ids.shape)
    if ids.dim() != 2 or ids.is_floating_point():
        raise _error(
            f"{prefix}input_ids has shape {shape} and type {ids.dtype}, expected integers (rows, length)", where
        )
    if isinstance(mask, Tensor) and mask.shape != ids.shape:
        raise _error(f"{prefix}attention_mask has shape {tuple(mask.shape)}, and {prefix}input_ids {shape}", where)


def _vocabulary(model: nn.Module) -> int | None:
    """Return the number of ids of the model's embedding; None without one."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def _error(message: str, where: str = "calibration", hint: str = _HINT) -> CalibrationError:
    return CalibrationError(message, code="calibration-batch", where=where, hint=hint)
