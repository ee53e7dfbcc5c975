"""The command `python -m milora_eval`: run, ls, score, judge, compare, view.

Torch is imported only once a model must be loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from milora_data.command import run
from milora_data.menu import Menu

MENU = Menu(
    "python -m milora_eval",
    "Evaluate vision-language models.",
    {
        "measure": {
            "run": ("milora_eval.commands.run", "ask a model, score its answers, compare with its base"),
            "ls": ("milora_eval.commands.ls", "list suites and benchmarks"),
            "score": ("milora_eval.commands.score", "score stored answers, or another program's, without a model"),
            "judge": ("milora_eval.commands.judge", "have free answers graded by a model (MM-Vet, LLaVA-Bench)"),
        },
        "look": {
            "compare": ("milora_eval.commands.compare", "paired differences of two evaluations"),
            "view": ("milora_eval.commands.view", "one HTML page to browse the answers of one run, or of two"),
        },
    },
    """\
examples:
  python -m milora_eval ls --data playground/data/eval
  python -m milora_eval run --model llava-1.5-7b --adapter runs/a --suite llava-paper --data data --output_dir runs/a
  python -m milora_eval compare runs/demo/eval/emoji/base runs/demo/eval/emoji/final
""",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns the exit code."""
    return MENU.main(argv)


if __name__ == "__main__":
    run(main)
