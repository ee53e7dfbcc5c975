"""Arguments of the Python API that are of the wrong kind: a sentence at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from milora_data.batches.image_text_collator import ImageTextCollator
from milora_vl import apply_milora, load_adapter, save_adapter
from support.adapter_cases import one_rule
from support.problems import raises_code, raises_problem


def test_the_name_of_a_model_is_no_model(tmp_path: Path) -> None:
    for call in (lambda: apply_milora("tiny", one_rule()), lambda: load_adapter("tiny", tmp_path)):
        with raises_problem(hint="load it"):
            call()


def test_none_is_no_folder(tiny_llama: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError):
        save_adapter(apply_milora(tiny_llama()[0], one_rule()), None)
    assert not list(tmp_path.iterdir())


def test_a_collator_refuses_at_once_what_it_would_trip_over(tiny_llava: Callable[..., Any]) -> None:
    tokenizer = tiny_llava()[1].tokenizer
    with raises_code("template-unknown", hint="did you mean vicuna_v1?"):
        ImageTextCollator(tokenizer, template="vicunna")
    with raises_code("flag-value", message="max_length must be at least 1, got 0"):
        ImageTextCollator(tokenizer, max_length=0)
