"""Rules of one line: GQA, SEED-Bench and LLaVA-Bench as LLaVA's scripts have them."""

from __future__ import annotations


def gqa_correct(text: str, reference: str) -> bool:
    """Tell whether an answer equals the reference once trailing periods and case are gone (convert_gqa_for_eval.py)."""
    return text.rstrip(".").lower() == reference


def seed_correct(text: str, letter: str) -> bool:
    """Tell whether an answer is the letter, exactly (convert_seed_for_submission.py)."""
    return text == letter


def judge_scores(review: str) -> tuple[float, float]:
    """Return the two numbers of a judge's first line, (-1, -1) where it is anything else (eval_gpt_review_bench.py).

    >>> judge_scores("8 7 out of ten"), judge_scores("8,7")
    ((-1.0, -1.0), (8.0, 7.0))
    """
    parts = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, parts)
    except ValueError:
        return -1.0, -1.0
    return first, second
