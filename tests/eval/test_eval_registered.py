"""The evaluator that other commands ask: found by its entry point, and its words are those of `milora_eval run`."""

from __future__ import annotations

from pathlib import Path

import pytest

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


def test_a_run_that_trained_the_whole_model_is_evaluated_beside_its_base(tmp_path: Path) -> None:
    request = EvaluationRequest.of_run(tmp_path, "tiny", QuestionSet("emoji"))
    assert (request.model, request.adapter, request.base) == ("tiny", tmp_path, None)
    (tmp_path / "config.json").touch()
    request = EvaluationRequest.of_run(tmp_path, "tiny", QuestionSet("emoji"))
    assert (request.model, request.adapter, request.base) == (tmp_path, None, "tiny")
