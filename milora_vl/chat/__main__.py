"""`python -m milora_vl.chat`."""

from milora_data.command import run
from milora_vl.chat.command import main

if __name__ == "__main__":
    run(main)
