"""`python -m milora_data COMMAND`: check, convert, show and count a data set; create the demo's and easy-VQA."""

from __future__ import annotations

from collections.abc import Sequence

from milora_vl.common.cli.command_line import run
from milora_vl.common.cli.menu import Menu

MENU = Menu(
    "python -m milora_data",
    "Data for LLaVA-style training.",
    {
        "look": {
            "check": ("milora_data.check.command", "find errors in a data set, and write a repaired copy"),
            "stats": ("milora_data.check.stats", "count records, pictures, turns and lengths"),
            "show": ("milora_data.show.command", "print records as training sees them, with the loss mask"),
        },
        "make": {
            "convert": ("milora_data.convert.command", "convert another format to LLaVA JSON"),
            "emoji": ("milora_data.emoji.command", "create the demo's data set"),
            "easy-vqa": ("milora_data.easy_vqa", "create easy-VQA: shapes, 48,248 short questions"),
        },
    },
    """\
examples:
  python -m milora_data check train.json --image_folder images
  python -m milora_data show train.json --limit 50 --html records.html
  python -m milora_data convert --from csv table.csv --output_dir data
""",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return MENU.main(argv)


if __name__ == "__main__":
    run(main)
