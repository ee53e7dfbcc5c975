"""Calibrations of unusual models and batches: modules that run twice, experts, odd values, little data."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from milora_vl import apply_milora
from support.adapter_cases import one_rule, raises_code

NOISE = torch.Generator().manual_seed(0)


def rows(count: int = 40, size: int = 16, large: int = 4) -> Tensor:
    """Return inputs (count, size), of which the first `large` entries are much larger than the others."""
    return torch.randn(count, size, generator=NOISE) * torch.tensor([5.0] * large + [0.1] * (size - large))


def share(x: Tensor, V: Tensor) -> float:
    return float((x @ V).square().sum() / x.square().sum())


def calibrated(model: nn.Module, batches: Any, inputs: float = 0.9, **options: Any) -> Any:
    rules = one_rule(rank=2, protect={"inputs": inputs})
    return apply_milora(model, rules, calibration=batches, **options).protections["default"]


class Twice(nn.Module):
    """A layer that runs twice, as those of ALBERT run many times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x)) * torch.arange(16.0) + 5)


def test_every_call_of_a_module_that_runs_twice_counts() -> None:
    model, batches = Twice(), [{"x": rows()} for _ in range(8)]
    seen: list[Tensor] = []
    handle = model.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for batch in batches[:7]:
        model(**batch)
    handle.remove()
    protected = calibrated(model, batches)["layer"]
    assert share(torch.cat(seen), protected.V) == pytest.approx(protected.energy, abs=0.02)


class Experts(nn.Module):
    """A mixture: the largest entry of a row selects one of eight experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, :8].argmax(dim=1)
        answers = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            answers[chosen == number] = self.experts[number](x[chosen == number])
        return answers


def test_experts_that_the_first_batch_does_not_reach_are_calibrated() -> None:
    batches = [{"x": torch.randn(2, 16, generator=NOISE)} for _ in range(60)]
    reached = [batch["x"][:, :8].argmax(dim=1) for batch in batches]
    assert len(reached[0].unique()) <= 2
    assert len(calibrated(Experts(), batches, 0.5)) == 8
    few = [batch for batch, chosen in zip(batches, reached, strict=True) if 3 not in chosen]
    with raises_code("calibration-unreached-layer", where="experts.3", message="1 of the 8", hint="more text"):
        calibrated(Experts(), few, 0.5)


class First(nn.Sequential):
    def forward(self, xs: Any) -> Tensor:
        return super().forward(torch.as_tensor(xs[0]))


def two_that_print_alike() -> list[Tensor]:
    """Return inputs (200, 16) that differ inside only; torch and numpy print their rims."""
    found = [torch.ones(200, 16), torch.ones(200, 16)]
    for x, first in zip(found, (3, 8), strict=True):
        x[10:-10, first : first + 3] *= 30 * torch.randn(180, 3, generator=NOISE)
    assert repr([found[0]]) == repr([found[1]])
    return found


@pytest.mark.parametrize("kind", [lambda x: [x], lambda x: (x.numpy(),), lambda x: {0: x}])
def test_the_cache_tells_data_apart_that_print_alike(kind: Any, tmp_path: Path) -> None:
    model = First(nn.Linear(16, 16))
    for x in two_that_print_alike():
        protected = calibrated(copy.deepcopy(model), [{"xs": kind(x)}], 0.99, cache_dir=tmp_path)["0"]
        assert share(x, protected.V) > 0.98
    assert len(list(tmp_path.glob("calibration-*"))) == 2


def test_a_value_of_unknown_content_is_not_cached(tmp_path: Path) -> None:
    class Wrapped:
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def __getitem__(self, number: int) -> Tensor:
            return self.x

        def __repr__(self) -> str:
            return "Wrapped()"

    for x in two_that_print_alike():
        with pytest.warns(UserWarning, match="not cached in .*: a calibration batch holds a Wrapped"):
            protected = calibrated(First(nn.Linear(16, 16)), [{"xs": Wrapped(x)}], 0.99, cache_dir=tmp_path)["0"]
        assert share(x, protected.V) > 0.98
    assert not list(tmp_path.glob("calibration-*"))


def test_damaged_batches_that_are_held_out_are_refused() -> None:
    damaged = [*({"input": rows()} for _ in range(7)), {"input": torch.full((8, 16), torch.nan)}]
    with raises_code("calibration-not-finite", where="0"):
        calibrated(nn.Sequential(nn.Linear(16, 16)), damaged)
