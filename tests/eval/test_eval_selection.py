"""Subsets are nested; every item is in exactly one shard."""

from __future__ import annotations

from itertools import pairwise

import pytest

from milora_eval.answers.questions import Question, parse_shard, select, shard_of
from milora_eval.benchmark import Item
from milora_eval.benchmarks.emoji import Emoji
from support.problems import raises_code

ITEMS = [Item(f"{kind}-{picture}", (), group=f"{picture}.png") for kind in "abc" for picture in range(20)]


def test_a_smaller_limit_is_a_part_of_a_larger_one() -> None:
    chosen = [{item.id for item in select(ITEMS, limit)} for limit in (1, 5, 17, 40, 60, 100)]
    assert [len(ids) for ids in chosen] == [1, 5, 17, 40, 60, 60]
    assert all(small <= large for small, large in pairwise(chosen))


def test_a_subset_keeps_the_order_and_does_not_depend_on_it() -> None:
    chosen = select(ITEMS, 20)
    assert chosen == [item for item in ITEMS if item in chosen]
    assert {item.group for item in select(ITEMS[::-1], 21)} == {item.group for item in select(ITEMS, 21)}


def test_pictures_come_with_all_their_questions() -> None:
    assert len({item.group for item in select(ITEMS, 21)}) == 7


@pytest.mark.parametrize("count", [1, 3, 20, 31])
def test_every_item_is_in_one_shard(count: int) -> None:
    questions = [Question(Emoji(), item, item.id) for item in ITEMS]
    parts = [[one.item for one in shard_of(questions, (number, count))] for number in range(1, count + 1)]
    assert sorted(item.id for part in parts for item in part) == sorted(item.id for item in ITEMS)
    groups = [{item.group for item in part} for part in parts]
    assert sum(len(group) for group in groups) == 20


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/3", ""])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with raises_code("", where="--shard", message="i/n"):
        parse_shard(text)
