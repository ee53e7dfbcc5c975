"""Which positions of a calibration batch count."""

from __future__ import annotations

import pytest
import torch

from milora_vl.core.calibration.bases import positions_of
from support.problems import raises_code


def test_padding_does_not_count_and_text_and_pictures_weigh_half_each() -> None:
    ids = torch.tensor([[1, 7, 7, 7, 5, 6], [0, 0, 1, 5, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    (positions,) = positions_of([{"input_ids": ids, "attention_mask": mask}], image_token=7)
    assert positions is not None
    picture, text = pytest.approx(10 / 6), pytest.approx(10 / 14)
    assert positions.tolist() == [[text, picture, picture, picture, text, text], [0, 0, text, text, text, text]]


def test_all_batches_weigh_by_their_positions() -> None:
    batches = [{"input_ids": torch.ones(1, n, dtype=torch.long)} for n in (3, 7)]
    weights = positions_of(batches, image_token=None)
    assert [w.sum().item() for w in weights if w is not None] == pytest.approx([3, 7])


def test_batches_without_tokens_count_everywhere() -> None:
    assert positions_of([{"pixels": torch.ones(2, 3)}], image_token=None) == [None]


@pytest.mark.parametrize(("rows", "is_real"), [(3, 0), (0, 1)])
def test_a_calibration_without_tokens_is_refused(rows, is_real) -> None:
    ids = torch.ones(rows, 5, dtype=torch.long)
    with raises_code("calibration-empty", hint="pass batches with input_ids"):
        positions_of([{"input_ids": ids, "attention_mask": is_real * ids}], image_token=None)
    with raises_code("calibration-empty"):
        positions_of([], image_token=None)
