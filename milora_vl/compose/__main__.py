"""`python -m milora_vl.compose`."""

from milora_vl.common.cli.command_line import run
from milora_vl.compose.command import main

if __name__ == "__main__":
    run(main)
