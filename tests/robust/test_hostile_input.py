"""Files from strangers: none runs code, starts another program, or is read from outside its folder."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from milora_data.pictures.load import ImageError, load_image
from milora_eval.commands.score import main as score
from milora_vl import apply_milora
from milora_vl.common.errors import UserError
from milora_vl.common.yaml_text import YamlTextError, parse_yaml
from milora_vl.core.adapter.load import load_adapter
from milora_vl.core.adapter.save import save_adapter
from support.adapter_cases import one_rule
from support.problems import raises_code


def test_a_picture_is_never_decoded_by_another_program(tmp_path: Path) -> None:
    saved_eps = io.BytesIO()
    Image.new("L", (8, 8)).save(saved_eps, "EPS")
    (tmp_path / "a.jpg").write_bytes(saved_eps.getvalue())
    with raises_code("image-unreadable", message="not a picture", kind=ImageError):
        load_image(tmp_path / "a.jpg")


def test_yaml_runs_no_code() -> None:
    with pytest.raises(YamlTextError, match="could not determine a constructor"):
        parse_yaml("a: !!python/object/apply:os.system ['id']")


def test_stored_answers_run_no_code_that_nobody_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "mine.py"
    own.write_text(
        "from milora_eval import Benchmark\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class Mine(Benchmark):\n"
        "    name = 'mine'\n"
        "    def score(self, item, text):\n"
        "        return 1.0\n"
    )
    run = tmp_path / "eval" / "mine" / "final"
    run.mkdir(parents=True)
    answer = {
        "id": "1", "benchmark": f"{own}:Mine", "type": "query", "question": "What colour?", "image": "0.png",
        "image_file": "0.png", "prediction": "red", "answers": ["red"], "correct": 1.0, "baseline": None, "group": "0",
        "key": "k1", "question_key": "q1", "meta": {"question_id": "1"}, "context": [["user", "a"], ["assistant", "b"]],
    }  # fmt: skip
    (run / "predictions.jsonl").write_text(json.dumps(answer) + "\n")
    with pytest.raises(UserError) as raised:
        score([str(run)])
    assert raised.value.first.code == "eval-benchmark-code"
    assert not (tmp_path / "ran").exists()
    assert score([str(run), "--plugin", f"{own}:Mine"]) == 0
    assert (tmp_path / "ran").exists()
    capsys.readouterr()


def test_an_adapter_config_imports_no_module(tmp_path: Path, tiny_llama: Callable[..., Any]) -> None:
    save_adapter(apply_milora(tiny_llama()[0], one_rule()), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"megatron_config": {}, "megatron_core": "antigravity"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with raises_code("adapter-unsupported-kind", message="would be imported"):
        load_adapter(tiny_llama()[0], tmp_path)
    assert "antigravity" not in sys.modules
