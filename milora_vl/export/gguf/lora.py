"""An adapter as a GGUF LoRA for llama.cpp's `--lora`: the factors of the language tower, rank 2r, in float32."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from milora_vl.base.errors import UserError
from milora_vl.export.gguf.files import OutType, write, writer_of
from milora_vl.export.gguf.language import Language, text_name
from milora_vl.foreign.plain import LowRank, PlainAdapter


def write_lora(path: Path, adapter: PlainAdapter, language: Language, is_text_model: bool, outtype: OutType) -> None:
    """Write the LoRA of the language tower. A note names what it leaves out: factors and modules of other towers.

    llama.cpp has one alpha for all modules, so the scale is multiplied into B, and alpha is 0, which means no scale.
    Raises UserError for what the format cannot hold: embeddings, and modules of the language tower trained in full.
    """
    inside, outside = {}, []
    for module, low in adapter.factors.items():
        name = module if is_text_model else text_name(f"{module}.weight")
        if name is None:
            outside.append(module)
        else:
            inside[name.removesuffix(".weight")] = low
    for name in adapter.whole:
        if is_text_model or text_name(name) is not None:
            raise UserError(
                "the adapter trained this weight in full, which a GGUF LoRA cannot hold",
                code="export-gguf-module",
                where=name,
                hint="use:  --to gguf   or   --to gguf-lora --with_base",
            )
        outside.append(name.rpartition(".")[0])
    if outside:
        sys.stderr.write(
            f"note: the file holds the language tower alone, without {', '.join(dict.fromkeys(outside))}\n"
            "      --to gguf writes a model with all of it\n"
        )
    writer = writer_of(path, language.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    write(writer, _tensors(inside, language), outtype)


def _tensors(factors: Mapping[str, LowRank], language: Language) -> dict[str, Tensor]:
    tensors = {}
    for module, low in factors.items():
        name = language.name_of(f"{module}.weight")
        if low.is_embedding or name is None or low.A.dim() != 2:
            raise UserError(
                "a GGUF LoRA holds factors of linear layers only",
                code="export-gguf-module",
                where=module,
                hint="use:  --to gguf",
            )
        A, B = low.matrices()
        tensors[f"{name}.lora_a"] = A
        tensors[f"{name}.lora_b"] = language.ordered(f"{module}.weight", B)
    return tensors
