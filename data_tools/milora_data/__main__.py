"""`python -m milora_data COMMAND`: validate, convert, look at and count a data set; make the demo's."""

from __future__ import annotations

from collections.abc import Sequence

from milora_data.command.cli import run
from milora_data.command.menu import Menu

MENU = Menu(
    "python -m milora_data",
    "Data for LLaVA-style training.",
    {
        "look": {
            "check": ("milora_data.check.command", "find what is broken in a data set, and write it without"),
            "stats": ("milora_data.check.stats", "count records, pictures, turns and lengths"),
            "show": ("milora_data.show.command", "print records as training sees them, with the loss mask"),
        },
        "make": {
            "convert": ("milora_data.convert.command", "make LLaVA JSON of another format"),
            "emoji": ("milora_data.emoji.command", "make the demo's data set"),
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
