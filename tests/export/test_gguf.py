"""GGUF files: their tensors by the package gguf, and their answers by llama.cpp where it is installed."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from milora_vl import apply_milora, load_model, save_adapter
from milora_vl.export import export, main
from milora_vl.export.gguf.modelfile import modelfile
from support.adapter_cases import move
from support.gguf_models import KINDS, WORDS, LlamaCpp, text_model, tokenizer_of
from support.problems import raises_code

gguf = pytest.importorskip("gguf")
RULES = "[{modules: language, method: milora, rank: 4}]"
Factory = Callable[..., tuple[Any, Any]]


def trained(base: Path, folder: Path, rules: str = RULES) -> Path:
    torch.manual_seed(0)
    model = apply_milora(load_model(base)[0], rules)
    move(model, 0.2)
    save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def vision(tiny_llava: Factory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LLaVA with a CLIP tower, `base`, and an adapter that trained all its towers, `a`."""
    root = tmp_path_factory.mktemp("vision")
    for part in tiny_llava():
        part.save_pretrained(root / "base")
    rules = RULES[:-1] + ", {modules: projector, method: full}, {modules: vision, method: lora, rank: 2}]"
    trained(root / "base", root / "a", rules)
    return root


@pytest.fixture(scope="module")
def text(tiny_llama: Factory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    for part in tiny_llama():
        part.save_pretrained(root / "base")
    trained(root / "base", root / "a")
    return root


def read(file: Path) -> dict[str, Tensor]:
    tensors = gguf.GGUFReader(file).tensors
    return {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in tensors}


def neighbours(W: Tensor, heads: int) -> Tensor:
    """Rows (half, position) of each head as (position, half), in which llama.cpp turns them."""
    size = W.shape[0] // heads
    order = [h * size + half * (size // 2) + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return W[order]


@pytest.mark.parametrize(("outtype", "error"), [("f32", 0.0), ("f16", 1e-3), ("bf16", 4e-3), ("q8_0", 1e-2)])
def test_the_files_hold_the_merged_model(vision: Path, tmp_path: Path, outtype: Any, error: float) -> None:
    export(vision / "a", "gguf", tmp_path / "out", outtype=outtype)
    export(vision / "a", "merged", tmp_path / "merged")
    model: Any = load_model(tmp_path / "merged")[0]
    state, language = model.state_dict(), read(tmp_path / "out" / f"model-{outtype}.gguf")
    pictures = read(tmp_path / "out" / f"mmproj-{'f32' if outtype == 'f32' else 'f16'}.gguf")
    layer = "model.language_model.layers.1"
    wanted = {
        "token_embd.weight": state["model.language_model.embed_tokens.weight"],
        "output.weight": state["lm_head.weight"],
        "blk.1.attn_q.weight": neighbours(state[f"{layer}.self_attn.q_proj.weight"], 4),
        "blk.1.attn_k.weight": neighbours(state[f"{layer}.self_attn.k_proj.weight"], 2),
        "blk.1.attn_v.weight": state[f"{layer}.self_attn.v_proj.weight"],
        "blk.1.ffn_down.weight": state[f"{layer}.mlp.down_proj.weight"],
        "blk.1.ffn_norm.weight": state[f"{layer}.post_attention_layernorm.weight"],
        "output_norm.weight": state["model.language_model.norm.weight"],
    }
    assert len(language) == sum("language_model" in name or "lm_head" in name for name in state)
    for name, W in wanted.items():
        assert float((language[name] - W).abs().max()) <= error * float(W.abs().max()), name
    tower = "model.vision_tower."
    seen = {
        "mm.2.bias": state["model.multi_modal_projector.linear_2.bias"],
        "v.patch_embd.weight": state[f"{tower}embeddings.patch_embedding.weight"],
        "v.blk.2.ffn_up.weight": state[f"{tower}encoder.layers.2.mlp.fc1.weight"],
    }
    for name, W in seen.items():
        assert float((pictures[name] - W).abs().max()) <= 1e-3 * float(W.abs().max()), name
    assert len(pictures) == sum(".language_model" not in n and "lm_head" not in n and "post_l" not in n for n in state)


def test_a_lora_file_holds_the_update_of_the_language_tower(vision: Path, tmp_path: Path, capsys) -> None:
    assert main([str(vision / "a"), "--to", "gguf-lora", "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "without model.vision_tower" in said
    assert "multi_modal_projector.linear_1" in said
    assert "next: llama-server -m BASE.gguf --lora" in said
    factors = read(tmp_path / "out" / "adapter-f32.gguf")
    tuned, _ = load_model(vision / "base", adapter=vision / "a")
    q = "model.language_model.layers.0.self_attn.q_proj"
    change = tuned.get_base_model().get_submodule(q).get_delta_weight("default")
    got = factors["blk.0.attn_q.weight.lora_b"] @ factors["blk.0.attn_q.weight.lora_a"]
    assert torch.allclose(got, neighbours(change, 4), atol=1e-6)
    assert len(factors) == 2 * 14


def test_a_lora_with_its_base_has_everything_else_in_it(vision: Path, tmp_path: Path) -> None:
    export(vision / "a", "gguf-lora", tmp_path / "out", with_base=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter-f32.gguf", "base-f16.gguf", "mmproj-f16.gguf", "Modelfile"}
    assert "ADAPTER ./adapter-f32.gguf" in (tmp_path / "out" / "Modelfile").read_text()
    projector = read(tmp_path / "out" / "mmproj-f16.gguf")["mm.0.weight"]
    model: Any = load_model(vision / "base", adapter=vision / "a")[0].get_base_model()
    W = model.model.multi_modal_projector.linear_1.weight
    assert torch.allclose(projector, W, atol=1e-3)


def test_the_modelfile_has_the_prompt_format_of_the_training() -> None:
    vicuna = modelfile(["model-f16.gguf", "mmproj-f16.gguf"], "vicuna_v1")
    assert vicuna.startswith("FROM ./model-f16.gguf\nFROM ./mmproj-f16.gguf\n")
    assert '"""{{ if .System }}{{ .System }} {{ end }}USER: {{ .Prompt }} ASSISTANT:{{ .Response }}"""' in vicuna
    assert 'SYSTEM """A chat between a curious user' in vicuna
    qwen = modelfile(["m.gguf"], "qwen")
    assert "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>" in qwen
    assert 'PARAMETER stop "<|im_end|>"' in qwen
    assert "TEMPLATE" not in modelfile(["m.gguf"], "chat_template")


def test_flags_of_other_forms_are_refused(text: Path, tmp_path: Path) -> None:
    with raises_code("flag-no-effect", where="--outtype"):
        export(text / "a", "merged", tmp_path / "out", outtype="f16")
    with raises_code("flag-no-effect", where="--dtype"):
        export(text / "a", "gguf", tmp_path / "out", dtype=torch.bfloat16)
    with raises_code("export-gguf-tokenizer", where="base"):
        export(text / "a", "gguf", tmp_path / "out", base=load_model(text / "base")[0])


def test_what_llama_cpp_would_read_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    cases: dict[str, tuple[Any, Any, str, str]] = {
        "architecture": (gpt_neox(), tokenizer_of("gpt2"), "export-gguf-model", "gpt_neox"),
        "positions": (with_yarn(), tokenizer_of("gpt2"), "export-gguf-model", "yarn"),
        "tokenizer": (text_model("llama"), split_at_commas(), "export-gguf-tokenizer", "splits texts by"),
        "overflow": (with_large_values(), tokenizer_of("gpt2"), "export-gguf-overflow", "f16 cannot hold"),
    }
    for name, (model, tokenizer, code, message) in cases.items():
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / name)
        adapter = trained(tmp_path / name, tmp_path / f"{name}-a")
        with raises_code(code, message=message):
            export(adapter, "gguf", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def gpt_neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=420, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )


def with_yarn() -> nn.Module:
    model: Any = text_model("llama")
    positions = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    model.config.rope_parameters = positions
    return model


def with_large_values() -> nn.Module:
    model: Any = text_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    return model


def split_at_commas() -> Any:
    from tokenizers import pre_tokenizers

    tokenizer = tokenizer_of("gpt2")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(",", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def test_a_lora_cannot_hold_language_modules_trained_in_full(text: Path, tmp_path: Path) -> None:
    rules = "[{modules: language, method: milora, rank: 2}, {modules: '*lm_head', method: full}]"
    trained(text / "base", tmp_path / "a", rules)
    with raises_code("export-gguf-module", where="lm_head"):
        export(tmp_path / "a", "gguf-lora", tmp_path / "out")
    export(tmp_path / "a", "gguf-lora", tmp_path / "out", with_base=True)


def test_a_tower_that_llama_cpp_has_not_is_left_out_with_a_note(tmp_path: Path, capsys) -> None:
    from milora_vl.compose import main as compose
    from milora_vl.tiny import tiny_llama

    for part in tiny_llama():
        part.save_pretrained(tmp_path / "words")
    words = ["--vision", "timm/test_vit", "--vision_weights", "random", "--language", str(tmp_path / "words")]
    assert compose([*words, "--output_dir", str(tmp_path / "base")]) == 0
    trained(tmp_path / "base", tmp_path / "a")
    capsys.readouterr()
    assert main([str(tmp_path / "a"), "--to", "gguf", "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "note: only the language model is written: llama.cpp reads a LLaVA with a CLIP tower" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model-f16.gguf", "Modelfile"}


# By llama.cpp.


@torch.no_grad()
def expected(model: Any, ids: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_answers_as_transformers_does(kind: str, tmp_path: Path) -> None:
    from milora_vl.tiny import tiny_tokenizer

    model, tokenizer = text_model(kind), tiny_tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    adapter = trained(tmp_path / "base", tmp_path / "a")
    export(adapter, "gguf", tmp_path / "whole", outtype="f32")
    export(adapter, "gguf-lora", tmp_path / "lora", with_base=True)
    tuned: Any = load_model(tmp_path / "base", adapter=adapter)[0]
    readers = {
        "whole": LlamaCpp(tmp_path / "whole" / "model-f32.gguf"),
        "lora": LlamaCpp(tmp_path / "lora" / "base-f16.gguf", lora=tmp_path / "lora" / "adapter-f32.gguf"),
    }
    base: Any = load_model(tmp_path / "base")[0]
    for prompt in ("Why?", "What is 1 + 1? " * 12):  # longer than the positions that the llama3 of the test was made of
        ids = tokenizer(prompt).input_ids
        wanted = expected(tuned, ids)
        got = {name: reader.after(prompt) for name, reader in readers.items()}
        differences = {name: float((values - wanted).abs().max()) for name, values in got.items()}
        print(f"{kind}, {len(ids)} tokens: largest difference of a log probability {differences}")
        assert differences["whole"] < 2e-3
        assert differences["lora"] < 5e-3
        assert float((expected(base, ids) - wanted).abs().max()) > 0.05


@pytest.mark.slow
def test_llama_cpp_writes_the_same_text_as_transformers_with_smollm2(tmp_path: Path) -> None:
    adapter = trained(Path("smollm2"), tmp_path / "a")
    prompt = "The capital of France is"
    model: Any
    model, tokenizer = load_model("smollm2", adapter=adapter)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = tokenizer.decode(model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :])
    export(adapter, "gguf", tmp_path / "out", outtype="f32", base="smollm2")
    assert LlamaCpp(tmp_path / "out" / "model-f32.gguf").text(prompt, 16) == written


@pytest.mark.parametrize("kind", ["gpt2", "smollm", "qwen2", "llama3", "llama"])
def test_llama_cpp_splits_texts_as_the_tokenizer_does(kind: str, tmp_path: Path) -> None:
    tokenizer, model = tokenizer_of(kind), text_model("llama-tied")
    model.resize_token_embeddings(len(tokenizer) + 3)  # rows without a token, as HF's LLaVA has them
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    export(trained(tmp_path / "base", tmp_path / "a"), "gguf", tmp_path / "out")
    reader = LlamaCpp(tmp_path / "out" / "model-f16.gguf")
    for sentence in (WORDS, "a", "Quick: 2026 foxes don't 漢字 stop</s>", " two  blanks"):
        assert reader.ids(sentence) == tokenizer(sentence).input_ids, sentence


@torch.no_grad()
def test_llama_cpp_sees_the_picture(vision: Path, tmp_path: Path) -> None:
    """Current llama.cpp puts the class token behind the patches and then leaves out the first row: compared as such."""
    export(vision / "a", "gguf", tmp_path / "out", outtype="f32")
    tuned: Any
    tuned, processor = load_model(vision / "base", adapter=vision / "a")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    picture, file = Image.fromarray(pixels), io.BytesIO()
    picture.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    reader = LlamaCpp(tmp_path / "out" / "model-f32.gguf", mmproj=tmp_path / "out" / "mmproj-f32.gguf")
    got = reader.about_picture(url, "What is it?")
    values = processor.image_processor(picture, return_tensors="pt").pixel_values
    differences = {}
    for order in ("class token first", "class token last"):
        features = features_of(tuned, values, is_last=order.endswith("last"))
        differences[order] = float((got - answer_to(tuned, processor, features)).abs().max())
    print(f"largest difference of a log probability: {differences}")
    assert min(differences.values()) < 2e-3
    assert max(differences.values()) > 1e-2


def features_of(tuned: Any, pixels: Tensor, *, is_last: bool) -> Tensor:
    """The projected features (patches, dim) of layer -2, with the class token before or behind the patches."""
    model = tuned.get_base_model().model
    tower = model.vision_tower
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    token = tower.embeddings.class_embedding.expand(1, 1, -1)
    rows = torch.cat([patches, token] if is_last else [token, patches], dim=1)
    hidden = tower.pre_layrnorm(rows + tower.embeddings.position_embedding.weight)
    for layer in tower.encoder.layers[:-1]:
        after = layer(hidden, attention_mask=None)
        hidden = after[0] if isinstance(after, tuple) else after
    return model.multi_modal_projector(hidden[:, 1:])[0]


def answer_to(tuned: Any, processor: Any, features: Tensor) -> Tensor:
    """The log probabilities of the first token of an answer about a picture with these features."""
    before = processor.tokenizer("USER: ").input_ids
    behind = processor.tokenizer("What is it? ASSISTANT:", add_special_tokens=False).input_ids
    embed = tuned.get_input_embeddings()
    rows = [embed(torch.tensor(before)), features, embed(torch.tensor(behind))]
    return tuned(inputs_embeds=torch.cat(rows)[None]).logits[0, -1].log_softmax(-1)
