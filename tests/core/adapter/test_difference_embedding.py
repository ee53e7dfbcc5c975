from __future__ import annotations

import pytest
import torch
from torch import nn

from milora_vl.core.adapter.difference import DifferenceEmbedding


def holder() -> DifferenceEmbedding:
    stock = nn.ParameterDict({"default": nn.Parameter(torch.randn(4, 9)), "plain": nn.Parameter(torch.randn(4, 9))})
    ours = DifferenceEmbedding.convert(stock, axis=0)
    ours.set_difference("default", torch.zeros(2, 9), torch.ones(2, 9))
    return ours


def test_indexing_joins_and_iteration_gives_what_trains() -> None:
    ours = holder()
    assert ours["default"].shape == (4, 9)
    assert ours["plain"].shape == (4, 9)
    assert {key: tuple(value.shape) for key, value in ours.items()} == {"default": (2, 9), "plain": (4, 9)}
    assert all(isinstance(value, nn.Parameter) for value in ours.values())
    assert ours.anchor_of("default") is not None
    assert ours.anchor_of("plain") is None


def test_assigning_a_joined_factor_splits_it_and_keeps_requires_grad() -> None:
    ours = holder()
    ours.get_parameter("default").requires_grad_(False)
    ours["default"] = ours["default"].to(torch.float64)
    assert ours.get_parameter("default").dtype == torch.float64
    assert not ours.get_parameter("default").requires_grad
    assert ours["default"].shape == (4, 9)


def test_deleting_takes_the_anchor_along() -> None:
    ours = holder()
    del ours["default"]
    assert list(ours) == ["plain"]
    assert list(ours.buffers()) == []


def test_state_dicts_hold_the_joined_factor_and_load_it_back() -> None:
    ours, other = holder(), holder()
    with torch.no_grad():
        ours.get_parameter("default").add_(3)
    state = ours.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {"default": (4, 9), "plain": (4, 9)}
    other.load_state_dict(state)
    assert torch.equal(other["default"], ours["default"])
    result = other.load_state_dict({"plain": state["plain"]}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["default"], [])
    with pytest.raises(RuntimeError, match="rank 3, this model's has rank 2"):
        other.load_state_dict({"default": torch.zeros(6, 9)}, strict=False)
