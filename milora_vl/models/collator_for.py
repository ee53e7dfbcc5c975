"""`collator_for`: the collator of any model that `train` takes; `CountingCollator` adds what a step would wait for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers.trainer_utils import RemoveColumnsCollator

from milora_data.batches.image_text_collator import ImageTextCollator
from milora_data.batches.processor_collator import ProcessorCollator
from milora_data.batches.processor_inputs import usable_inputs
from milora_data.batches.record_collator import RecordCollator, RecordLike
from milora_data.encode.templates import OWN
from milora_data.keys import FileKeys, record_key
from milora_data.pictures.load import ImagePolicy
from milora_data.pictures.pixels import AspectRatio
from milora_vl.common.compat.transformers import pass_texts_unchanged
from milora_vl.common.errors import UserError
from milora_vl.models.base import split_processor
from milora_vl.models.llava import image_tokens, is_llava, tiling_of, uses_processor
from milora_vl.models.losses import supervised_positions


def collator_for(
    model: Any,
    processor: Any,
    *,
    template: str | None = None,
    image_folder: str | Path | None = None,
    max_length: int | None = None,
    image_aspect_ratio: AspectRatio = "pad",
    bad_images: ImagePolicy = "raise",
    packing: Literal["rows", "flat"] = "rows",
    substitutes: Sequence[RecordLike] = (),
) -> RecordCollator[Any]:
    """Return the collator that `train` uses for `model`: the fast one for LLaVA and text, else one with `processor`.

    It is a `data_collator` for any trainer; records are `Record` or LLaVA's dicts, and the trainer needs
    `remove_unused_columns=False`. The batch has input_ids, attention_mask, labels (batch, length) and what the model
    needs for its pictures. `model` is a model of transformers or a PeftModel (only its config counts), `processor` its
    processor, or the tokenizer of a text model.

    `template` is vicuna_v1 by default, as in LLaVA-1.5; other models with pictures have their own prompt format. The
    other arguments are as in `ImageTextCollator`. Raises UserError for an argument that does not apply to this model.

    >>> from milora_vl import load_model
    >>> turns = [{"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "Yes."}]
    >>> batch = collator_for(*load_model("tiny"))([{"conversations": turns}])
    >>> sorted(batch)
    ['attention_mask', 'input_ids', 'labels', 'pixel_values']
    """
    config = model.config
    if uses_processor(config):
        refused = {"template": template not in (None, OWN), "image_aspect_ratio": image_aspect_ratio != "pad"}
        for name in (name for name, is_refused in refused.items() if is_refused):
            message = f"the processor of {config.model_type} decides how prompts and pictures are prepared"
            hint = "remove the argument"
            raise UserError(message, code="collate-unsupported-layout", where=name, hint=hint)
        usable_inputs(processor, config.model_type)
        if isinstance(model, nn.Module):
            pass_texts_unchanged(model)
        return ProcessorCollator(
            processor,
            image_folder=image_folder,
            max_length=max_length,
            bad_images=bad_images,
            substitutes=substitutes,
            model_config=config,
            packing=packing,
        )
    tokenizer, image_processor = split_processor(processor)
    reads_pictures = is_llava(config)
    return ImageTextCollator(
        tokenizer,
        image_processor if reads_pictures else None,
        template=template or "vicuna_v1",
        image_tokens=image_tokens(config) if reads_pictures else 0,
        image_token_id=config.image_token_id if reads_pictures else -1,
        image_folder=image_folder,
        max_length=max_length,
        image_aspect_ratio=image_aspect_ratio,
        bad_images=bad_images,
        packing=packing,
        substitutes=substitutes,
        tiling=tiling_of(config),
    )


class CountingCollator:
    """Adds to the batches of a collator what a step would otherwise read from the GPU, and wait for.

    For an evaluation, `keys` are the content keys of the records of the rows.
    `counts` are the tokens, the positions and the supervised tokens, `supervised` are the positions for the loss. LLaVA
    and text models lose an attention mask that hides padding on the right alone, because no position of theirs sees a
    later one: transformers would read it from the GPU, and without a mask sdpa has faster kernels.
    """

    def __init__(self, collator: RecordCollator[Any] | RemoveColumnsCollator) -> None:
        self.collator: Any = collator.data_collator if isinstance(collator, RemoveColumnsCollator) else collator
        self.key_of = FileKeys(self.collator.image_folder)

    def __call__(self, items: Any) -> Any:
        """Return the batch; a loader process that made none returns its error in place of one."""
        batch = self.collator(items)
        if not isinstance(batch, Mapping):
            return batch
        batch, labels = dict(batch), batch["labels"]
        supervised, tokens = supervised_positions(labels), labels.numel()
        mask = batch.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            tokens = int(mask.sum())
            if self.collator.is_causal and not (mask[:, 1:] > mask[:, :-1]).any():
                del batch["attention_mask"]
        if self.collator.is_evaluating:
            kept = [record_key(each, self.key_of) for each in items if each.place not in self.collator.left_out]
            batch["keys"] = kept or [""]  # of a substitute
        return {**batch, "supervised": supervised, "counts": (tokens, labels.numel(), supervised.shape[1])}
