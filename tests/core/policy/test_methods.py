"""Every declared method trains: from the base's output at step 0 to a folder that stock PEFT reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from milora_vl import apply_milora, load_adapter, merge, save_adapter
from milora_vl.core.policy.rules import METHODS
from support.adapter_cases import one_rule, token_batch, train_steps

ADAPTERS = [name for name, method in METHODS.items() if "rank" in method.fields]
IDS = token_batch(200)


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_method_from_start_to_merge(tiny_llama, tmp_path: Path, method: str) -> None:
    base = tiny_llama()[0](IDS).logits
    rules = [*one_rule(method=method, alpha=4), {"modules": "lm_head", "method": "full"}]
    model = apply_milora(tiny_llama()[0], rules).eval()
    start = model(IDS).logits
    # DoRA scales every row by a norm that it computes again, so it equals the base up to rounding.
    assert torch.allclose(start, base, atol=1e-5) if method == "dora" else torch.equal(start, base)
    losses = train_steps(model.train(), {"input_ids": IDS})
    assert losses[-1] < losses[0]
    expected = model.eval()(IDS).logits
    save_adapter(model, tmp_path)
    for reloaded in (
        load_adapter(tiny_llama()[0], tmp_path),
        load_adapter(tiny_llama()[0], tmp_path, is_trainable=True),
        PeftModel.from_pretrained(tiny_llama()[0], str(tmp_path)),
        merge(model),
    ):
        assert torch.allclose(reloaded.eval()(IDS).logits, expected, atol=1e-5)
