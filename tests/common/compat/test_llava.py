"""What `milora_vl.common.compat.llava` replaces in transformers' Trainer and in LLaVA's is still there."""

from __future__ import annotations

from importlib import import_module
from inspect import getsource, signature

import pytest
from transformers import Trainer

from milora_vl.common.compat.llava import llava_on_new_transformers


def test_the_trainer_still_asks_for_its_sampler_by_the_name_that_llava_overrides() -> None:
    assert "self._get_train_sampler" in getsource(Trainer)
    assert list(signature(Trainer._get_train_sampler).parameters) in (["self"], ["self", "train_dataset"])


def test_llavas_trainer_is_as_it_was_afterwards() -> None:
    pytest.importorskip("llava")
    before = dict(vars(Trainer))
    with llava_on_new_transformers():
        inside = dict(vars(import_module("llava.train.llava_trainer").LLaVATrainer))  # imports only on such a Trainer
    after = dict(vars(import_module("llava.train.llava_trainer").LLaVATrainer))
    assert dict(vars(Trainer)) == before
    assert inside["create_optimizer"] is not after["create_optimizer"]
