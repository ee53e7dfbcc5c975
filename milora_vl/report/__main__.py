"""`python -m milora_vl.report`."""

from milora_vl.cli.command_line import run
from milora_vl.report.command import main

if __name__ == "__main__":
    run(main)
