"""The one console script `milora`, and `python -m milora_vl`: every program of this project under one roof.

`milora train ...` is `python -m milora_vl.train ...`, `milora data check ...` is `python -m milora_data check ...`.
"""

from __future__ import annotations

from collections.abc import Sequence

from milora_data.command.cli import run
from milora_data.command.menu import Menu

MENU = Menu(
    "milora",
    "MiLoRA for vision-language models. `python -m milora_vl PROGRAM` is the same.",
    {
        "train": {
            "train": ("milora_vl.train", "fine-tune a model with MiLoRA, LoRA and others, by flags or a recipe"),
            "compose": ("milora_vl.compose", "make a LLaVA of a vision tower and a language model"),
            "report": ("milora_vl.report", "write the report of a run folder again"),
            "sweep": ("milora_vl.sweep.__main__", "methods, learning rates, ranks and seeds compared fairly"),
            "studies": ("milora_vl.studies.__main__", "open questions about MiLoRA, each many small trainings"),
        },
        "use": {
            "chat": ("milora_vl.chat", "ask a model, about a picture or without one"),
            "export": ("milora_vl.export", "turn an adapter into a merged model, LLaVA's layout, and back"),
        },
        "data": {"data": ("milora_data.__main__", "check, convert, show and count a data set")},
        "evaluate": {
            "eval": ("milora_eval.__main__", "benchmarks: run, score, compare, view"),
            "lm_eval": ("milora_eval.lm_eval", "tasks of lm-evaluation-harness on base and adapter"),
            "forgetting": ("milora_vl.forgetting.__main__", "what a tuned model has lost, on text and pictures"),
            "analyze": ("milora_vl.analyze", "spectra of a model, and what a training changed in its weights"),
        },
        "other people's code": {
            "llava": ("milora_vl.integrations.llava", "LLaVA's own train.py, with MiLoRA as its LoRA"),
            "replace": ("milora_vl.integrations.replace", "any script that calls get_peft_model, with MiLoRA instead"),
        },
    },
    """\
examples:
  milora train --model llava-1.5-7b --dry-run
  milora data check train.json --image_folder images
  milora eval run --model llava-1.5-7b --adapter runs/a --suite llava-paper --data eval --output_dir runs/a
""",
    word="PROGRAM",
    menus=("data", "eval"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one program and return its exit code; UserError for a name that is none."""
    return MENU.main(argv)


def console() -> None:
    """Entry point of the console script."""
    run(main)


if __name__ == "__main__":
    console()
