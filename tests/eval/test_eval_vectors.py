"""Results of the official scripts: one test per case of reference/eval-vectors.json, per rule of skill-vectors.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from milora_data.pictures.files import on_padded_square
from milora_eval import stats
from milora_eval.rules import (
    anls,
    chartqa,
    cider,
    commonsense,
    gsm8k,
    math_answers,
    mmbench,
    mme,
    mmmu,
    multiple_choice,
    pathvqa,
    pope,
    refcoco,
    scienceqa,
    short_rules,
    textvqa,
    vqa,
)

VECTORS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "reference" / "eval-vectors.json").read_text(encoding="utf-8")
)


def circular(texts: list[str], answers: list[str]) -> int:
    """Return rotations whose options are not part of the vector: only the letters count."""
    return int(all(mmbench.option_letter(text, "ABCD") == answer for text, answer in zip(texts, answers, strict=True)))


# metric -> function of (prediction, references)
METRICS: dict[str, Callable[[Any, Any], Any]] = {
    "vqa_normalize": lambda p, r: vqa.normalise(vqa.clean(p)),
    "m4c_normalize": lambda p, r: textvqa.m4c_normalise(p),
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
    "seedbench_correct": short_rules.seed_correct,
    "gqa_correct": short_rules.gqa_correct,
    "mmmu_mc_parse": mmmu.mmmu_option,
    "mmmu_open_correct": mmmu.mmmu_open_correct,
    "chartqa_relaxed": chartqa.chartqa_correct,
    "docvqa_anls": anls.anls,
    "refcoco_parse": lambda p, r: list(refcoco.box_of(p)),
    "refcoco_iou": refcoco.iou,
    "refcoco_llava_box_normalise": lambda p, r: list(on_padded_square(p["bbox_xyxy"], p["width"], p["height"])),
    "llava_bench_scores": lambda p, r: list(short_rules.judge_scores(p)),
    "commonsense_extract": lambda p, r: commonsense.commonsense_label(p["text"], p["dataset"]),
    "gsm8k_extract_milora": lambda p, r: gsm8k.gsm8k_number(p),
    "math_equiv_milora": lambda p, r: any(math_answers.math_correct(p, reference) for reference in r),
    "cider_d": cider.cider_d,
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
    "ai2d": multiple_choice.ai2d_correct,
    "mmstar": multiple_choice.mmstar_correct,
    "mcq_letter": multiple_choice.mcq_letter,
    "realworldqa": multiple_choice.realworldqa_correct,
    "cub200": multiple_choice.cub200_correct,
    "pathvqa_exact_match": pathvqa.pathvqa_exact_match,
    "pathvqa_f1": pathvqa.pathvqa_f1,
    "chartqa": chartqa.chartqa_correct,
    "anls": anls.anls,
}


@pytest.mark.parametrize("rule", SKILLS)
def test_a_rule_agrees_with_its_script(rule: str) -> None:
    cases = SKILLS[rule]["cases"]
    got = [(text, reference, RULES[rule](text, reference)) for text, reference, _ in cases]
    assert got == [
        (text, reference, pytest.approx(expected) if isinstance(expected, float) else expected)
        for text, reference, expected in cases
    ]
