"""`python -m milora_vl.analyze`."""

from milora_data.command import run
from milora_vl.analyze.command import main

if __name__ == "__main__":
    run(main)
