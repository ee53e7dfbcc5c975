"""The processor beside an export: the run folder's own, whose chat template is that of training, else the base's."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from milora_data.errors import UserError
from milora_vl.exporting.base import Base

# What tokenizers, image processors and processors of transformers write.
_FILES = (
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt spiece.model chat_template.jinja chat_template.json preprocessor_config.json processor_config.json "
    "video_preprocessor_config.json image_processor.json"
).split()


def copy_processor(source: Path, target: Path, base: Base) -> None:
    """Copy the processor's files of `source`; where it has none, write the base's, or say why not."""
    found = [name for name in _FILES if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    if found:
        return
    try:
        processor = base.processor()
    except UserError as error:
        sys.stderr.write(f"no processor written: {str(error).splitlines()[0]}\n")
        return
    if processor is not None:
        processor.save_pretrained(target)
