"""The evaluator that other commands ask: found by its entry point, and its words are those of `milora_eval run`."""

from __future__ import annotations

from pathlib import Path

import pytest

from milora_eval.commands.run import COMMAND
from milora_vl.common import evaluator
from milora_vl.common.evaluator import EvaluationRequest, QuestionSet
from support.problems import raises_code


def test_a_package_without_a_registered_evaluator_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator, "GROUP", "milora_vl.nobody")
    with raises_code("evaluator-missing", message="none", hint="install"):
        evaluator.evaluator()


def test_two_evaluators_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other-1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (other / "entry_points.txt").write_text(f"[{evaluator.GROUP}]\nother = other.scores\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with raises_code("evaluator-missing", message="other.scores"):
        evaluator.evaluator()


@pytest.mark.parametrize("questions", [QuestionSet("emoji", "data/emoji", 5), QuestionSet(benchmarks="pope,gqa")])
def test_its_words_are_the_evaluation_that_was_asked_for(questions: QuestionSet, tmp_path: Path) -> None:
    request = EvaluationRequest(
        model="tiny", adapter=tmp_path, questions=questions, dtype="float32", device="cpu", output_dir=tmp_path / "out"
    )
    program, command, *words = evaluator.evaluator().command(request)
    parsed = COMMAND.parse(words)
    assert (program, command) == ("milora_eval", "run")
    assert (parsed.model, parsed.adapter, parsed.base) == ("tiny", tmp_path, None)
    assert (parsed.suite or "", parsed.benchmarks or "") == (questions.suite, questions.benchmarks)
    assert (parsed.data and str(parsed.data), parsed.limit) == (questions.data, questions.limit)
    assert (parsed.dtype, parsed.device, parsed.with_base) == ("float32", "cpu", True)


def test_a_run_that_trained_the_whole_model_is_evaluated_beside_its_base(tmp_path: Path) -> None:
    request = EvaluationRequest.of_run(tmp_path, "tiny", QuestionSet("emoji"))
    assert (request.model, request.adapter, request.base) == ("tiny", tmp_path, None)
    (tmp_path / "config.json").touch()
    request = EvaluationRequest.of_run(tmp_path, "tiny", QuestionSet("emoji"))
    assert (request.model, request.adapter, request.base) == (tmp_path, None, "tiny")
