"""What is saved is a stock LoRA: PEFT alone, in a process that cannot import milora_vl, gives the same logits."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from milora_vl import apply_milora, save_adapter
from support.adapter_cases import LLAVA_POLICY, llava_batch, move
from support.programs import run as run_program

STOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "milora_vl":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

folder = sys.argv[1]
model = LlavaForConditionalGeneration.from_pretrained(folder + "/base", dtype=torch.float32)
model = PeftModel.from_pretrained(model, folder + "/adapter").eval()
inputs = load_file(folder + "/inputs.safetensors")
out = {"adapted": model(**inputs).logits, "merged": model.merge_and_unload()(**inputs).logits}
save_file({name: t.detach().contiguous() for name, t in out.items()}, folder + "/logits.safetensors")
"""


def test_stock_peft_gives_the_same_logits_projector_included(tiny_llava, tmp_path: Path) -> None:
    base, _ = tiny_llava()
    base.save_pretrained(tmp_path / "base")
    batch = llava_batch(base)
    model = apply_milora(base, LLAVA_POLICY)
    untouched = model(**batch).logits
    move(model, 0.1)
    save_adapter(model, tmp_path / "adapter")
    save_file(batch, tmp_path / "inputs.safetensors")
    done = run_program(["-c", STOCK, str(tmp_path)])
    assert done.returncode == 0, done.stderr
    expected = model.eval()(**batch).logits
    for name, logits in load_file(tmp_path / "logits.safetensors").items():
        assert torch.allclose(logits, expected, atol=2e-5), name
        assert not torch.allclose(logits, untouched, atol=1e-2), name
