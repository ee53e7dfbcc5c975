"""The forms that an export can write (`--to`): adapter, merged, residual, llava, gguf, gguf-lora, rank-N."""

from __future__ import annotations

from milora_vl.base.errors import UserError
from milora_vl.cli.command_line import suggest

FORMS = {
    "adapter": "stock PEFT LoRA on the unchanged base model, with milora.json",
    "merged": "full model, merged in float32 and saved in the data type of the base model",
    "residual": "form of the papers: a base model without the initial components, and (A, B) of rank r",
    "llava": "LoRA folder for load_pretrained_model of haotian-liu/LLaVA",
    "gguf": "model for llama.cpp and Ollama: language model, mmproj (CLIP tower and projector), Modelfile",
    "gguf-lora": "the adapter's language tower as a LoRA for llama.cpp",
    "rank-N": "plain LoRA of rank N nearest to the adapter, and its error (rank-r: the r of each module)",
}


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
        raise UserError(f"unknown form {to!r}", code="export-unknown-form", where="--to", hint=hint)
    return to, None
