from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from milora_vl.lora.layers import Conv2dA, Conv2dB, LinearA, LinearB, ResidualA, ResidualB, join, lossless, split


def pair(rank: int = 3, dtype: torch.dtype = torch.float32) -> tuple[LinearA, LinearB]:
    generator = torch.Generator().manual_seed(0)
    A0, B0 = torch.randn(rank, 8, generator=generator).to(dtype), torch.randn(6, rank, generator=generator).to(dtype)
    A = LinearA.take_over(nn.Linear(8, 2 * rank, bias=False), A0.float().clone(), A0)
    B = LinearB.take_over(nn.Linear(2 * rank, 6, bias=False), B0.float().clone(), B0)
    return A, B


@pytest.mark.parametrize("axis", [0, 1])
def test_split_undoes_join(axis: int) -> None:
    trained, anchor = torch.randn(4, 4), torch.randn(4, 4)
    back = split(join(trained, anchor, axis), axis)
    assert torch.equal(back[0], trained)
    assert torch.equal(back[1], anchor)
    assert all(half.is_contiguous() for half in back)


def test_the_weight_is_the_stock_factor_and_the_second_half_of_b_is_negative() -> None:
    A, B = pair()
    assert torch.equal(A.weight, torch.cat([A.trained, A.anchor]))
    assert torch.equal(B.weight, torch.cat([B.trained, -B.anchor], dim=1))
    x = torch.randn(5, 8)
    with torch.no_grad():
        A.trained += 1
        B.trained -= 1
    assert torch.allclose(B(A(x)), nn.functional.linear(nn.functional.linear(x, A.weight), B.weight), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_halves_cancel_to_the_last_bit(rank: int, dtype: torch.dtype) -> None:
    A, B = pair(rank, dtype)
    x = torch.randn(7, 8)
    assert not B(A(x)).any()
    with torch.autocast("cpu", torch.bfloat16):
        assert not B(A(x)).any()


def test_convolutions_cancel_and_join_alike() -> None:
    A0, B0 = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)
    A = Conv2dA.take_over(nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), A0.clone(), A0)
    B = Conv2dB.take_over(nn.Conv2d(4, 5, 1, bias=False), B0.clone(), B0)
    x = torch.randn(1, 3, 9, 9)
    assert not B(A(x)).any()
    with torch.no_grad():
        A.trained *= 2
    stock = nn.functional.conv2d(nn.functional.conv2d(x, A.weight, stride=2, padding=1), B.weight)
    assert torch.allclose(B(A(x)), stock, atol=1e-4)


def test_a_bias_of_peft_is_added_once() -> None:
    B0 = torch.randn(6, 2)
    B = LinearB.take_over(nn.Linear(4, 6), B0.clone(), B0)
    assert torch.allclose(B(torch.ones(1, 4)), B.bias)


def test_only_the_trained_half_is_a_parameter_and_learns() -> None:
    A, B = pair()
    assert [name for name, _ in A.named_parameters()] == ["trained"]
    assert [name for name, _ in A.named_buffers()] == ["anchor"]
    before = A.anchor.clone()
    B(A(torch.randn(5, 8))).square().sum().backward()  # zero output, zero gradient
    B(A(torch.randn(5, 8))).sum().backward()
    assert A.trained.grad.any()
    assert B.trained.grad.any()
    torch.optim.SGD([*A.parameters(), *B.parameters()], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(A.anchor, before)


def test_state_dicts_hold_the_joined_weight_and_load_it_back() -> None:
    A, _ = pair()
    other, _ = pair()
    with torch.no_grad():
        A.trained += 1
    state = A.state_dict()
    assert list(state) == ["weight"]
    assert state["weight"].shape == (6, 8)
    other.load_state_dict(state)
    assert torch.equal(other.trained, A.trained)
    assert torch.equal(other.anchor, A.anchor)
    nn.Linear(8, 6, bias=False).load_state_dict(state)


def test_raw_names_load_too() -> None:
    A, _ = pair()
    A.load_state_dict({"trained": torch.ones(3, 8), "anchor": torch.zeros(3, 8)})
    assert A.trained.eq(1).all()
    assert A.anchor.eq(0).all()


def test_without_elements_the_raw_names_stay_and_the_weight_still_has_a_dtype() -> None:
    """As ZeRO-3 leaves a partitioned parameter outside forward."""
    A, _ = pair()
    A.trained.data = torch.empty(0)
    assert list(A.state_dict()) == ["trained", "anchor"]
    assert A.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "message"),
    [((4, 8), "rank 2, this model's has rank 3"), ((6, 9), r"shape \(6, 9\), expected \(6, 8\)")],
)
def test_a_weight_that_does_not_fit_is_explained_in_ranks(shape: tuple[int, int], message: str) -> None:
    A, _ = pair()
    with pytest.raises(RuntimeError, match=message):
        A.load_state_dict({"weight": torch.zeros(shape)})


def test_missing_and_unexpected_keys_carry_stock_names() -> None:
    A, _ = pair()
    result = A.load_state_dict({"other": torch.zeros(1)}, strict=False)
    assert result.missing_keys == ["weight"]
    assert result.unexpected_keys == ["other"]


def test_anchors_keep_a_narrow_dtype_only_where_nothing_is_lost() -> None:
    A, _ = pair(dtype=torch.bfloat16)
    A.load_state_dict(A.state_dict())
    assert A.anchor.dtype == torch.bfloat16
    third = torch.full((6, 8), 1 / 3)
    A.load_state_dict({"weight": third})
    assert A.anchor.dtype == torch.float32
    assert torch.equal(A.anchor, third[3:])
    assert lossless(torch.tensor([0.5]), torch.bfloat16).dtype == torch.bfloat16


def test_copies_and_pickles_are_whole() -> None:
    A, _ = pair()
    for twin in (copy.deepcopy(A), pickle.loads(pickle.dumps(A))):
        assert isinstance(twin, LinearA)
        assert torch.equal(twin.weight, A.weight)
        assert twin.anchor.data_ptr() != A.anchor.data_ptr()


def test_the_residual_form_multiplies_one_half_and_saves_both() -> None:
    A, B = pair()
    A.__class__, B.__class__ = ResidualA, ResidualB
    assert A.weight.shape == (3, 8)
    x = torch.randn(2, 8)
    assert torch.equal(B(A(x)), nn.functional.linear(nn.functional.linear(x, A.trained), B.trained))
    assert A.state_dict()["weight"].shape == (6, 8)
    assert B.state_dict()["weight"].shape == (6, 6)
