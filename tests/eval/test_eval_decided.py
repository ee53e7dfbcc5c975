"""An answer that ends early, because its score is decided, has the score of the whole answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from milora_data.records.record import Turn
from milora_eval.answers.identity import answer_key
from milora_eval.benchmark import Answer, Benchmark, Item, ends_early
from milora_eval.benchmarks.emoji import Emoji
from milora_eval.benchmarks.own_data import METRICS, OwnData
from milora_eval.benchmarks.pope import POPE
from milora_eval.benchmarks.seed_bench import SEEDBench
from milora_eval.rules.mme import mme_answer, mme_is_decided
from milora_eval.rules.pope import pope_answer, pope_is_decided
from milora_eval.rules.scienceqa import scienceqa_is_decided, scienceqa_letter
from milora_eval.rules.short_rules import seed_correct, seed_is_decided
from milora_vl.models.generate import Prompt, generate

VECTORS = json.loads((Path(__file__).parents[1] / "reference" / "eval-vectors.json").read_text(encoding="utf-8"))
RECORDED = sorted({case["prediction"].strip() for case in VECTORS if isinstance(case.get("prediction"), str)})
WORDS = ("No", "no", "nothing", "not", "Yes", "yes,", "fox.", "B.", "B", "The answer is C.", "3.5")
MADE = [" ".join(words) for count in (1, 2, 3) for words in product(WORDS, repeat=count)]
Rule = tuple[Callable[[str], bool], Callable[[str], Any]]


def cut(text: str, is_decided: Callable[[str], bool]) -> str:
    """Return the shortest beginning that is decided, as a generation character by character would see it."""
    starts = (text[:end].strip() for end in range(1, len(text) + 1))
    return next((start for start in starts if is_decided(start)), text)


@pytest.mark.parametrize(
    "rule",
    [
        (pope_is_decided, pope_answer),
        (mme_is_decided, mme_answer),
        (scienceqa_is_decided, scienceqa_letter),
        (lambda text: seed_is_decided(text, "B"), lambda text: seed_correct(text, "B")),
    ],
    ids=["pope", "mme", "scienceqa", "seed-bench"],
)
def test_recorded_answers_keep_their_result(rule: Rule) -> None:
    is_decided, read = rule
    assert len(RECORDED) > 50
    shorter = 0
    for text in (*RECORDED, *MADE):
        early = cut(text, is_decided)
        assert read(early) == read(text), text
        shorter += len(early) < len(text)
    assert shorter > 20


@pytest.mark.parametrize("kind", ["choice", "choice_letter"])
def test_emoji_answers_keep_their_score_and_the_lenient_mean(kind: str) -> None:
    emoji = Emoji()
    accepted = ("B",) if kind == "choice_letter" else ("red fox", "a fox")
    item = Item("1", (Turn("user", "What is it?"),), answers=accepted, kind=kind, baseline=0.0)
    words = ("a", "The", "fox", "foxes", "red", "fox.", "is", "B", "B.", "\nfox")
    shorter = 0
    for text in [" ".join(chosen) for count in (1, 2, 3) for chosen in product(words, repeat=count)]:
        whole = text.strip()
        early = cut(whole, lambda start: emoji.is_decided(item, start))
        numbers = [emoji.summarise([Answer(item, t, emoji.score(item, t))]) for t in (early, whole)]
        assert numbers[0] == numbers[1], whole
        shorter += len(early) < len(whole)
    assert shorter > 100


@pytest.mark.parametrize("metric", METRICS)
def test_answers_to_own_questions_keep_their_score(metric: str) -> None:
    own, shorter = OwnData("data:mine"), 0
    for right in ("yes", "no", "B"):
        item = Item("1", (Turn("user", "Is it?"),), answers=(right,) * 10, meta={"metric": metric})
        for text in map(str.strip, (*RECORDED, *MADE)):
            early = cut(text, lambda start, item=item: own.is_decided(item, start))
            assert own.score(item, early) == own.score(item, text), text
            shorter += len(early) < len(text)
    assert (shorter > 100) == (metric == "yes_no")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_answer_of_a_batch_ends_where_it_is_decided(batch_size: int, tiny_llama: Callable[..., Any]) -> None:
    model, tokenizer = tiny_llama()
    prompts = [Prompt((Turn("user", text),)) for text in ("one", "two and more", "three")]
    whole = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=batch_size)
    limits = (2, 100, 4)  # characters
    cut_short = generate(
        model, tokenizer, prompts, max_new_tokens=8, batch_size=batch_size,
        is_decided=lambda place, text: len(text) >= limits[place],
    )  # fmt: skip
    assert cut_short[1] == whole[1]
    for place in (0, 2):
        assert whole[place].startswith(cut_short[place])
        assert limits[place] <= len(cut_short[place]) < len(whole[place])


def test_a_class_with_its_own_scores_reads_whole_answers() -> None:
    class Why(POPE):
        def score(self, item: Item, text: str) -> float | None:
            return float("because" in text)

    assert ends_early(POPE)
    assert not ends_early(Why)


def test_a_cut_answer_is_not_reused_for_another_rule() -> None:
    def key(benchmark: Benchmark, metric: str = "exact", right: str = "A", kind: str = "") -> str:
        item = Item("1", (Turn("user", "Is it?"),), answers=(right,), kind=kind, meta={"metric": metric})
        return answer_key({}, benchmark, item)

    own, seed = OwnData("data:mine"), SEEDBench()
    whole = {key(own, metric, right) for metric in METRICS for right in "AB" if metric != "yes_no"}
    assert whole == {"a140d033f41a3d3a"}  # the key of earlier versions
    assert key(own, "yes_no", "yes") not in whole
    assert key(own, "yes_no", "yes") == key(own, "yes_no", "no")
    assert key(seed, right="A") == key(seed, right="A", kind="other") != key(seed, right="B")
    assert key(Emoji(), kind="choice_letter") != key(Emoji(), kind="choice")
    assert key(POPE(), kind="random") == key(POPE(), kind="popular")  # its sets share questions
