"""`python -m milora_data COMMAND`: check, convert and show a data set; create the demo's and easy-VQA."""

from __future__ import annotations

from collections.abc import Sequence

from milora_vl.common.cli.console import Menu, run

MENU = Menu(
    "python -m milora_data",
    "Data for LLaVA-style training.",
    {
        "look": {
            "check": ("milora_data.check_command", "find errors in a data set, and write its usable records"),
            "show": ("milora_data.show", "print records as training sees them, with the loss mask"),
        },
        "make": {
            "convert": ("milora_data.convert", "convert another format to LLaVA JSON"),
            "emoji": ("milora_data.emoji", "create the demo's data set"),
            "easy-vqa": ("milora_data.easy_vqa", "create easy-VQA: shapes, 48,248 short questions"),
        },
    },
    """\
examples:
  python -m milora_data check train.json --image_folder images
  python -m milora_data show train.json --limit 50 --html records.html
  python -m milora_data convert table.csv --output_dir data
""",
)


def main(argv: Sequence[str] | None = None) -> int:
    return MENU.main(argv)


if __name__ == "__main__":
    run(main)
