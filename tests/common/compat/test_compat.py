"""What the files of `milora_vl.common.compat` need of torch, PEFT, transformers, accelerate and LLaVA."""

from __future__ import annotations

import copy
import inspect
import shutil
import sys
from importlib import import_module
from inspect import getsource, signature
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from peft import LoraConfig, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel
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

from milora_vl import apply_milora
from milora_vl.common.compat import llava as compat
from milora_vl.common.compat import peft as peft_compat
from milora_vl.common.compat.llava import llava_on_new_transformers
from milora_vl.common.compat.peft import ForwardVariant, WholeModule, set_variant
from milora_vl.common.compat.torch import (
    OwnState,
    after_operations,
    call_on_plain_tensors,
    change_class,
    extend_forward,
    has_hooks,
    without_data,
)
from milora_vl.common.compat.trainer import CheckpointTrainer
from milora_vl.common.compat.transformers import unstarted_arguments, use_one_gpu
from milora_vl.common.errors import UserError
from milora_vl.core.adapter.folders import NON_LORA
from milora_vl.models.timm_tower import TimmTower
from support.adapter_cases import LLAVA_POLICY
from support.llava_oracle import llava_train


class Strict(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func.__name__} was intercepted")


def test_operations_run_without_the_subclass() -> None:
    with torch._C.DisableTorchFunctionSubclass():
        value = torch.ones(2).as_subclass(Strict)
    assert call_on_plain_tensors(torch.Tensor.sum, (value,), {}).item() == 2


def test_an_extended_forward_keeps_name_and_signature_and_computes_with_the_weights_of_a_copy() -> None:
    layer = nn.Linear(2, 2)
    extend_forward(layer, lambda module, stock, x, twice=False: stock(x) * (1 + twice))
    copied = copy.deepcopy(layer)
    copied.weight.data.zero_()
    copied.bias.data.fill_(3)
    assert copied(torch.ones(2), twice=True).tolist() == [6, 6]
    assert type(copied).__name__ == "Linear"
    assert isinstance(copied, nn.Linear)
    assert list(inspect.signature(copied.forward).parameters) == ["input"]  # `generate` reads it


def test_ddp_reads_the_names_to_ignore() -> None:
    assert "_ddp_params_and_buffers_to_ignore" in inspect.getsource(DistributedDataParallel)


def test_every_kind_of_hook_is_seen() -> None:
    for name in ("forward_pre", "forward", "full_backward_pre", "full_backward"):
        layer = nn.Linear(2, 2)
        assert not has_hooks(layer)
        getattr(layer, f"register_{name}_hook")(lambda *_: None)
        assert has_hooks(layer), name


def test_an_object_gets_a_subclass_and_stays_the_same_object() -> None:
    class Layer(nn.Linear):
        pass

    layer = nn.Linear(2, 2)
    assert change_class(layer, Layer) is layer
    assert isinstance(layer, Layer)


def test_a_module_writes_and_reads_its_own_names() -> None:
    class Renamed(OwnState):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Parameter(torch.zeros(2))

        def write_state(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super().write_state(destination, prefix, keep_vars)
            destination[f"{prefix}outside"] = destination.pop(f"{prefix}inside")

        def read_state(self, state_dict: Any, prefix: str, *about: Any) -> None:
            state_dict[f"{prefix}inside"] = state_dict.pop(f"{prefix}outside")
            super().read_state(state_dict, prefix, *about)

    model = nn.Sequential(Renamed())
    assert list(model.state_dict()) == ["0.outside"]
    model.load_state_dict({"0.outside": torch.ones(2)})
    assert model[0].inside.tolist() == [1, 1]


def test_operations_without_data_are_seen_with_their_sizes() -> None:
    shapes: list[tuple[int, ...]] = []
    with without_data(), after_operations(lambda tensor: shapes.append(tuple(tensor.shape))):
        product = torch.ones(3, 4) @ torch.ones(4, 5)
    assert product.device.type == "cpu"
    assert shapes[-1] == (3, 5)


def test_the_processes_share_their_type() -> None:
    PartialState()
    assert "distributed_type" in PartialState._shared_state


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


def test_hooks_of_a_module_inside_are_not_those_of_its_wrapper(tiny_llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed registers from the inside out, and asks each module whether it has been there."""
    monkeypatch.setattr(peft_compat, "is_deepspeed_zero3_enabled", lambda: True)
    model = apply_milora(tiny_llava()[0], LLAVA_POLICY)
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    assert wrappers
    for wrapper in wrappers:
        assert type(wrapper) is WholeModule
        wrapper.modules_to_save["default"].post_bwd_fn = object()
        assert not hasattr(wrapper, "post_bwd_fn")
        assert wrapper.weight is wrapper.modules_to_save["default"].weight
        wrapper.post_bwd_fn = "its own"
        assert wrapper.post_bwd_fn == "its own"


def test_peft_still_asks_the_method_that_is_overridden() -> None:
    assert hasattr(ModulesToSaveWrapper, "_hasattr_wrapped")


def test_without_zero3_the_wrappers_are_pefts(tiny_llava) -> None:
    model = apply_milora(tiny_llava()[0], LLAVA_POLICY)
    assert not any(isinstance(module, WholeModule) for module in model.modules())


class Doubled(ForwardVariant):
    """An update that is twice as large, so that a call of it shows."""

    def update(self, down, up, x, onto, scaling, drops):
        return onto + 2 * scaling * up(down(x))


def test_peft_calls_the_variant_of_an_adapter_and_merges_as_without_it() -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config).eval()
    layer, x = model.base_model.model[0], torch.randn(5, 4)
    before, stock, W = layer.base_layer(x), model(x), layer.base_layer.weight.clone()
    set_variant(layer, "default", Doubled())
    torch.testing.assert_close(model(x) - before, 2 * (stock - before))
    torch.testing.assert_close(model(x, adapter_names=["default"] * 5), model(x))
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(model(x), stock)
        model.unmerge_adapter()
        torch.testing.assert_close(layer.base_layer.weight.data, W)
    handle = layer.lora_B["default"].register_forward_hook(lambda *_: None)  # hooks see PEFT's own products
    torch.testing.assert_close(model(x), stock)
    handle.remove()
    set_variant(layer, "default", None)
    torch.testing.assert_close(model(x), stock)


def test_the_trainer_still_asks_for_its_sampler_by_the_name_that_llava_overrides() -> None:
    assert "self._get_train_sampler" in getsource(Trainer)
    assert list(signature(Trainer._get_train_sampler).parameters) == ["self", "train_dataset"]


def test_llavas_trainer_is_as_it_was_afterwards() -> None:
    pytest.importorskip("llava")
    before = dict(vars(Trainer))
    with llava_on_new_transformers(NON_LORA):
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

    with llava_on_new_transformers(NON_LORA):
        whole = trained()
        shutil.rmtree(tmp_path / "checkpoint-4")
        torch.testing.assert_close(trained(resume_from_checkpoint=True), whole)
        shutil.rmtree(tmp_path / "checkpoint-4")
        (tmp_path / "checkpoint-2" / NON_LORA).unlink()
        with pytest.raises(UserError, match="the projector would start again"):
            trained(resume_from_checkpoint=True)


def test_llavas_script_gathers_its_weights_where_deepspeed_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function is in `__main__`, which cannot be replaced."""
    script: dict[str, Any] = {}
    exec(getsource(llava_train().maybe_zero_3), script)
    monkeypatch.setattr(compat, "find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    weight = torch.nn.Parameter(torch.ones(2))
    with llava_on_new_transformers(NON_LORA):
        assert script["maybe_zero_3"](weight).tolist() == [1, 1]
    assert "deepspeed" not in sys.modules
