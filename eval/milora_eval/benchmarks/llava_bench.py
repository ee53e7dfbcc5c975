"""LLaVA-Bench (in the wild): a judge model grades the reference answer and the model's answer from 1 to 10.

Follows llava/eval/eval_gpt_review_bench.py and summarize_gpt_review.py: 100 x mean grade of the model / mean grade of
the reference. Those scripts count a review without two numbers as (-1, -1), which lowers the means; here such a review
is skipped and counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from milora_eval.benchmark import Answer, Benchmark, Item, Metric, plain_text
from milora_eval.benchmarks.llava_prompts import picture_item
from milora_eval.data_files import find, read_jsonl
from milora_eval.rules.short_rules import judge_scores
from milora_eval.stats import mean

NO_SCORE = (-1.0, -1.0)
RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the "
    "image is represented with a few sentences describing the image. \nPlease rate the helpfulness, relevance, "
    "accuracy, level of details of their responses. Each assistant receives an overall score on a scale of 1 to 10, "
    "where a higher score indicates better overall performance.\nPlease first output a single line containing only "
    "two values indicating the scores for Assistant 1 and 2, respectively. The two scores are separated by a space.\n"
    "In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential "
    "bias and ensuring that the order in which the responses were presented does not affect your judgment."
)


class LLaVABench(Benchmark):
    """The relative score, overall and per category: conversation, detail and complex questions."""

    name = "llava-bench"
    protocols = ("llava",)
    max_new_tokens = 1024
    files = ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", "images")
    folders = ("llava-bench-in-the-wild",)
    source = "huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
    metric = "relative score"
    judge = "gpt-4-0314"
    judge_system = "You are a helpful and precise assistant for checking the quality of the answer."

    def load(self, data_dir: Path) -> list[Item]:
        """Read the questions, the descriptions of the pictures, and the reference answers."""
        questions, contexts, references = (list(read_jsonl(find(self, data_dir, name))) for name in self.files[:3])
        pictures = find(self, data_dir, self.files[3])
        caption = {line["image"]: _joined(line["caption"]) for line in contexts}
        reference = {line["question_id"]: line["text"] for line in references}
        return [
            picture_item(
                line["question_id"],
                line["text"],
                pictures / line["image"],
                answers=[reference[line["question_id"]]],
                kind=line["category"],
                meta={"context": caption[line["image"]], "image": line["image"]},
            )
            for line in questions
        ]

    def score(self, item: Item, text: str) -> None:
        """Return None: only the judge can grade an answer."""

    def grade(self, item: Item, judgement: str) -> float | None:
        """Return the grade of the model's answer, divided by ten."""
        scores = judge_scores(judgement)
        return None if scores == NO_SCORE else scores[1] / 10

    def judge_prompt(self, item: Item, text: str) -> str:
        """Return the review request, with the reference answer first."""
        first, second = (f"[Assistant {i}]\n{words}\n\n[End of Assistant {i}]" for i, words in _two(item, text))
        return (
            f"[Context]\n{item.meta['context']}\n\n[Question]\n{plain_text(item)}\n\n"
            f"{first}\n\n{second}\n\n[System]\n{RULE}\n\n"
        )

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        """Return the relative scores; a note counts the reviews without numbers."""
        grades: dict[str, list[tuple[float, float]]] = defaultdict(list)
        num_skipped = 0
        for answer in answers:
            if answer.judgement is not None:
                scores = judge_scores(answer.judgement)
                num_skipped += scores == NO_SCORE
                if scores != NO_SCORE:
                    grades[answer.item.kind].append(scores)
        if not grades:
            return []
        note = f"{num_skipped} reviews without two numbers are skipped" if num_skipped else None
        every = [pair for pairs in grades.values() for pair in pairs]
        kinds = [_relative(kind, pairs) for kind, pairs in sorted(grades.items())]
        return [_relative(self.metric, every, note), *(kinds if len(kinds) > 1 else [])]


def _relative(name: str, pairs: list[tuple[float, float]], note: str | None = None) -> Metric:
    theirs = mean([first for first, _ in pairs])
    value = mean([second for _, second in pairs]) / theirs if theirs else 0.0
    return Metric(name, value, None, len(pairs), note=note)


def _two(item: Item, text: str) -> Iterable[tuple[int, str]]:
    return ((1, item.answers[0]), (2, text))


def _joined(caption: Any) -> str:
    return "\n".join(caption) if isinstance(caption, list) else str(caption)
