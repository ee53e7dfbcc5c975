"""`python -m milora_vl.forgetting` as a user types it: on an adapter, on a whole model, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from milora_vl import Policy, apply_milora, load_adapter, load_model
from milora_vl.forgetting.__main__ import main
from support.adapter_cases import move
from support.problems import raises_code


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, _ = load_model("tiny")
    model = apply_milora(base, Policy.parse("[{modules: language, method: milora, protect: 0, rank: 4}]"))
    move(model, 0.3)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(folder))
    return folder


def test_an_adapter_is_measured_on_text_and_pictures(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "tiny", "--adapter", str(adapter), "--num_tokens", "600", "--limit", "8"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((adapter / "forgetting.json").read_text())
    for name in ("text", "pictures"):
        assert found[name]["kl"] > 0
        assert f"{found[name]['kl']:.3f}" in printed
    out = adapter / "again"
    assert main(["--model", str(adapter), "--num_tokens", "600", "--on", "text", "--output_dir", str(out)]) == 0
    assert json.loads((out / "forgetting.json").read_text())["text"] == found["text"]
    # Another probe of the same models stays in the file; one of other models does not.
    again = ["--model", "tiny", "--num_tokens", "600", "--on", "text", "--output_dir", str(adapter)]
    assert main([*again, "--adapter", str(adapter)]) == 0
    assert json.loads((adapter / "forgetting.json").read_text())["pictures"] == found["pictures"]
    model = load_adapter(load_model("tiny")[0], adapter, is_trainable=True)
    move(model, 0.2)
    model.save_pretrained(str(out))
    assert main([*again, "--adapter", str(out)]) == 0
    assert "pictures" not in json.loads((adapter / "forgetting.json").read_text())


def test_a_whole_model_is_compared_with_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = load_model("tiny-text")
    model.save_pretrained(str(tmp_path / "full"))
    processor.save_pretrained(str(tmp_path / "full"))
    text = tmp_path / "mine.txt"
    text.write_text("All of it is kept. " * 100)
    flags = ["--model", str(tmp_path / "full"), "--base", "tiny-text", "--text", str(text), "--format", "json"]
    capsys.readouterr()
    assert main([*flags, "--num_tokens", "500"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"]["kl"] == pytest.approx(0, abs=1e-9)
    assert (found["text"]["text"], found["text"]["stderr"]) == (str(text), None)
    assert "pictures" not in found


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--model", "tiny"], "", "nothing to compare"),
        (["--model", "tiny", "--adapter", "A", "--base", "tiny"], "flag-conflict", "--base: this flag is for"),
        (["--model", "tiny", "--adapter", "A", "--on", "texts"], "command-line", "expected some of"),
        (["--model", "tiny", "--adapter", "A", "--text", "no.txt"], "data-missing-file", "no.txt: no such file"),
        (["--model", "tiny-text", "--adapter", "A", "--on", "pictures"], "", "reads only text"),
    ],
)
def test_mistakes_are_said(adapter: Path, flags: list[str], code: str, words: str) -> None:
    with raises_code(code, says=words):
        main([str(adapter) + flag[1:] if flag.startswith("A") else flag for flag in flags])
