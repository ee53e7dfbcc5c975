"""What `milora_vl.common.compat.llava` replaces in transformers' Trainer and in LLaVA's is still there."""

from __future__ import annotations

import shutil
import sys
from importlib import import_module
from inspect import getsource, signature
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from milora_vl.common.compat import llava as compat
from milora_vl.common.compat.llava import PROJECTOR, llava_on_new_transformers
from milora_vl.common.errors import UserError
from support.llava_oracle import llava_train


def test_the_trainer_still_asks_for_its_sampler_by_the_name_that_llava_overrides() -> None:
    assert "self._get_train_sampler" in getsource(Trainer)
    assert list(signature(Trainer._get_train_sampler).parameters) == ["self", "train_dataset"]


def test_llavas_trainer_is_as_it_was_afterwards() -> None:
    pytest.importorskip("llava")
    before = dict(vars(Trainer))
    with llava_on_new_transformers():
        inside = dict(vars(import_module("llava.train.llava_trainer").LLaVATrainer))  # imports only on such a Trainer
    after = dict(vars(import_module("llava.train.llava_trainer").LLaVATrainer))
    assert dict(vars(Trainer)) == before
    assert inside["create_optimizer"] is not after["create_optimizer"]


@pytest.mark.filterwarnings("ignore")
def test_a_run_of_llavas_trainer_resumes_with_what_trains_beside_the_lora(tiny_llama, tmp_path: Path) -> None:
    """Its `_save_checkpoint` passes `metrics`, and its checkpoints lack the projector; here a norm is in its place."""
    llava = llava_train()
    rows = [{"input_ids": torch.arange(5 + i, 15 + i), "labels": torch.arange(5 + i, 15 + i)} for i in range(8)]

    def trained(**options: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model: Any = get_peft_model(tiny_llama()[0], LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model.get_base_model().model.norm.weight.requires_grad_(True)
        settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "report_to": "none"}
        arguments = llava.TrainingArguments(str(tmp_path), save_strategy="steps", disable_tqdm=True, **settings)
        llava.LLaVATrainer(model=model, tokenizer=None, args=arguments, train_dataset=rows).train(**options)
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    with llava_on_new_transformers():
        whole = trained()
        shutil.rmtree(tmp_path / "checkpoint-4")
        torch.testing.assert_close(trained(resume_from_checkpoint=True), whole)
        shutil.rmtree(tmp_path / "checkpoint-4")
        (tmp_path / "checkpoint-2" / PROJECTOR).unlink()
        with pytest.raises(UserError, match="the projector would start again"):
            trained(resume_from_checkpoint=True)


def test_llavas_script_gathers_its_weights_where_deepspeed_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function is in `__main__`, where nobody can replace it."""
    script: dict[str, Any] = {}
    exec(getsource(llava_train().maybe_zero_3), script)
    monkeypatch.setattr(compat, "find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    weight = torch.nn.Parameter(torch.ones(2))
    with llava_on_new_transformers():
        assert script["maybe_zero_3"](weight).tolist() == [1, 1]
    assert "deepspeed" not in sys.modules
