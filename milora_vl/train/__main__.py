"""`python -m milora_vl.train`."""

from __future__ import annotations

from milora_vl.common.cli.console import run
from milora_vl.train.command import main

if __name__ == "__main__":
    run(main)
