"""`python -m milora_vl.chat`."""

from milora_vl.chat.command import main
from milora_vl.common.cli.console import run

if __name__ == "__main__":
    run(main)
