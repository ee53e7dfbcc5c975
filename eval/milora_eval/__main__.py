"""The command `python -m milora_eval`: run, ls, score, losses, compare, view.

It imports torch only when it loads a model.
"""

from __future__ import annotations

from collections.abc import Sequence

from milora_vl.common.cli.console import Menu, run

MENU = Menu(
    "python -m milora_eval",
    "Evaluate vision-language models.",
    {
        "measure": {
            "run": ("milora_eval.commands.run", "run benchmarks on a model and compare it with its base"),
            "ls": ("milora_eval.commands.ls", "list suites and benchmarks"),
            "losses": (
                "milora_eval.commands.losses",
                "compute the loss of each record: wrong labels stand out",
            ),
            "score": ("milora_eval.commands.score", "score stored answers again, without a model"),
        },
        "look": {
            "compare": ("milora_eval.commands.compare", "compute paired differences of evaluations, and means"),
            "view": ("milora_eval.commands.view", "write one HTML page to browse the answers of one or two runs"),
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
    return MENU.main(argv)


if __name__ == "__main__":
    run(main)
