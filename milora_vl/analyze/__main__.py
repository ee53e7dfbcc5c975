"""`python -m milora_vl.analyze`."""

from milora_vl.analyze.command import main
from milora_vl.cli.command_line import run

if __name__ == "__main__":
    run(main)
