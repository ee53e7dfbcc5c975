"""Results of the official scripts: one test per case of reference/eval-vectors.json, per rule of skill-vectors.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from milora_eval import stats
from milora_eval.benchmark import Benchmark, Item
from milora_eval.benchmarks import (
    commonsense,
    math_answers,
    mmbench,
    mme,
    mmmu,
    plain_sets,
    pope,
    scienceqa,
    short_answers,
    textvqa,
    vqa,
)
from milora_eval.benchmarks.gqa import GQA
from milora_eval.benchmarks.seed_bench import SEEDBench

VECTORS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "reference" / "eval-vectors.json").read_text(encoding="utf-8")
)


def circular(texts: list[str], answers: list[str]) -> int:
    """Return rotations whose options are not part of the vector: only the letters count."""
    return int(all(mmbench.option_letter(text, "ABCD") == answer for text, answer in zip(texts, answers, strict=True)))


def scored(benchmark: Benchmark, text: str, reference: str) -> bool:
    return benchmark.score(Item("", (), answers=(reference,)), text) == 1.0


# metric -> function of (prediction, references)
METRICS: dict[str, Callable[[Any, Any], Any]] = {
    "vqa_normalize": lambda p, r: vqa.normalise(vqa.clean(p)),
    "m4c_normalize": lambda p, r: vqa.m4c_normalise(p),
    "vqav2_accuracy": vqa.vqav2_accuracy,
    "textvqa_accuracy": textvqa.textvqa_accuracy,
    "vizwiz_accuracy": vqa.vizwiz_accuracy,
    "textvqa_prompt_question": lambda p, r: textvqa.question_of(p),
    "pope_parse": lambda p, r: pope.pope_answer(p),
    "pope_metrics": lambda p, r: list(pope.pope_numbers(p, r)),
    "scienceqa_parse": lambda p, r: scienceqa.scienceqa_letter(p),
    "scienceqa_index": lambda p, r: scienceqa.scienceqa_index(p, len(r)),
    "mmbench_option": mmbench.mmbench_option,
    "mmbench_circular": circular,
    "mme_parse": lambda p, r: mme.mme_answer(p),
    "mme_subtask_score": mme.mme_score,
    "seedbench_correct": lambda p, r: scored(SEEDBench(), p, r),
    "gqa_correct": lambda p, r: scored(GQA(), p, r),
    "mmmu_mc_parse": mmmu.mmmu_option,
    "mmmu_open_correct": mmmu.mmmu_open_correct,
    "chartqa_relaxed": short_answers.chartqa_correct,
    "docvqa_anls": short_answers.anls,
    "commonsense_extract": lambda p, r: commonsense.commonsense_label(p["text"], p["dataset"]),
    "gsm8k_extract_milora": lambda p, r: math_answers.gsm8k_number(p),
    "math_equiv_milora": lambda p, r: any(math_answers.math_correct(p, reference) for reference in r),
    "mean_stderr": lambda p, r: stats.mean_stderr(p),
    "clustered_stderr": lambda p, r: stats.clustered_stderr(p["scores"], p["clusters"]),
}
TOLERANCE = {"pope_metrics": 1e-3}


@pytest.mark.parametrize("vector", VECTORS, ids=[f"{v['metric']}-{i}" for i, v in enumerate(VECTORS)])
def test_vector(vector: dict[str, Any]) -> None:
    assert vector["metric"] in METRICS, f"no scorer for the metric {vector['metric']}"
    got = METRICS[vector["metric"]](vector["prediction"], vector["references"])
    expected = vector["expected"]
    if isinstance(expected, float) or (isinstance(expected, list) and expected and isinstance(expected[0], float)):
        expected = pytest.approx(expected, abs=TOLERANCE.get(vector["metric"], 1e-5))
    assert got == expected, vector["why"]
    assert isinstance(got, bool) == isinstance(vector["expected"], bool) or vector["expected"] in (0, 1)


SKILLS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "reference" / "skill-vectors.json").read_text(encoding="utf-8")
)
RULES: dict[str, Callable[[str, Any], Any]] = {
    "ai2d": plain_sets.ai2d_correct,
    "mmstar": plain_sets.mmstar_correct,
    "mcq_letter": plain_sets.mcq_letter,
    "realworldqa": plain_sets.realworldqa_correct,
    "cub200": plain_sets.cub200_correct,
    "pathvqa_exact_match": short_answers.pathvqa_exact_match,
    "pathvqa_f1": short_answers.pathvqa_f1,
    "chartqa": short_answers.chartqa_correct,
    "anls": short_answers.anls,
}


@pytest.mark.parametrize("rule", SKILLS)
def test_a_rule_agrees_with_its_script(rule: str) -> None:
    cases = SKILLS[rule]["cases"]
    got = [(text, reference, RULES[rule](text, reference)) for text, reference, _ in cases]
    assert got == [
        (text, reference, pytest.approx(expected) if isinstance(expected, float) else expected)
        for text, reference, expected in cases
    ]
