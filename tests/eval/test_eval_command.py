"""The command `python -m milora_eval`: the demo's steps on tiny models, and short error messages."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from milora_eval.__main__ import main
from milora_eval.answers.questions import Question, select, shard_of
from milora_eval.benchmark import Item
from milora_eval.benchmarks.emoji import EmojiBenchmark
from milora_eval.registry import BENCHMARKS, choose
from milora_vl.common import evaluator_protocol
from milora_vl.common.errors import UserError
from milora_vl.common.evaluator_protocol import EvaluationRequest, QuestionSet
from support.eval_questions import write_questions
from support.problems import raises_code


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("emoji"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a stock LoRA on `tiny` whose answers differ from its base."""
    from peft import LoraConfig, get_peft_model

    from milora_vl.interop.load_model import load_model

    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=r".*language_model.*proj", init_lora_weights=False)
    get_peft_model(load_model("tiny")[0], config).save_pretrained(folder)
    return folder


def arguments(adapter: Path, data: Path, output: Path, *more: str) -> list[str]:
    flags = ["--model", "tiny", "--adapter", str(adapter), "--suite", "emoji", "--data", str(data)]
    return ["run", *flags, "--output_dir", str(output), "--forgetting_tokens", "500", *more]


def results(output: Path, which: str) -> dict[str, Any]:
    return dict(json.loads((output / "eval" / "emoji" / which / "results.json").read_text()))


@pytest.fixture(scope="module")
def both(adapter: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Return the folder of an evaluation of base and tuned model (read it or copy it), and its output."""
    folder, out, err = tmp_path_factory.mktemp("both"), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(arguments(adapter, data, folder, "--with_base")) == 0
    return folder, out.getvalue(), err.getvalue()


def test_base_and_tuned_model_stand_in_one_table(both: tuple[Path, str, str], adapter: Path) -> None:
    folder, shown, said = both
    for word in (
        "baseline",
        "base",
        "tuned",
        "difference",
        "yes_no",
        "mean over types",
        "text forgetting",
        "picture",
    ):
        assert word in shown
    final, base = results(folder, "final"), results(folder, "base")
    assert (base["adapter"], final["adapter"]) == (None, str(adapter))
    assert base["predictions"] != final["predictions"]
    assert f"truncated: {final['benchmarks'][0]['truncated']} of 22 answers of final to emoji, at 12 tokens" in said
    assert final["forgetting"]["kl"] > 0
    assert final["forgetting"]["cross_entropy"] > final["forgetting"]["base_entropy"]
    assert final["forgetting"]["pictures"]["kl"] > 0
    assert final["forgetting"]["pictures"]["n_documents"] == 20
    assert "measuring forgetting on the base's answers about drawn shapes" in said
    assert f"next: python -m milora_eval view {folder / 'eval' / 'emoji' / 'base'}" in said
    assert "| text forgetting |" in (folder / "eval" / "emoji" / "final" / "table.md").read_text()


def test_the_base_is_not_asked_again_for_another_adapter(
    adapter: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["run", "--model", "tiny", "--suite", "emoji", "--data", str(data), "--output_dir", str(tmp_path)])
    capsys.readouterr()
    words = arguments(adapter, data, tmp_path, "--with_base", "--format", "json")
    main([word for word in words if word not in ("--model", "tiny")])  # the adapter names its base
    assert list(json.loads(capsys.readouterr().out)) == ["base", "final"]
    assert (results(tmp_path, "base")["asked"], results(tmp_path, "final")["asked"]) == (0, 22)


def test_scoring_again_needs_no_model_and_repairs_the_numbers(both: tuple[Path, str, str], tmp_path: Path) -> None:
    shutil.copytree(both[0], tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "eval" / "emoji" / "final"
    before = results(tmp_path, "final")
    content = json.loads((folder / "results.json").read_text())
    content["benchmarks"] = []
    (folder / "results.json").write_text(json.dumps(content))
    assert main(["score", str(folder)]) == 0
    assert results(tmp_path, "final") == before


def test_the_template_is_the_one_of_the_training(adapter: Path, data: Path, tmp_path: Path) -> None:
    (adapter / "recipe.yaml").write_text("template: nonesuch\n")
    try:
        with raises_code("template-unknown", message="nonesuch"):
            main(arguments(adapter, data, tmp_path))
        assert main(arguments(adapter, data, tmp_path, "--template", "vicuna_v1")) == 0
        (adapter / "recipe.yaml").write_text("template: [vicuna\n")
        with pytest.raises(UserError) as error:
            main(arguments(adapter, data, tmp_path))
        assert error.value.problems[0].code == "yaml-syntax"
    finally:
        (adapter / "recipe.yaml").unlink()


def test_files_of_a_common_name_are_not_taken_for_a_benchmarks(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    shutil.copy(copy / "test.json", copy / "val.json")
    flags = ["--suite", "quick", "--data", str(copy), "--limit", "2", "--output_dir", str(tmp_path)]
    assert main(["run", "--model", "tiny", *flags]) == 0
    skipped = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(skipped) == 1
    assert f"val.json: other questions; ask them with --benchmarks {copy / 'val.json'}" in skipped[0]
    found = json.loads((tmp_path / "eval" / "quick" / "base" / "results.json").read_text())
    assert [entry["name"] for entry in found["benchmarks"]] == ["emoji"]


ITEMS = [Item(f"{kind}-{picture}", (), group=f"{picture}.png") for kind in "abc" for picture in range(20)]


def test_a_smaller_limit_is_a_part_of_a_larger_one() -> None:
    chosen = [{item.id for item in select(ITEMS, limit)} for limit in (1, 5, 17, 40, 60, 100)]
    assert [len(ids) for ids in chosen] == [1, 5, 17, 40, 60, 60]
    assert all(small <= large for small, large in pairwise(chosen))


@pytest.mark.parametrize("count", [1, 3, 20, 31])
def test_every_item_is_in_one_shard(count: int) -> None:
    questions = [Question(EmojiBenchmark(), item, item.id) for item in ITEMS]
    parts = [[one.item for one in shard_of(questions, (number, count))] for number in range(1, count + 1)]
    assert sorted(item.id for part in parts for item in part) == sorted(item.id for item in ITEMS)
    groups = [{item.group for item in part} for part in parts]
    assert sum(len(group) for group in groups) == 20


def test_the_results_of_many_benchmarks_have_a_name_that_a_folder_can_have() -> None:
    every, fewer = (list(BENCHMARKS)[:count] for count in (None, -1))
    names = [choose(",".join(some)).name for some in (every, fewer)]
    assert max(len(name) for name in names) < 200 < len("+".join(BENCHMARKS))
    assert len(set(names)) == 2
    assert choose("gqa,pope").name == "gqa+pope"


def test_a_package_without_a_registered_evaluator_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator_protocol, "GROUP", "milora_vl.nobody")
    with raises_code("evaluator-missing", message="none", hint="install"):
        evaluator_protocol.evaluator()


def test_two_evaluators_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other-1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (other / "entry_points.txt").write_text(f"[{evaluator_protocol.GROUP}]\nother = other.scores\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with raises_code("evaluator-missing", message="other.scores"):
        evaluator_protocol.evaluator()


def test_a_run_that_trained_the_whole_model_is_evaluated_beside_its_base(tmp_path: Path) -> None:
    request = EvaluationRequest.of_run(tmp_path, "tiny", QuestionSet("emoji"))
    assert (request.model, request.adapter, request.base) == ("tiny", tmp_path, None)
    (tmp_path / "config.json").touch()
    request = EvaluationRequest.of_run(tmp_path, "tiny", QuestionSet("emoji"))
    assert (request.model, request.adapter, request.base) == (tmp_path, None, "tiny")
