"""LLaVA's own layout, both ways, against LLaVA's own classes and its own loader (llava-torch)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from milora_vl import apply_milora, load_adapter, load_model, save_adapter
from milora_vl.export import Options, export
from milora_vl.interop.llava_layout import KNOWN_KEYS
from support.adapter_cases import LLAVA_POLICY, llava_batch, move
from support.llava_oracle import llava_train, original_llava
from support.problems import raises_code

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
Factory = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="module")
def made(tiny_llava: Factory, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One base on disk in both layouts."""
    pytest.importorskip("llava")
    root = tmp_path_factory.mktemp("made")
    base, processor = tiny_llava()
    base.save_pretrained(root / "hf")
    processor.save_pretrained(root / "hf")
    original = original_llava(base, processor, root)
    original.save_pretrained(root / "original")
    processor.tokenizer.save_pretrained(root / "original")
    return SimpleNamespace(root=root, hf=load_model(root / "hf")[0], clip=str(root / "clip"))


@pytest.fixture
def both(made: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A copy of it to write into."""
    shutil.copytree(made.root, tmp_path, dirs_exist_ok=True)
    return SimpleNamespace(root=tmp_path, hf=made.hf, clip=made.clip)


@torch.no_grad()
def hf_logits(model: nn.Module, base: nn.Module) -> Tensor:
    return model.eval()(**llava_batch(base)).logits[..., : base.config.image_token_id]


@torch.no_grad()
def original_logits(model: nn.Module, base: nn.Module) -> Tensor:
    """The same row for LLaVA: one -200 in the place of the 16 image tokens."""
    batch = llava_batch(base)
    ids = torch.cat([batch["input_ids"][:, :2], torch.tensor([[-200]]), batch["input_ids"][:, 18:]], dim=1)
    dtype = next(model.parameters()).dtype
    mask = torch.ones_like(ids)
    return model.eval()(input_ids=ids, attention_mask=mask, images=batch["pixel_values"].to(dtype)).logits


def original_with(root: Path, folder: Path) -> nn.Module:
    """What LLaVA's loader does, in float32."""
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    config = LlavaConfig.from_pretrained(folder)
    model = LlavaLlamaForCausalLM.from_pretrained(root / "original", config=config, dtype=torch.float32)
    model.get_vision_tower().load_model()
    stored = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    _, unknown = model.load_state_dict({key[len("base_model.model.") :]: t for key, t in stored.items()}, strict=False)
    assert unknown == []
    return PeftModel.from_pretrained(model, folder)


def trained(both: SimpleNamespace) -> Tensor:
    model = apply_milora(load_model(both.root / "hf")[0], LLAVA_POLICY)
    move(model)
    save_adapter(model, both.root / "adapter")
    return hf_logits(model, both.hf)


def test_an_adapter_trained_here_gives_the_same_logits_in_llavas_classes(both) -> None:
    expected = trained(both)
    assert not torch.allclose(expected, hf_logits(both.hf, both.hf), atol=1e-2)
    export(both.root / "adapter", "llava", both.root / "llava-lora", Options(vision_tower=both.clip))
    loaded = original_with(both.root, both.root / "llava-lora")
    assert torch.allclose(original_logits(loaded, both.hf), expected, atol=1e-5)
    config = json.loads((both.root / "llava-lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config.keys() <= KNOWN_KEYS
    assert (config["r"], config["lora_alpha"]) == (10, 10)  # one rank for all: this config has no rank_pattern


def test_llavas_own_loader_takes_it(both) -> None:
    from llava.model.builder import load_pretrained_model

    expected = trained(both)
    export(
        both.root / "adapter", "llava", both.root / "llava-lora", Options(vision_tower=both.clip, dtype=torch.float32)
    )
    loaded = load_pretrained_model(
        str(both.root / "llava-lora"), str(both.root / "original"), "llava-lora", device="cpu", device_map="cpu"
    )[1]
    got = original_logits(loaded, both.hf).float()[..., : both.hf.config.image_token_id]  # it grows the vocabulary
    assert torch.allclose(got, expected, atol=2e-2)  # it loads in float16
    assert not torch.allclose(got, hf_logits(both.hf, both.hf), atol=2e-2)


def test_there_and_back(both) -> None:
    expected = trained(both)
    export(both.root / "adapter", "llava", both.root / "llava-lora", Options(vision_tower=both.clip))
    done = export(both.root / "llava-lora", "adapter", both.root / "back", Options(base=both.root / "hf"))
    assert done.origin == "llava"
    assert torch.allclose(
        hf_logits(load_adapter(load_model(both.root / "hf")[0], both.root / "back"), both.hf), expected, atol=1e-5
    )
    stock = PeftModel.from_pretrained(load_model(both.root / "hf")[0], both.root / "back")
    assert torch.allclose(hf_logits(stock, both.hf), expected, atol=1e-5)
    (both.root / "llava-lora").rename(both.root / "any-name")  # chat and eval read LLaVA's folder itself
    loaded, _ = load_model(both.root / "hf", adapter=both.root / "any-name")
    assert torch.allclose(hf_logits(loaded, both.hf), expected, atol=1e-5)


def test_a_lora_run_of_llava_gives_the_same_logits_here(both) -> None:
    """As its train.py does it: LoRA by leaf names, the projector trained beside, saved in two files."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    train = llava_train()
    model = LlavaLlamaForCausalLM.from_pretrained(both.root / "original", dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=train.find_all_linear_names(model), task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    tuned.get_base_model().model.mm_projector.requires_grad_(True)
    tuned.get_base_model().get_vision_tower().load_model()
    move(tuned)
    folder = both.root / "llava-lora"
    model.config.save_pretrained(folder)
    tuned.save_pretrained(folder)
    trained = {name: p.detach() for name, p in tuned.named_parameters() if p.requires_grad and "lora_" not in name}
    torch.save(trained, folder / "non_lora_trainables.bin")  # as get_peft_state_non_lora_maybe_zero_3 collects them
    expected = original_logits(tuned, both.hf)
    export(folder, "adapter", both.root / "here", Options(base=both.root / "hf"))
    here = load_adapter(load_model(both.root / "hf")[0], both.root / "here")
    assert torch.allclose(hf_logits(here, both.hf), expected, atol=1e-5)
    export(folder, "merged", both.root / "merged", Options(base=both.root / "hf"))
    merged = load_model(both.root / "merged")[0]
    assert torch.allclose(hf_logits(merged, both.hf), expected, atol=1e-5)
    export(folder, "llava", both.root / "half", Options(dtype=torch.float16))
    assert {t.dtype for t in load_file(both.root / "half" / "adapter_model.safetensors").values()} == {torch.float16}


def test_what_llavas_loader_could_not_read_is_refused(both) -> None:
    trained(both)
    with raises_code("", where="--vision_tower"):
        export(both.root / "adapter", "llava", both.root / "out")
    model = apply_milora(
        load_model(both.root / "hf")[0], [{"modules": "vision", "method": "milora", "protect": 0, "rank": 2}]
    )
    save_adapter(model, both.root / "seeing")
    with raises_code("", where="vision.layers.0", message="does not support this module"):
        export(both.root / "seeing", "llava", both.root / "out", Options(vision_tower=both.clip))
    model = apply_milora(
        load_model("tiny-text")[0], [{"modules": "language", "method": "milora", "protect": 0, "rank": 2}]
    )
    save_adapter(model, both.root / "text")
    with raises_code("", message="this base is llama"):
        export(both.root / "text", "llava", both.root / "out")


def test_a_longer_vocabulary_is_cut(both) -> None:
    rules = [
        {"modules": "*lm_head", "method": "full"},
        {"modules": "*embed_tokens", "method": "lora", "rank": 2},
    ]
    model = apply_milora(load_model(both.root / "hf")[0], rules)
    move(model)
    save_adapter(model, both.root / "adapter")
    export(both.root / "adapter", "llava", both.root / "llava-lora", Options(vision_tower=both.clip))
    loaded = original_with(both.root, both.root / "llava-lora")
    assert torch.allclose(original_logits(loaded, both.hf), hf_logits(model, both.hf), atol=1e-5)
