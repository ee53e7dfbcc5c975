"""The console script `milora` and its menu of commands (`MENU`): `milora train` is `python -m milora_vl.train`.

`milora train ...` runs `python -m milora_vl.train ...`; `milora data check ...` runs `python -m milora_data check ...`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from milora_vl.common.cli.console import Menu, run, versions

MENU = Menu(
    "milora",
    "MiLoRA for vision-language models. `python -m milora_vl PROGRAM` is the same.",
    {
        "start": {"demo": ("milora_vl.demo", "fine-tune a small LLaVA on a CPU, evaluate it, write a report")},
        "train": {
            "train": (
                "milora_vl.train.__main__",
                "fine-tune a model with MiLoRA or others, by flags or a recipe",
            ),
            "compose": ("milora_vl.compose", "compose a LLaVA from a vision tower and a language model"),
            "report": ("milora_vl.report.__main__", "regenerate the report of a run folder"),
            "sweep": ("milora_vl.sweep.__main__", "compare methods over learning rates, ranks and seeds"),
        },
        "use": {
            "chat": ("milora_vl.chat.__main__", "ask a model questions, with or without a picture"),
            "export": ("milora_vl.export.__main__", "convert an adapter to a merged model or LLaVA's layout, and back"),
        },
        "data": {"data": ("milora_data.__main__", "check, convert, show and count a data set")},
        "evaluate": {
            "eval": ("milora_eval.__main__", "run, score, compare and view benchmarks"),
            "lm_eval": ("milora_eval.lm_eval", "run tasks of lm-evaluation-harness on a base model and an adapter"),
            "forgetting": (
                "milora_vl.forgetting.__main__",
                "measure what a tuned model has forgotten, on text and pictures",
            ),
            "analyze": (
                "milora_vl.analyze.__main__",
                "show spectra of a model, and what a training changed in its weights",
            ),
        },
        "integrations": {
            "llava": ("milora_vl.interop.llava", "run LLaVA's own train.py with MiLoRA as its LoRA"),
            "replace": (
                "milora_vl.interop.replace",
                "run a script in which get_peft_model creates MiLoRA adapters",
            ),
        },
    },
    """\
examples:
  milora --version
  milora train --model llava-1.5-7b --dry-run
  milora data check train.json --image_folder images
  milora eval run --model llava-1.5-7b --adapter runs/a --suite llava-paper --data eval --output_dir runs/a
""",
    word="PROGRAM",
    menus=("data", "eval"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one program and return its exit code. Raises UserError for an unknown program."""
    if (sys.argv[1:] if argv is None else list(argv)) == ["--version"]:
        sys.stdout.write("".join(f"{name} {version}\n" for name, version in versions().items()))
        return 0
    return MENU.main(argv)


def console() -> None:
    """Entry point of the console script."""
    run(main)


if __name__ == "__main__":
    console()
