"""What an export is asked for: a form (`--to`) and its options; flags that a form does not read are refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from milora_vl.common.cli.console import suggest
from milora_vl.common.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

OutType = Literal["f32", "f16", "bf16", "q8_0"]
FORMS = {
    "adapter": "stock PEFT LoRA on the unchanged base model, with milora.json",
    "merged": "full model, merged in float32 and rounded to the data type of the base or of --dtype",
    "llava": "LoRA folder for load_pretrained_model of haotian-liu/LLaVA",
    "gguf": "merged model for llama.cpp and Ollama, by the scripts of --llama_cpp: model, mmproj, Modelfile",
    "gguf-lora": "the adapter's language tower as a LoRA for llama.cpp, by its script",
    "rank-N": "plain LoRA of rank N nearest to the adapter, and its error (rank-r: the r of each module)",
}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank


@dataclass(frozen=True, slots=True)
class Options:
    """How `export` reads the adapter and writes its form.

    scale: size of the finished update; modules trained in full become W + scale (W' - W).
    base: name, folder or HF id of the base model, or a loaded model, which is modified; by default the model that the
        adapter names.
    dtype: data type of all written tensors; by default as stored.
    with_base: write fully trained modules into a copy of the base model, so that the adapter holds only LoRA factors.
    initial: folder of the initial factors of an adapter that was trained on a residual base (PiSSA, the official
        MiLoRA).
    vision_tower: the CLIP model for LLaVA's config.json.
    remote_code: write the code of a timm vision tower into the folder of the full model, which then loads with
        trust_remote_code=True without this package.
    llama_cpp: folder of llama.cpp, whose scripts write GGUF files.
    outtype: the type of the matrices in GGUF files, by default f16, and f32 for gguf-lora.
    """

    scale: float = 1.0
    base: str | Path | nn.Module | None = None
    dtype: torch.dtype | None = None
    with_base: bool = False
    initial: Path | None = None
    vision_tower: str | None = None
    allow_base_mismatch: bool = False
    remote_code: bool = False
    llama_cpp: str | Path | None = None
    outtype: OutType | None = None


def parse_form(to: str) -> tuple[str, int | None]:
    """Return the kind of form and its rank, ("rank", 64) for rank-64; rank-r keeps the r of each module."""
    kind, _, number = to.partition("-")
    if to == "rank-r":
        return "rank", None
    if kind == "rank" and number.isdecimal() and int(number) > 0:
        return "rank", int(number)
    if to not in FORMS or to == "rank-N":
        near = suggest(to, [form for form in FORMS if form != "rank-N"])
        known = f"known forms: {', '.join(FORMS)}   (N is a number: rank-64)"
        hint = f"{known}\ndid you mean {near[0]}?" if near else known
        raise UserError(f"unknown form {to!r}", where="--to", hint=hint)
    return to, None


def require_fitting(to: str, options: Options) -> None:
    form, _ = parse_form(to)
    is_gguf, writes_model = form in ("gguf", "gguf-lora"), options.with_base or form == "merged"
    for flag, is_set, applies in (
        ("--with_base", options.with_base, form in ("adapter", "rank", "gguf-lora")),
        ("--remote_code", options.remote_code, writes_model and not is_gguf),
        ("--outtype", options.outtype is not None, is_gguf),
        ("--llama_cpp", options.llama_cpp is not None, is_gguf),
        ("--dtype", options.dtype is not None, not is_gguf),
    ):
        if is_set and not applies:
            message, hint = f"does not apply to --to {to}", "remove the flag"
            raise UserError(message, code="flag-no-effect", where=flag, hint=hint)
