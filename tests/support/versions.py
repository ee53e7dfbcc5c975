"""Which of its neighbours' versions the tests run with: pyproject.toml allows transformers 4 and 5."""

from __future__ import annotations

from importlib.metadata import version

import pytest

TRANSFORMERS_5 = int(version("transformers").partition(".")[0]) >= 5
PEFT = tuple(map(int, version("peft").split(".")[:2]))
TORCH = tuple(map(int, version("torch").split(".")[:2]))

# Transformers 4 finds the answers in a tokenized text by searching its characters, and is off where pieces join.
RIGHT_ASSISTANT_MASKS = TRANSFORMERS_5
# Before, what trains in full had to be called with at least one argument by its place; Idefics2 calls its resampler by
# keyword alone.
CALLS_BY_KEYWORD = PEFT >= (0, 20)
# Transformers 4.57 writes "lfm2-vl" into the config of a model that it knows as "lfm2_vl", and cannot read it back.
READS_LFM2_VL = TRANSFORMERS_5
# PEFT 0.18 and 0.20 lose the biases of `lora_only` between saving and loading, 0.21 does not.
SAVES_BIASES = PEFT >= (0, 21)
# Before, processors did not report where they expand the placeholders of pictures.
TRANSFORMERS = tuple(map(int, version("transformers").split(".")[:2]))
needs_places = pytest.mark.skipif(TRANSFORMERS < (5, 18), reason="transformers' processors report places from 5.18 on")
needs_mica = pytest.mark.skipif(PEFT < (0, 20), reason="PEFT has MiCA from 0.20 on")
