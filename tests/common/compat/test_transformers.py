"""The private names of transformers that `compat.transformers` and `compat.trainer` use are still there."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from transformers import (
    LlamaForCausalLM,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Trainer,
    TrainingArguments,
    core_model_loading,
)
from transformers.integrations import deepspeed

from milora_vl.common.compat.trainer import CheckpointTrainer
from milora_vl.common.compat.transformers import unstarted_arguments, use_one_gpu
from milora_vl.models.timm_tower import TimmTower


@pytest.mark.parametrize(
    "name",
    ["_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler", "_load_from_checkpoint", "_load_best_model"],
)
def test_the_trainer_still_calls_the_methods_that_are_overridden(name: str) -> None:
    assert name in vars(CheckpointTrainer)
    stock = inspect.signature(getattr(Trainer, name))
    assert list(stock.parameters) == list(inspect.signature(getattr(CheckpointTrainer, name)).parameters)
    assert f"self.{name}(" in inspect.getsource(Trainer)


def test_deepspeeds_config_is_where_it_was() -> None:
    assert "_hf_deepspeed_config_weak_ref" in vars(deepspeed)
    assert "_hf_deepspeed_config_weak_ref" in inspect.getsource(deepspeed.is_deepspeed_zero3_enabled)


def test_models_name_their_renamings_and_layers_as_before() -> None:
    assert LlamaForCausalLM._no_split_modules == ["LlamaDecoderLayer"]
    assert "_weight_conversions" in inspect.getsource(core_model_loading)


def test_models_say_which_attention_they_support_as_before() -> None:
    for name in ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend"):
        assert name in vars(PreTrainedModel)
        assert getattr(TimmTower, name) is True


def test_processors_expand_placeholders_and_count_tokens_as_before() -> None:
    assert "self.get_text_with_replacements(" in inspect.getsource(ProcessorMixin)
    counts = inspect.signature(LlavaProcessor._get_num_multimodal_tokens)
    assert "image_sizes" in counts.parameters


def test_arguments_choose_no_device_and_one_gpu_can_be_set(tmp_path: Path) -> None:
    assert "_setup_devices" in vars(TrainingArguments)
    args = unstarted_arguments(output_dir=str(tmp_path), use_cpu=True)
    assert args.device.type == "cpu"
    assert args.n_gpu == 0
    use_one_gpu(args)
    assert args.n_gpu == 1
