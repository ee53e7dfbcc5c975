"""Errors of a run name the place where the user sets a value: the flag, or file and key of the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from milora_vl.train import data
from milora_vl.train.__main__ import main
from support.problems import raises_code

WORDS = ["--model", "tiny", "--rank", "4", "--device", "cpu"]


@pytest.mark.parametrize(
    ("words", "code", "where"),
    [
        ("--fsdp foo", "launch-fsdp", "--fsdp"),
        ("--eval_suite_every 1", "flag-needs-another", "--eval_suite_every"),
        ("--factor_cache FILE", "path-not-a-folder", "--factor_cache"),
    ],
)
def test_mistakes_that_need_no_data_are_found_before_the_records_are_read(
    words: str, code: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("the records were read")

    monkeypatch.setattr(data, "read_records", read)
    file = tmp_path / "train.json"
    file.write_text("[]")
    typed = words.replace("FILE", str(file)).split()
    with raises_code(code, where=where):
        main([*WORDS, "--data_path", str(file), *typed, "--output_dir", str(tmp_path / "run")])
