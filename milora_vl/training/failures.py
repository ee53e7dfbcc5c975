"""What went wrong while training, in a few lines: data that turned out broken, and memory that did not suffice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from milora_data.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments


def explained(error: Exception, args: TrainingArguments) -> UserError:
    """An error with exit code 1 (the run failed), its message without the traceback of a loader process."""
    if not isinstance(error, UserError):
        batch = args.per_device_train_batch_size
        smaller = f"--per_device_train_batch_size {max(batch // 2, 1)} --gradient_accumulation_steps "
        return UserError(
            f"out of memory: {str(error).splitlines()[0]}\n"
            f"the same step with less: {smaller}{2 * args.gradient_accumulation_steps}\n"
            "or: --gradient_checkpointing True, --deepspeed zero3, a smaller --max_length",
            exit_code=1,
        )
    return UserError(without_traceback(str(error)), exit_code=1)


def without_traceback(text: str) -> str:
    """The message inside what torch makes of an exception in a loader process.

    >>> without_traceback("Caught E.\\nOriginal Traceback:\\n  File x\\nmilora_data.E: a.png: broken")
    'a.png: broken'
    """
    if "Original Traceback" not in text:
        return text
    lines = text.strip().splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("milora_data.")]
    return "\n".join([lines[starts[-1]].partition(": ")[2], *lines[starts[-1] + 1 :]]) if starts else text
