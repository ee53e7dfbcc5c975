"""Which versions of transformers and PEFT the tests run with."""

from __future__ import annotations

from importlib.metadata import version

import pytest

TRANSFORMERS = tuple(map(int, version("transformers").split(".")[:2]))
PEFT = tuple(map(int, version("peft").split(".")[:2]))

# Transformers 5.6 finds the answers in a tokenized text by searching its characters, and is off where pieces join.
RIGHT_ASSISTANT_MASKS = TRANSFORMERS >= (5, 18)
# Before, what trains in full had to be called with at least one argument by position; Idefics2 calls its resampler by
# keyword alone.
CALLS_BY_KEYWORD = PEFT >= (0, 20)
# PEFT 0.18 and 0.20 lose the biases of `lora_only` between saving and loading, 0.21 does not.
SAVES_BIASES = PEFT >= (0, 21)
needs_spans = pytest.mark.skipif(TRANSFORMERS < (5, 18), reason="transformers' processors report spans from 5.18 on")
