"""Every benchmark with the real smol-llava: official files, LLaVA's prompts byte for byte, answers, scores, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from milora_eval import score
from milora_eval.answers.questions import EvaluationPlan, read_items
from milora_eval.answers.store import read_lines
from milora_eval.benchmark import Benchmark, Item
from milora_eval.evaluate import evaluate
from milora_eval.suites import BENCHMARKS, find_benchmark, folder_of
from milora_vl.foreign.load_model import load_model
from milora_vl.models.generate import Prompt, prompt_ids
from milora_vl.models.loading import split_processor
from support import official_data
from support.llava_oracle import llava_train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("picture_cache")]
OFFICIAL = [name for name in BENCHMARKS if name != "emoji"]
LIMIT = 4  # new tokens: the answer does not matter here


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official_data.write_all(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="session")  # before the test moves the cache
def smol() -> tuple[Any, Any]:
    return load_model("smol-llava")


@pytest.mark.parametrize("name", OFFICIAL)
def test_files_to_submission(name: str, smol: tuple[Any, Any], data: Path, tmp_path: Path) -> None:
    benchmark = find_benchmark(name)
    items = benchmark.load(folder_of(benchmark, data))
    for item in items:
        assert_asked_as_llava_does(item, benchmark.form, split_processor(smol[1])[0])
    benchmark.max_new_tokens = LIMIT
    plan = EvaluationPlan(suite=name, benchmarks=(benchmark,), data_dir=data, batch_size=8, audit=3)
    results = evaluate(*smol, plan, read_items([benchmark], data), tmp_path)
    folder = tmp_path / "eval" / name / "final"
    assert results is not None
    assert results["audit"]["changed"] == 0
    lines = read_lines(folder / "predictions.jsonl")
    assert [line["id"] for line in lines] == [item.id for item in items]
    assert any(line["prediction"] for line in lines)
    assert score(folder)["benchmarks"] == results["benchmarks"]
    written = {path.name for path in (folder / "submission").rglob("*") if path.is_file()}
    own = written - {"questions.jsonl", "answers.jsonl"}
    assert bool(own) == (type(benchmark).submission is not Benchmark.submission)


def assert_asked_as_llava_does(item: Item, form: Any, tokenizer: Any) -> None:
    """Return text and ids of the question as in model_vqa_loader.py: conversation, then tokenizer_image_token."""
    if form != "exact":
        return
    llava_train()
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import tokenizer_image_token

    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], item.question)
    conversation.append_message(conversation.roles[1], None)
    text = conversation.get_prompt()
    assert text.endswith(f" USER: {item.question} ASSISTANT:")
    theirs = tokenizer_image_token(text, tokenizer, IMAGE_TOKEN_INDEX)
    ours = prompt_ids(
        Prompt((*item.turns,), item.images, form), tokenizer, "vicuna_v1", image_token_id=-200, image_tokens=1
    )
    assert ours == theirs
