"""Look at the instructions of a pickle before it is loaded: what they import, and how much they allocate."""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import BinaryIO

_HUGE_MEMO = 1 << 20


@dataclass(frozen=True, slots=True)
class Instructions:
    """The classes and functions that a pickle names, and whether its memory is out of proportion to its size."""

    names: frozenset[str]
    is_bomb: bool


def scan(pickle: BinaryIO) -> Instructions:
    """Return what the next pickle of a file would do. Raises ValueError if it is not a pickle, or ends in the middle.

    Python's unpickler allocates the memo up to the largest index, so nine bytes can take many GiB.
    """
    names: set[str] = set()
    texts: list[str] = []
    is_bomb = False
    try:
        for count, (code, argument, _) in enumerate(pickletools.genops(pickle)):
            if code.name in ("GLOBAL", "INST"):
                names.add(str(argument).replace(" ", "."))
            elif code.name == "STACK_GLOBAL":
                names.add(".".join(texts[-2:]))
            elif isinstance(argument, str):
                texts.append(argument)
            if code.name in ("LONG_BINPUT", "PUT") and isinstance(argument, int) and argument > count + _HUGE_MEMO:
                is_bomb = True
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (ValueError, IndexError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise ValueError(str(error) or type(error).__name__) from None
    return Instructions(frozenset(names), is_bomb)
