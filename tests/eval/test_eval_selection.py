"""Subsets are nested; every item is in exactly one shard."""

from __future__ import annotations

from itertools import pairwise

import pytest

from milora_eval.answers.questions import Question, select, shard_of
from milora_eval.benchmark import Item
from milora_eval.benchmarks.emoji import Emoji
from milora_eval.suites import BENCHMARKS, choose

ITEMS = [Item(f"{kind}-{picture}", (), group=f"{picture}.png") for kind in "abc" for picture in range(20)]


def test_a_smaller_limit_is_a_part_of_a_larger_one() -> None:
    chosen = [{item.id for item in select(ITEMS, limit)} for limit in (1, 5, 17, 40, 60, 100)]
    assert [len(ids) for ids in chosen] == [1, 5, 17, 40, 60, 60]
    assert all(small <= large for small, large in pairwise(chosen))


@pytest.mark.parametrize("count", [1, 3, 20, 31])
def test_every_item_is_in_one_shard(count: int) -> None:
    questions = [Question(Emoji(), item, item.id) for item in ITEMS]
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
