"""`python -m milora_vl.export`."""

from milora_vl.common.cli.console import run
from milora_vl.export.command import main

if __name__ == "__main__":
    run(main)
