"""Forgetting at equal loss: curves, their interpolation, ratios paired by seed, and where pages show them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milora_vl.sweep import page
from milora_vl.sweep.cells import Cell
from milora_vl.sweep.curves import Spot, at_common_loss, curve, curves_of, equal_loss_table, forgetting_at, ratios_to

POSITIVE = st.floats(1e-6, 1e3)
SPOTS = st.lists(st.builds(Spot, POSITIVE, POSITIVE), max_size=8)


def results(arms: dict[str, list[list[tuple[float, float]]]]) -> dict[Cell, dict[str, float]]:
    """Cells of arms: for each seed its trainings (validation loss, forgetting), at rates 1, 2, ..."""
    return {
        Cell(arm, float(rate), None, seed): {"validation_loss": loss, "forgetting": forgetting, "score": 0.5}
        for arm, seeds in arms.items()
        for seed, spots in enumerate(seeds)
        for rate, (loss, forgetting) in enumerate(spots, start=1)
    }


@given(SPOTS)
def test_no_training_beats_a_point_of_the_curve_and_every_other_training_is_beaten(spots: list[Spot]) -> None:
    front = curve(spots)
    for a in front:
        assert not [b for b in spots if b.loss <= a.loss and b.forgetting < a.forgetting]
    for spot in spots:
        assert any(on.loss <= spot.loss and on.forgetting <= spot.forgetting for on in front)


@given(SPOTS.filter(len), POSITIVE)
def test_a_reading_lies_between_its_neighbours_and_falls_with_the_loss(spots: list[Spot], loss: float) -> None:
    front = curve(spots)
    value = forgetting_at(front, loss)
    assert (value is None) == (loss < min(spot.loss for spot in spots))
    for spot in front:
        assert forgetting_at(front, spot.loss) == pytest.approx(spot.forgetting, rel=1e-9, abs=1e-11)
    if value is not None:
        assert front[-1].forgetting * (1 - 1e-9) - 1e-11 <= value <= front[0].forgetting * (1 + 1e-9) + 1e-11
        further = forgetting_at(front, loss + 1.0)
        assert further is not None
        assert further <= value * (1 + 1e-9) + 1e-11


def test_arms_are_read_at_the_lowest_loss_that_both_reach_seed_by_seed() -> None:
    """At 0.8 with the first seed, where the reference ends, and at 0.75 with the second, where the other arm does."""
    cells = results(
        {
            "milora": [[(0.6, 4.0), (0.9, 0.04)], [(0.75, 0.1), (0.8, 0.05)]],
            "lora": [[(0.8, 1.0), (1.0, 0.5), (2.0, 9.0)], [(0.7, 2.0), (0.9, 1.0)]],
        }
    )
    ratio = ratios_to("lora", cells)["forgetting"]["milora"]
    assert ratio is not None
    at_08 = 4.0 ** (1 / 3) * 0.04 ** (2 / 3)  # two thirds of the way from 0.6 to 0.9
    assert ratio.value == pytest.approx(math.sqrt(at_08 / 1.0 * 0.1 / 2**0.75))
    table = equal_loss_table(cells, "lora")
    assert table is not None
    assert [(row[0], row[-1]) for row in table.rows] == [("milora", "1 of 2"), ("lora", "2 of 2")]


def test_an_arm_is_not_read_at_losses_that_the_other_was_not_trained_to() -> None:
    """The arm ends at 1.5, the reference at 0.8 to 1.0: only a bound for the ratio."""
    table = equal_loss_table(results({"lora": [[(0.8, 2.0), (1.0, 1.0)]], "milora": [[(1.5, 0.5)]]}), "lora")
    assert table is not None
    row = {cells[0]: cells for cells in table.rows}["milora"]
    assert row[table.header.index("forgetting, equal loss")] == "≥ 0.50"
    assert row[-1] == "0 of 1"


def test_a_ratio_read_above_the_curve_of_the_reference_is_a_lower_bound() -> None:
    """Its last training is the reference there; one at a lower rate might forget less at that loss."""
    curves = curves_of(results({"a": [[(0.8, 1.0), (0.9, 0.5)]], "in": [[(0.85, 0.2)]], "above": [[(0.95, 0.2)]]}))
    inside, above = (at_common_loss(curves[label], curves["a"]) for label in ("in", "above"))
    assert inside is not None
    assert inside.text == "0.28"
    assert above is not None
    assert above.text == "≥ 0.40"


def test_nan_and_zero_are_not_read_as_numbers() -> None:
    cells = results({"a": [[(1.0, 1.0)]], "none": [[(0.9, 0.0)]], "bad": [[(math.nan, 0.1)]]})
    table = equal_loss_table(cells, "a")
    assert table is not None
    assert [(row[0], row[3]) for row in table.rows] == [("a", "1"), ("none", "–")], "an arm of NaN has no curve"
    assert ratios_to("a", results({"b": [[(1.0, 1.0)]]})) == {}


def test_what_is_forgotten_about_pictures_is_read_beside_text(tmp_path: Path) -> None:
    cells = results({"lora": [[(0.8, 1.0), (1.0, 0.5)]] * 2, "milora": [[(0.7, 0.3), (0.9, 0.04)]] * 2})
    for cell, numbers in cells.items():
        numbers["forgetting_pictures"] = 4.0 if cell.method == "lora" else 1.0
    table = equal_loss_table(cells, "lora")
    assert table is not None
    column = table.header.index("pictures, equal loss")
    assert [row[column] for row in table.rows] == ["1", "0.25 (0.25 to 0.25)"]
    compared = page.Compared(tmp_path, "t", list(cells), cells, {}, lambda _: {}, 2, "score", "nats", "command", "lora")
    written, _ = page.write(compared)
    assert "pictures, equal loss" in written.read_text(encoding="utf-8")
