"""Initial factors: the wanted triplets, scaled; their report, their cache, and weights that are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn
from transformers.pytorch_utils import Conv1D

from milora_vl.core.adapter.initialize import Initial, initialize
from milora_vl.core.policy import Policy
from milora_vl.core.svd import decompose
from milora_vl.core.weights.matrices import as_matrix, matrix_shape
from milora_vl.core.weights.tensor_files import cache_key, cached_factors
from support.adapter_cases import one_rule, tiny_gpt2
from support.problems import raises_problem


def initial(model: nn.Module, rules, **options) -> dict[str, Initial]:
    return initialize(model, Policy.parse(rules).resolve(model), **options)


def linear(weight: torch.Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return nn.Sequential(layer)


W = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))


def test_the_anchor_is_the_minor_part_divided_by_the_scaling() -> None:
    made = initial(linear(W), one_rule(alpha=6))["0"]  # rank 2, so the scaling is 3
    f = decompose(W, 2)
    assert torch.allclose(3 * made.B0 @ made.A0, (f.U * f.S) @ f.Vh, atol=1e-6)
    assert (made.A0.shape, made.B0.shape) == ((2, 9), (6, 2))


@pytest.mark.parametrize(("method", "part"), [("milora", "minor"), ("pissa", "principal")])
def test_the_report_tells_the_spectrum(method: str, part: str) -> None:
    report = initial(linear(W), one_rule(method=method))["0"].report
    S = torch.linalg.svdvals(W)
    chosen = S[-2:] if part == "minor" else S[:2]
    assert report.sigma_min == pytest.approx(float(chosen[1]), rel=1e-5)
    assert report.sigma_max == pytest.approx(float(chosen[0]), rel=1e-5)
    assert report.sigma_top == pytest.approx(float(S[0]), rel=1e-5)
    assert report.energy == pytest.approx(float(chosen.square().sum() / S.square().sum()), rel=1e-4)
    assert (report.path, report.shape, report.tower, report.rank) == ("0", (6, 9), "language", 2)
    assert (report.excess, report.svd) == (0.0, "eigh")


def test_singular_values_at_zero_are_warned_of_once_with_the_count() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5))
    for layer in model[:2]:
        layer.weight.data[0] = layer.weight.data[1]
    with pytest.warns(UserWarning, match=r"2 of 3 adapters hold singular values at zero \(first: 0\)") as caught:
        initial(model, one_rule())
    assert len(caught) == 1


def test_conv1d_and_convolution_are_read_in_peft_orientation() -> None:
    made = initial(tiny_gpt2(), [{"modules": "language.c_attn", "method": "milora", "protect": 0, "rank": 2}])
    assert {m.report.shape for m in made.values()} == {(48, 16)}
    model = nn.Sequential(nn.Conv2d(3, 4, 5))
    made = initial(model, [{"modules": "*", "method": "milora", "protect": 0, "rank": 2}])
    assert made["0"].A0.shape == (2, 75)


@pytest.mark.parametrize("layer", [nn.Linear(3, 5), Conv1D(5, 3), nn.Conv2d(6, 5, 3), nn.Embedding(3, 5)])
def test_the_shape_of_a_layer_is_known_where_zero3_has_taken_its_weight(layer: nn.Module) -> None:
    expected = tuple(as_matrix(layer, layer.get_parameter("weight")).shape)
    for parameter in layer.parameters():
        parameter.data = torch.empty(0)
    assert matrix_shape(layer) == expected


def test_equal_weights_draw_different_random_components_and_the_same_again() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    model[1].load_state_dict(model[0].state_dict())
    first, second = (initial(model, one_rule(method="random", rank=4)) for _ in range(2))
    assert torch.equal(first["0"].A0, second["0"].A0)
    assert not torch.equal(first["0"].A0, first["1"].A0)


@pytest.mark.parametrize(("value", "message"), [(math.nan, "0: .* 1 NaN or infinite values"), (math.inf, "0: ")])
def test_broken_weights_are_refused_with_their_module(value: float, message: str) -> None:
    broken = W.clone()
    broken[0, 0] = value
    with raises_problem(says=message, kind=ValueError):
        initial(linear(broken), one_rule())


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="is not cached in"):
        made = initial(linear(W), one_rule(), cache_dir=tmp_path / "file")
    assert torch.equal(made["0"].A0, initial(linear(W), one_rule())["0"].A0)


def test_factors_come_back_as_they_were_and_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    made = decompose(W, 2)
    others = [{"U": made.U}, {"U": made.U, "S": made.S, "Vh": made.Vh.half(), "index": made.index}]
    damages = [None, lambda whole: whole[:-9], lambda whole: b"", lambda whole: b"junk"]
    about = {"norm": "1", "sigma_max": "1", "excess": "0", "method": "eigh"}
    damages += [lambda _, other=other: save(other, about) for other in others]
    for damage in damages:
        if damage:
            (file,) = tmp_path.iterdir()
            file.write_bytes(damage(file.read_bytes()))
        for _ in range(2):
            back = cached_factors(W, 2, "minor", tmp_path)
            for name in ("U", "S", "Vh", "index"):
                assert torch.equal(getattr(back, name), getattr(made, name))
            assert [back.norm, back.sigma_max, back.excess] == [made.norm, made.sigma_max, made.excess]
            assert back.method == made.method
    assert len(list(tmp_path.iterdir())) == 1


def test_the_key_depends_on_everything_that_changes_the_factors() -> None:
    keys = [
        cache_key(W, 2, "minor", 0),
        cache_key(W, 3, "minor", 0),
        cache_key(W, 2, "principal", 0),
        cache_key(W, 2, "random", 1),
        cache_key(W.T, 2, "minor", 0),
        cache_key(W.bfloat16(), 2, "minor", 0),
        cache_key(W + 1, 2, "minor", 0),
    ]
    assert len(set(keys)) == len(keys)
    assert cache_key(W.clone(), 2, "minor", 0) == keys[0]
