"""Models by every kind of name, smol-llava, projectors, devices, and what a user reads where one cannot be loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from milora_vl.interop.load_model import load_model
from milora_vl.models.base import config_of, folder_of
from milora_vl.models.devices import device_named, fastest_dtype
from milora_vl.models.llava import compose, image_token_id, image_tokens, processor_for
from milora_vl.models.projector import load_projector, projector_of, read_projector, save_projector
from milora_vl.models.timm_tower import TimmTower, TimmTowerConfig
from milora_vl.train.plan import make_run
from support.fake_hub import FakeHub, running
from support.machine import fastest
from support.plans import plan, section, settings
from support.problems import raises_code

ASKED = """
import sys
from milora_vl.common.errors import UserError
from milora_vl.models.base import config_of, load_processor
from milora_vl.models.loading import load_weights

for read in (config_of, load_weights, load_processor):
    try:
        read(sys.argv[1])
    except UserError as error:
        print(error)
"""


def test_a_mistyped_id_is_not_a_hub_that_does_not_answer() -> None:
    with running(FakeHub()) as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}  # read when the client is imported
        words = [sys.executable, "-c", ASKED, "llava-hf/llava-1.5-7c-hf"]
        done = subprocess.run(words, env=env, capture_output=True, text=True)
    said = "the model hub has no llava-hf/llava-1.5-7c-hf, or you may not read it\ncheck the name; a private or gated "
    assert done.stdout.count(said) == 3, done.stdout + done.stderr


# Packages that are not installed.
HIDDEN = """
import importlib.util, sys

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "sentencepiece" else find(name, package)
sys.modules["sentencepiece"] = None
"""


def test_a_tokenizer_model_alone_names_the_packages_that_read_it(tiny_llama, tmp_path: Path) -> None:
    """A Vicuna folder, whose tokenizer has no other file."""
    common = pytest.importorskip("mistral_common")
    tiny_llama()[0].save_pretrained(tmp_path)
    shutil.copy(Path(common.__file__).parent / "data" / "tokenizer.model.v1", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    said = subprocess.run([sys.executable, "-c", HIDDEN + ASKED, str(tmp_path)], capture_output=True, text=True).stdout
    assert "tokenizer.json needs:  pip install sentencepiece protobuf" in said


CPU = torch.device("cpu")


def test_names_mean_devices_and_dtypes() -> None:
    assert device_named("cpu") == CPU
    assert device_named(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert fastest_dtype(torch.device("mps")) == torch.float32


@pytest.mark.parametrize("answer", ["bfloat16", "float32"])
def test_the_fastest_dtype_of_a_recipe_is_settled_for_this_machine(answer: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("{model: tiny, dtype: fastest, train: {use_cpu: true}}")
    with fastest(answer):
        found = plan(["--recipe", str(recipe), "--rank", "4", "--output_dir", str(tmp_path / "run")])
        assert fastest_dtype(CPU) == getattr(torch, answer)
    assert found.recipe.dtype == answer
    assert found.launch.train.get("bf16", False) == (answer == "bfloat16")


def test_bf16_on_a_cpu_that_emulates_it_is_warned_of(tmp_path: Path) -> None:
    words = f"--model tiny --rank 4 --bf16 True --device cpu --output_dir {tmp_path / 'run'}"
    for answer, warns in (("float32", True), ("bfloat16", False)):
        with fastest(answer):
            found = make_run(settings(words), is_started=True)
        assert any("bf16 is emulated" in warning for warning in found.warnings) == warns


def test_a_resumed_run_keeps_its_dtype_whatever_is_the_fastest_here(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("{model: tiny, dtype: float16}")
    words = ["--model", "tiny", "--dtype", "fastest", "--device", "cpu", "--output_dir", str(run)]
    again = ["--resume_from_checkpoint", "auto"]
    assert section([*words, *again]).dtype != torch.float16  # it begins again
    (run / "checkpoint-3").mkdir()
    assert section([*words, *again]).dtype == torch.float16
    assert section(words).dtype != torch.float16


Factory = Callable[..., tuple[Any, Any]]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in projector_of(model).state_dict().items()}


def test_saved_and_loaded_it_is_the_same(tiny_llava: Factory, tmp_path: Path) -> None:
    first, second = tiny_llava(0)[0], tiny_llava(1)[0]
    file = save_projector(first, tmp_path)
    assert sorted(load_file(file))[0] == "multi_modal_projector.linear_1.bias"
    load_projector(second, tmp_path)
    for name, tensor in weights(first).items():
        assert torch.equal(weights(second)[name], tensor)


def test_a_state_dict_of_the_whole_model_will_do(tiny_llava: Factory, tmp_path: Path) -> None:
    model = tiny_llava()[0]
    save_projector(model, tmp_path, model.state_dict())
    assert read_projector(tmp_path).keys() == weights(model).keys()


def test_llavas_own_file_is_read(tiny_llava: Factory, tmp_path: Path) -> None:
    first, second = tiny_llava(0)[0], tiny_llava(1)[0]
    names = {"linear_1": "0", "linear_2": "2"}
    original = {
        f"model.mm_projector.{names[name.split('.')[0]]}.{name.split('.')[1]}": tensor
        for name, tensor in weights(first).items()
    }
    torch.save(original, tmp_path / "mm_projector.bin")
    load_projector(second, tmp_path / "mm_projector.bin")
    assert torch.equal(weights(second)["linear_2.weight"], weights(first)["linear_2.weight"])


def test_what_does_not_fit_is_refused(tiny_llava: Factory, tiny_llama: Factory, tmp_path: Path) -> None:
    model = tiny_llava()[0]
    torch.save({"model.mm_projector.0.weight": torch.zeros(3, 3)}, tmp_path / "other.bin")
    with raises_code("", message="do not fit the projector"):
        load_projector(model, tmp_path / "other.bin")
    torch.save({"lm_head.weight": torch.zeros(1)}, tmp_path / "none.bin")
    with raises_code("", message="no projector weights in this file"):
        load_projector(model, tmp_path / "none.bin")
    with raises_code("", says="projector"):
        load_projector(model, tmp_path)
    with raises_code("", message="has no projector"):
        projector_of(tiny_llama()[0])


@pytest.fixture(scope="module")
def composed(tiny_llama):
    """A small LLaVA of a timm network with random weights and the tiny Llama."""
    config = TimmTowerConfig.of("tf_efficientnet_lite0", image_size=64, grid=2, levels=(2, 3))
    language, tokenizer = tiny_llama()
    model = compose(TimmTower(config).eval(), language, tokenizer)
    half = (0.5, 0.5, 0.5)
    return model, processor_for(tokenizer, image_size=64, patch_size=32, mean=half, std=half)


def test_a_composed_model_takes_pictures_and_reloads_with_the_same_logits(composed, tmp_path):
    model, processor = composed
    batch = processor(
        images=Image.new("RGB", (90, 50), "red"), text="USER: <image>\nHi ASSISTANT:", return_tensors="pt"
    )
    assert int((batch["input_ids"] == image_token_id(model.config)).sum()) == image_tokens(model.config) == 4
    logits = model(**batch).logits
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, its_processor = load_model(tmp_path)
    torch.testing.assert_close(again(**batch).logits, logits)
    assert its_processor.num_additional_image_tokens == 0


@pytest.mark.slow
def test_smol_llava_is_made_once_and_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path))
    model, _ = load_model("smol-llava")
    assert model.name_or_path == str(folder_of("smol-llava"))
    assert image_tokens(model.config) == 16
    made = list((tmp_path / "models").iterdir())
    load_model("smol-llava")
    assert list((tmp_path / "models").iterdir()) == made


@pytest.mark.slow
def test_its_language_model_loads_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path))
    model, tokenizer = load_model("smollm2")
    assert model.name_or_path == str(folder_of("smollm2"))
    assert model.config.vocab_size == config_of("smollm2").vocab_size == len(tokenizer)
    assert tokenizer.chat_template
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert not hasattr(model.config, "quantization_config")


def test_without_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    for name, value in {"MILORA_CACHE": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    with raises_code("asset-download", message="cannot download", hint="network connection"):
        load_model("smol-llava")
