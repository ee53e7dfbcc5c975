"""A whole model as GGUF: the language model, and for a LLaVA the file with its tower and projector."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn

from milora_vl.base.errors import UserError
from milora_vl.export.gguf.files import OutType, write, writer_of
from milora_vl.export.gguf.language import add_settings, language_of, tensors_of, text_state
from milora_vl.export.gguf.tokenizer import add_tokenizer
from milora_vl.export.gguf.vision import why_no_pictures, write_pictures
from milora_vl.models.loading import split_processor


def write_model(model: nn.Module, processor: Any, folder: Path, name: str, outtype: OutType) -> list[str]:
    """Write NAME-TYPE.gguf and, for a LLaVA with a CLIP tower, mmproj-TYPE.gguf. Return the names of the files.

    A note says why there is no file for the pictures. Raises UserError for a model or tokenizer that llama.cpp reads
    in another way.
    """
    config: Any = model.config
    language = language_of(config)
    if processor is None:
        raise UserError(
            "GGUF holds the tokenizer, and the base is a loaded model without one",
            code="export-gguf-tokenizer",
            where="base",
            hint="pass the name or folder of the base model",
        )
    tokenizer, image_processor = split_processor(processor)
    state = model.state_dict()
    files = [f"{name}-{outtype}.gguf"]
    writer = writer_of(folder / files[0], language.architecture)
    writer.add_name(folder.name.strip("."))
    add_settings(writer, language)
    add_tokenizer(writer, tokenizer, language.config.vocab_size)
    write(writer, tensors_of(language, text_state(state)), outtype)
    reason = why_no_pictures(config)
    if reason is not None:
        sys.stderr.write(f"note: only the language model is written: {reason}\n")
    elif image_processor is not None:
        kind: OutType = "f32" if outtype == "f32" else "f16"  # kernels of convolutions are read as f16 or f32
        files.append(f"mmproj-{kind}.gguf")
        write_pictures(folder / files[1], config, state, image_processor, kind)
    return files
