"""The other commands on a device that is not the CPU, which they take by themselves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from milora_data.records.record import Turn
from milora_eval.__main__ import main as evaluate
from milora_vl import Policy, apply_milora, load_model, save_adapter
from milora_vl.analyze.__main__ import main as analyze
from milora_vl.chat.__main__ import main as chat
from milora_vl.export.__main__ import main as export
from milora_vl.forgetting.__main__ import main as forgetting
from milora_vl.models.generate import Prompt, generate
from support.adapter_cases import move
from support.eval_questions import write_questions
from support.simulated_device import counted_waits, simulated_device
from support.versions import needs_spans
from support.vlm_runs import write_model, write_pictures

SLOW = [
    pytest.param("tiny-text", marks=pytest.mark.slow),
    *(pytest.param(name, marks=[pytest.mark.slow, needs_spans]) for name in ("qwen2_5_vl", "gemma3")),
]


@pytest.fixture(params=["tiny", *SLOW])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A name of --model."""
    if request.param.startswith("tiny"):
        return str(request.param)
    (tmp_path / "vlm").mkdir()
    return str(write_model(request.param, tmp_path / "vlm"))


@pytest.fixture
def adapter(model: str, tmp_path: Path) -> Path:
    """An adapter whose answers differ from its base's."""
    tuned = apply_milora(
        load_model(model)[0], Policy.parse("[{modules: language, method: milora, protect: 0, rank: 4}]")
    )
    move(tuned, 0.3)
    save_adapter(tuned, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_answers_and_measures_are_those_of_the_cpu(
    model: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chat with a picture, an evaluation and forgetting, with the adapter; export and analysis of it."""
    pictures = write_pictures(tmp_path / "pictures")
    flags = ["--model", model, "--adapter", str(adapter)]
    question = ["What is it?"] if model == "tiny-text" else ["--image", str(pictures / "0.png"), "What is it?"]
    data = write_questions(tmp_path / "questions")
    if model == "tiny-text":
        records = [record for record in json.loads((data / "test.json").read_text()) if "image" not in record]
        (data / "test.json").write_text(json.dumps(records))

    def measured(where: Path) -> Any:
        assert chat([*flags, "--max_new_tokens", "8", *question]) == 0
        answer = capsys.readouterr().out
        out = ["--output_dir", str(where)]
        assert evaluate(["run", *flags, "--suite", "emoji", "--data", str(data), "--forgetting_tokens", "0", *out]) == 0
        assert forgetting([*flags, "--num_tokens", "400", "--on", "text", *out]) == 0
        forgotten = json.loads((where / "forgetting.json").read_text())
        result = json.loads((where / "eval" / "emoji" / "final" / "results.json").read_text())
        assert (
            analyze([str(adapter), "--base", model, "--format", "json", "--output_dir", str(where / "analysis")]) == 0
        )
        capsys.readouterr()
        return answer, result["predictions"], forgotten["text"]["kl"]

    *there, kl_there = measured(tmp_path / "cpu")
    with simulated_device():
        *here, kl_here = measured(tmp_path / "sim")
        assert export([str(adapter), "--to", "merged", "--base", model, "--output_dir", str(tmp_path / "merged")]) == 0
    assert here == there
    assert kl_here == pytest.approx(kl_there, rel=1e-3)


def waits_of(ask: Callable[[], object]) -> Counter[str]:
    with counted_waits() as waits:
        ask()
    return waits.lines


@pytest.mark.parametrize("name", ["tiny", "tiny-text"])
def test_generation_waits_for_nothing_of_ours_but_the_answers(name: str, sim: torch.device) -> None:
    """The difference of twelve tokens to four: transformers asks after each token whether all rows have ended."""
    model, processor = load_model(name, device=sim)
    prompts = [Prompt((Turn("user", text),)) for text in ("One?", "And a longer one?")]
    few, many = (waits_of(lambda n=n: generate(model, processor, prompts, max_new_tokens=n)) for n in (4, 12))
    files = {line.partition(":")[0] for line in many - few}
    assert files <= {"transformers/masking_utils.py", "transformers/generation/utils.py"}
    assert sum((many - few).values()) <= 2 * 8
    assert [n for line, n in few.items() if line.startswith(("milora_vl", "milora_data"))] == [1]  # the answers
