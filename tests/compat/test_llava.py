"""What `milora_vl.compat.llava` replaces in transformers' Trainer and in LLaVA's is still there."""

from __future__ import annotations

from inspect import getsource, signature

import pytest
from transformers import Trainer

from milora_vl.compat.llava import llava_on_new_transformers


def test_the_trainer_still_asks_for_its_sampler_by_the_name_that_llava_overrides() -> None:
    assert "self._get_train_sampler" in getsource(Trainer)
    assert list(signature(Trainer._get_train_sampler).parameters) in (["self"], ["self", "train_dataset"])


def test_llavas_trainer_is_as_it_was_afterwards() -> None:
    trainer = pytest.importorskip("llava.train.llava_trainer").LLaVATrainer
    before = dict(vars(trainer)), dict(vars(Trainer))
    with llava_on_new_transformers():
        assert vars(trainer)["create_optimizer"] is not before[0]["create_optimizer"]
    assert (dict(vars(trainer)), dict(vars(Trainer))) == before
