"""Length-grouped batches: every record once, little padding, the same order where it has to be the same."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milora_data.batches.lengths import LengthGroupedSampler

LENGTHS = [(37 * i) % 101 + 20 for i in range(1000)]


def padding(order: list[int], batch_size: int) -> int:
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return sum(max(LENGTHS[i] for i in batch) * len(batch) - sum(LENGTHS[i] for i in batch) for batch in batches)


@given(st.lists(st.integers(1, 500), max_size=300), st.integers(1, 17), st.integers(0, 5))
def test_every_record_comes_once(lengths: list[int], batch_size: int, epoch: int) -> None:
    sampler = LengthGroupedSampler(lengths, batch_size)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(len(lengths)))
    assert len(sampler) == len(lengths)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    one, same, other = (LengthGroupedSampler(LENGTHS, 8, seed) for seed in (1, 1, 2))
    assert list(one) == list(one) == list(same) != list(other)
    same.set_epoch(1)
    assert list(one) != list(same)


@given(st.lists(st.tuples(st.integers(1, 500), st.booleans()), max_size=200), st.integers(1, 9), st.data())
def test_it_goes_on_in_the_middle_of_an_epoch(
    records: list[tuple[int, bool]], batch_size: int, data: st.DataObject
) -> None:
    lengths, kinds = [length for length, _ in records], [kind for _, kind in records]
    whole, begun, resumed = (LengthGroupedSampler(lengths, batch_size, 3, kinds=kinds) for _ in range(3))
    for sampler in (whole, begun):
        sampler.set_epoch(2)
    expected = list(whole)
    assert sorted(expected) == list(range(len(lengths)))
    done = data.draw(st.integers(0, max(0, len(lengths) - 1)))
    first = list(islice(begun, done))
    resumed.load_state_dict(begun.state_dict())
    assert first + list(resumed) == expected
    assert list(resumed) == expected  # the epoch after, until it is told that another one begins


def test_kinds_are_not_mixed_but_at_the_end() -> None:
    kinds = [number % 3 == 0 for number in range(1000)]
    order = list(LengthGroupedSampler(LENGTHS, 8, kinds=kinds))
    batches = [{kinds[i] for i in order[start : start + 8]} for start in range(0, 1000, 8)]
    assert all(len(batch) == 1 for batch in batches[:-2])
    assert padding(order, 8) < 0.15 * padding(list(range(1000)), 8)
    with pytest.raises(ValueError, match="2 kinds for 3 lengths"):
        LengthGroupedSampler([1, 2, 3], 2, kinds=[True, False])
