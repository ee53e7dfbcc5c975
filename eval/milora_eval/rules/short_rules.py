"""Short rules of LLaVA's scripts: GQA, SEED-Bench and LLaVA-Bench."""

from __future__ import annotations


def gqa_correct(text: str, reference: str) -> bool:
    """Return whether an answer equals the reference except for trailing periods and case (convert_gqa_for_eval.py)."""
    return text.rstrip(".").lower() == reference


def seed_correct(text: str, letter: str) -> bool:
    """Return whether an answer is exactly the letter (convert_seed_for_submission.py)."""
    return text == letter


def judge_scores(review: str) -> tuple[float, float]:
    """Return the two numbers of a judge's first line, (-1, -1) for any other text (eval_gpt_review_bench.py).

    >>> judge_scores("8 7 out of ten"), judge_scores("8,7")
    ((-1.0, -1.0), (8.0, 7.0))
    """
    parts = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, parts)
    except ValueError:
        return -1.0, -1.0
    return first, second
