"""GGUF: the command lines of llama.cpp's scripts (stand-ins), the file of a CLIP tower by gguf, Modelfiles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from milora_vl import apply_milora, load_model, save_adapter
from milora_vl.export import Options, export
from milora_vl.export.__main__ import main
from milora_vl.export.gguf import LORA_SCRIPT, MODEL_SCRIPT, modelfile
from milora_vl.models.assemble import compose, processor_for
from support.adapter_cases import move
from support.llama_cpp import calls, write_stand_in
from support.problems import raises_code
from support.vlm_families import model_of, processor_of

RULES = "[{modules: language, method: milora, protect: 0, rank: 4}]"
Factory = Callable[..., tuple[Any, Any]]


def trained(base: Path, folder: Path, rules: str = RULES) -> Path:
    torch.manual_seed(0)
    model = apply_milora(load_model(base)[0], rules)
    move(model, 0.2)
    save_adapter(model, folder)
    return folder


def save(parts: tuple[Any, Any], folder: Path) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vision(tiny_llava: Factory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LLaVA with a CLIP tower, `base`, and an adapter that trained all its towers, `a`."""
    root = tmp_path_factory.mktemp("vision")
    rules = RULES[:-1] + ", {modules: projector, method: full}, {modules: vision, method: lora, rank: 2}]"
    trained(save(tiny_llava(), root / "base"), root / "a", rules)
    return root


@pytest.fixture(scope="module")
def text(tiny_llama: Factory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    trained(save(tiny_llama(), root / "base"), root / "a")
    return root


@pytest.fixture
def llama_cpp(tmp_path: Path) -> Path:
    return write_stand_in(tmp_path / "llama.cpp")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def read(file: Path) -> dict[str, Tensor]:
    gguf = pytest.importorskip("gguf")
    tensors = gguf.GGUFReader(file).tensors
    return {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in tensors}


def test_a_text_model_is_merged_and_given_to_the_script(text: Path, llama_cpp: Path, tmp_path: Path, capsys) -> None:
    words = [str(text / "a"), "--to", "gguf", "--outtype", "q8_0", "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--llama_cpp", str(llama_cpp)]) == 0
    (call,) = calls(llama_cpp)
    assert call["script"] == MODEL_SCRIPT
    assert call["arguments"][:3] == ["--outtype", "q8_0", "--outfile"]
    assert Path(call["arguments"][3]).name == "model-q8_0.gguf"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(call["files"][0])
    assert names(tmp_path / "out") == {"model-q8_0.gguf", "Modelfile"}
    shown = capsys.readouterr().err
    assert f"next: llama-server -m {tmp_path / 'out' / 'model-q8_0.gguf'}\n" in shown
    assert "by rounding" not in shown


@pytest.mark.parametrize(("outtype", "error"), [("f32", 0.0), ("q8_0", 1e-3)])
def test_the_pictures_of_a_llava_with_a_clip_tower(
    vision: Path, llama_cpp: Path, tmp_path: Path, outtype: Any, error: float
) -> None:
    pytest.importorskip("gguf")
    export(vision / "a", "gguf", tmp_path / "out", Options(outtype=outtype, llama_cpp=llama_cpp))
    (call,) = calls(llama_cpp)
    assert "--mmproj" not in call["arguments"]
    config = next(config for config in call["configs"] if "text_config" in config)
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    pictures = read(tmp_path / "out" / f"mmproj-{'f32' if outtype == 'f32' else 'f16'}.gguf")
    export(vision / "a", "merged", tmp_path / "merged")
    state = load_model(tmp_path / "merged")[0].state_dict()
    tower = "model.vision_tower."
    wanted = {
        "mm.2.bias": state["model.multi_modal_projector.linear_2.bias"],
        "v.patch_embd.weight": state[f"{tower}embeddings.patch_embedding.weight"],
        "v.blk.2.ffn_up.weight": state[f"{tower}encoder.layers.2.mlp.fc1.weight"],
    }
    for name, W in wanted.items():
        assert float((pictures[name] - W).abs().max()) <= error * float(W.abs().max()), name
    assert len(pictures) == sum(".language_model" not in n and "lm_head" not in n and "post_l" not in n for n in state)


def test_the_pictures_of_other_families_are_the_scripts(llama_cpp: Path, tmp_path: Path, capsys) -> None:
    processor = processor_of("qwen2_5_vl")
    base = save((model_of("qwen2_5_vl", processor), processor), tmp_path / "base")
    trained(base, tmp_path / "a")
    export(tmp_path / "a", "gguf", tmp_path / "out", Options(llama_cpp=llama_cpp))
    assert ["--mmproj" in call["arguments"] for call in calls(llama_cpp)] == [False, True]
    assert names(tmp_path / "out") == {"model-f16.gguf", "mmproj-f16.gguf", "Modelfile"}
    (llama_cpp / "says-mmproj").write_text("INFO: loading\nERROR: Model X is not supported\n")
    export(tmp_path / "a", "gguf", tmp_path / "language", Options(llama_cpp=llama_cpp))
    assert names(tmp_path / "language") == {"model-f16.gguf", "Modelfile"}
    assert "note: only the language model is written: convert_hf_to_gguf.py says: ERROR" in capsys.readouterr().err


def test_a_tower_that_llama_cpp_has_not_is_left_out_with_a_note(
    tiny_llama: Factory, llama_cpp: Path, tmp_path: Path, capsys
) -> None:
    from milora_vl.models.timm_tower import TimmTower, TimmTowerConfig

    language, tokenizer = tiny_llama()
    tower = TimmTower(TimmTowerConfig.of("tf_efficientnet_lite0", image_size=64, grid=2, levels=(2, 3))).eval()
    half = (0.5, 0.5, 0.5)
    processor = processor_for(tokenizer, image_size=64, patch_size=32, mean=half, std=half)
    base = save((compose(tower, language, tokenizer), processor), tmp_path / "base")
    trained(base, tmp_path / "a")
    export(tmp_path / "a", "gguf", tmp_path / "out", Options(llama_cpp=llama_cpp))
    assert "note: only the language model is written: llama.cpp reads a LLaVA with a CLIP" in capsys.readouterr().err
    assert names(tmp_path / "out") == {"model-f16.gguf", "Modelfile"}


def test_a_lora_is_given_to_its_script_as_stock_peft_of_one_scale(
    vision: Path, llama_cpp: Path, tmp_path: Path, capsys
) -> None:
    words = [str(vision / "a"), "--to", "gguf-lora", "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--llama_cpp", str(llama_cpp)]) == 0
    (call,) = calls(llama_cpp)
    assert call["script"] == LORA_SCRIPT
    assert call["arguments"][:2] == ["--outtype", "f32"]
    assert call["arguments"][4] == "--base"
    base, adapter = call["configs"]
    assert base["model_type"] == "llava"
    assert (adapter["r"], adapter["lora_alpha"], adapter["alpha_pattern"]) == (8, 8, {})
    assert all("language_model" in name for name in adapter["target_modules"])
    assert adapter["modules_to_save"] is None
    said = capsys.readouterr().err
    assert "without 20 modules of other towers, first\n      model.vision_tower" in said
    assert "next: llama-server -m BASE.gguf --lora" in said


def test_a_lora_with_its_base_has_everything_else_in_it(vision: Path, llama_cpp: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    export(vision / "a", "gguf-lora", tmp_path / "out", Options(with_base=True, llama_cpp=llama_cpp))
    assert names(tmp_path / "out") == {"adapter-f32.gguf", "base-f16.gguf", "mmproj-f16.gguf", "Modelfile"}
    assert "ADAPTER ./adapter-f32.gguf" in (tmp_path / "out" / "Modelfile").read_text()
    projector = read(tmp_path / "out" / "mmproj-f16.gguf")["mm.0.weight"]
    model: Any = load_model(vision / "base", adapter=vision / "a")[0].get_base_model()
    assert torch.allclose(projector, model.model.multi_modal_projector.linear_1.weight, atol=1e-3)


def test_a_lora_cannot_hold_language_modules_trained_in_full(text: Path, llama_cpp: Path, tmp_path: Path) -> None:
    rules = "[{modules: language, method: milora, protect: 0, rank: 2}, {modules: '*lm_head', method: full}]"
    trained(text / "base", tmp_path / "a", rules)
    with raises_code("", where="lm_head"):
        export(tmp_path / "a", "gguf-lora", tmp_path / "out", Options(llama_cpp=llama_cpp))
    export(tmp_path / "a", "gguf-lora", tmp_path / "out", Options(with_base=True, llama_cpp=llama_cpp))


def test_what_is_missing_or_fails_is_said_in_words(text: Path, llama_cpp: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with raises_code("", where="--llama_cpp", hint="git clone"):
        export(text / "a", "gguf", out)
    with raises_code("", where="--llama_cpp", message=f"has no {MODEL_SCRIPT}"):
        export(text / "a", "gguf-lora", out, Options(llama_cpp=tmp_path))
    (llama_cpp / "says").write_text("INFO: loading\nNotImplementedError: BPE pre-tokenizer was not recognized\n")
    with raises_code("", where=MODEL_SCRIPT, message="NotImplementedError: BPE pre-tokenizer"):
        export(text / "a", "gguf", out, Options(llama_cpp=llama_cpp))
    for flag, form, options in (
        ("--outtype", "merged", Options(outtype="f16")),
        ("--llama_cpp", "merged", Options(llama_cpp=llama_cpp)),
        ("--dtype", "gguf", Options(dtype=torch.bfloat16)),
    ):
        with raises_code("flag-no-effect", where=flag):
            export(text / "a", form, out, options)
    with raises_code("", where="base"):
        export(text / "a", "gguf", out, Options(base=load_model(text / "base")[0], llama_cpp=llama_cpp))
    assert not out.exists()


def test_a_tokenizer_of_sentencepiece_needs_its_own_file(tiny_llama: Factory, llama_cpp: Path, tmp_path: Path) -> None:
    """Without tokenizer.model the script writes equal scores, and llama.cpp would split texts differently."""
    base = save(tiny_llama(), tmp_path / "base")
    file = base / "tokenizer.json"
    file.write_text(file.read_text().replace('"byte_fallback": false', '"byte_fallback": true'))
    adapter = trained(base, tmp_path / "a")
    with raises_code("", message="has no tokenizer.model"):
        export(adapter, "gguf", tmp_path / "out", Options(llama_cpp=llama_cpp))
    (base / "tokenizer.model").write_bytes(b"sentencepiece")
    export(adapter, "gguf", tmp_path / "out", Options(llama_cpp=llama_cpp))
    assert "tokenizer.model" in calls(llama_cpp)[-1]["files"][0]


def test_the_modelfile_has_the_prompt_format_of_the_training() -> None:
    vicuna = modelfile(["model-f16.gguf", "mmproj-f16.gguf"], "vicuna_v1")
    assert vicuna.startswith("FROM ./model-f16.gguf\nFROM ./mmproj-f16.gguf\n")
    assert '"""{{ if .System }}{{ .System }} {{ end }}USER: {{ .Prompt }} ASSISTANT:{{ .Response }}"""' in vicuna
    assert 'SYSTEM """A chat between a curious user' in vicuna
    qwen = modelfile(["m.gguf"], "qwen")
    assert "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>" in qwen
    assert 'PARAMETER stop "<|im_end|>"' in qwen
    assert "TEMPLATE" not in modelfile(["m.gguf"], "chat_template")
