"""Flags that are mistyped, missing, or name what is not here."""

from __future__ import annotations

import pytest

from milora_vl.common.cli.parser import Command, parser, positive, shared
from milora_vl.common.errors import UserError
from support.problems import raises_code


def test_a_mistyped_flag_is_named_where_the_right_one_is_missing() -> None:
    options = parser("prog", "what it does", "example: x")
    options.add_argument("--model", required=True)
    options.add_argument("--limit", type=positive)
    for word in ("--modle", "--modle=tiny"):
        with raises_code("command-line", where="--modle", hint="did you mean --model?"):
            options.parse_args([word, "tiny"])
    with raises_code("command-line", message="required: --model"):
        options.parse_args(["--limit", "3", "--", "--modle"])
    with raises_code("command-line", where="--limit", message="expected a whole number, got 'abc'"):
        options.parse_args(["--model", "a", "--limit", "abc"])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("cdua", "expected cpu, cuda, cuda:1, ..., got 'cdua'\ndid you mean cuda?"),
        ("meta", "expected cpu, cuda, cuda:1, ..., got 'meta'"),
        ("cuda", "no device cuda: PyTorch finds no cuda devices"),
        ("cpu:3", "no device cpu:3: PyTorch finds 1 cpu devices"),
    ],
)
def test_a_device_that_is_none_or_not_here_is_refused(word: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    command = Command("prog", "what it does", "example: x", settings=(shared("device"),))
    assert command.parse(["--device", "cpu"]).device == "cpu"
    with pytest.raises(UserError) as error:
        command.parse(["--device", word])
    assert said in str(error.value)
