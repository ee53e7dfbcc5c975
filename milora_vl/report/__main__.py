"""`python -m milora_vl.report`."""

from milora_data.command import run
from milora_vl.report.command import main

if __name__ == "__main__":
    run(main)
