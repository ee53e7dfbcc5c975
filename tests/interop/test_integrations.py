"""Code of others that calls get_peft_model; LLaVA's own training, unchanged (slow)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import llava_recipes
from milora_vl import apply_milora, calibration_texts, load_adapter, save_adapter
from milora_vl.common.errors import UserError
from milora_vl.interop.llava import main as llava_main
from milora_vl.interop.llava import renamed_flags
from milora_vl.interop.llava_layout import KNOWN_KEYS
from milora_vl.interop.replace import get_peft_model_replaced, main
from milora_vl.models.tiny import tiny_llava
from support.adapter_cases import anchors, one_rule, train_steps
from support.calibrated import directions, leaks
from support.documented import ROOT
from support.launched import in_two_processes, needs_zero3
from support.llava_oracle import llama_tokenizer
from support.problems import raises_code, raises_problem

SCRIPT = """
import sys
from peft import LoraConfig, get_peft_model
from milora_vl.models.tiny import tiny_llama

config = LoraConfig(r=int(sys.argv[1]), target_modules=["q_proj"], task_type="CAUSAL_LM")
model = get_peft_model(tiny_llama()[0], config)
model.save_pretrained(sys.argv[2])
"""


def test_a_script_runs_with_milora_as_its_lora(tmp_path: Path, capsys) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    stock = peft.get_peft_model
    assert main(["--protect", "0", str(script), "4", str(tmp_path / "out")]) == 0
    assert peft.get_peft_model is stock
    assert (tmp_path / "out" / "milora.json").is_file()
    assert "on 2 modules" in capsys.readouterr().err
    with pytest.raises(UserError) as error:
        main([str(script), "65", str(tmp_path / "out")])
    assert "65" in error.value.first.message
    assert {problem.code for problem in error.value.problems} == {"policy-rank-too-large"}
    for run in (main, llava_main):
        with pytest.raises(UserError) as error:
            run([str(tmp_path / "nothing.py")])
        assert error.value.problems[0].message == "no such script" or error.value.first.code == "package-missing"


def test_modules_that_imported_the_function_before_are_reached(tiny_llama, monkeypatch) -> None:
    from support import adapter_cases

    monkeypatch.setattr(adapter_cases, "get_peft_model", peft.get_peft_model, raising=False)
    with get_peft_model_replaced("support.adapter_cases", protect=0):
        model = adapter_cases.get_peft_model(tiny_llama()[0], LoraConfig(r=2, target_modules=["q_proj"]))
    assert model.milora_targets[0].method == "milora"


def test_an_adapter_of_ours_that_the_code_loads_keeps_its_anchor(tiny_llama, tmp_path: Path, capsys) -> None:
    save_adapter(apply_milora(tiny_llama()[0], one_rule()), tmp_path / "ours")
    stock = PeftModel.from_pretrained
    with get_peft_model_replaced(protect=0):
        model = PeftModel.from_pretrained(tiny_llama()[0], str(tmp_path / "ours"), is_trainable=True)
        assert type(load_adapter(tiny_llama()[0], tmp_path / "ours", is_trainable=True)) is type(model)
        plain = PeftModel.from_pretrained(tiny_llama()[0], str(tmp_path / "ours"))
    assert PeftModel.from_pretrained == stock
    assert "continues training as a MiLoRA adapter" in capsys.readouterr().err
    assert type(plain).__module__.startswith("peft")
    fixed = anchors(model)
    assert fixed
    train_steps(model, {"input_ids": torch.arange(5, 15)[None]})
    assert all(torch.equal(anchor, anchors(model)[name]) for name, anchor in fixed.items())


def test_names_shared_with_the_vision_tower_hit_the_language_alone(tiny_llava, capsys) -> None:
    with get_peft_model_replaced(protect=0):
        model = peft.get_peft_model(tiny_llava()[0], LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert {t.tower for t in model.milora_targets} == {"language"}
    assert "6 modules of the vision tower, matched by name only, stay frozen" in capsys.readouterr().err


@pytest.mark.parametrize("targets", [r".*(language|vision).*\.q_proj", "all-linear", None])
def test_vision_modules_that_a_pattern_or_full_paths_choose_stay(tiny_llava, targets: str | None, capsys) -> None:
    """LLaMA-Factory lists full paths with `freeze_vision_tower: false`, ms-swift writes a pattern."""
    base = tiny_llava()[0]
    chosen = targets or [path for path, _ in base.named_modules() if path.endswith("q_proj")]
    config = LoraConfig(r=2, target_modules=chosen)
    with get_peft_model_replaced(protect=0):
        model = peft.get_peft_model(base, config)
    assert {"language", "vision"} <= {t.tower for t in model.milora_targets}
    assert "stay frozen" not in capsys.readouterr().err
    if targets is None:
        with get_peft_model_replaced(), raises_problem(hint="protect=0"):
            peft.get_peft_model(tiny_llava()[0], config)


SAVES = """
import sys
from pathlib import Path
import llava_user

llava_user.train()
sys.exit(0)
"""


@pytest.mark.parametrize("spelling", ["--output_dir=", "--output_dir "])
def test_the_launcher_of_llava_trims_the_config_and_reaches_the_named_modules(
    tmp_path: Path, monkeypatch, spelling: str
) -> None:
    pytest.importorskip("llava")
    (tmp_path / "train.py").write_text(SAVES, encoding="utf-8")
    (tmp_path / "llava_user.py").write_text(
        "from peft import LoraConfig, get_peft_model\nfrom milora_vl.models.tiny import tiny_llama\n\n"
        "def train():\n    config = LoraConfig(r=4, target_modules=['q_proj'])\n"
        f"    get_peft_model(tiny_llama()[0], config).save_pretrained({str(tmp_path / 'out')!r})\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llava_user", raising=False)
    with pytest.raises(SystemExit):
        llava_main(["--in", "llava_user", str(tmp_path / "train.py"), *f"{spelling}{tmp_path / 'out'}".split()])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config.keys() <= KNOWN_KEYS
    assert config["r"] == 4  # protected: B alone


TRAIN = """
import sys
import torch
import llava.train.train as llava

kept = []

class Keeping(llava.LLaVATrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        kept.append(self.model)

llava.LLaVATrainer = Keeping
llava.train()
model = kept[0].eval().float()
ids = torch.arange(5, 15)[None]
ids[0, 3] = -200
images = torch.ones(1, 3, 32, 32)
logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), images=images).logits
torch.save(logits.detach(), sys.argv[0] + ".logits")
"""


@pytest.mark.slow
def test_llavas_own_training_runs_resumes_and_its_own_classes_load_what_it_saved(tmp_path: Path, tiny_records) -> None:
    pytest.importorskip("llava")
    flags, out = llava_flags(tmp_path, tiny_records), tmp_path / "llava-lora"
    (tmp_path / "train.py").write_text(TRAIN, encoding="utf-8")
    launcher = [sys.executable, "-W", "ignore", "-m", "milora_vl.interop.llava", "--protect", "0.5"]
    words = [*launcher, str(tmp_path / "train.py"), *flags, "--save_strategy", "steps", "--save_steps", "1"]
    results = []
    for _ in range(2):
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr
        results.append(torch.load(tmp_path / "train.py.logits"))
        last = sorted(out.glob("checkpoint-*"))[-1]
        assert last.name != "checkpoint-1"
        shutil.rmtree(last)  # LLaVA's train() resumes from the checkpoint before it
    assert torch.allclose(*results, atol=1e-5)
    assert "milora: protected MiLoRA on 14 modules: new directions only; 50 % of what ordinary" in done.stderr
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert config.keys() <= KNOWN_KEYS
    assert config["r"] == 4
    assert torch.allclose(_as_llava_loads(tmp_path, out), results[1], atol=1e-4)


@pytest.mark.slow
def test_axolotl_trains_its_example_off_the_protected_inputs(tiny_llama, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("axolotl")
    from axolotl.cli.train import do_cli
    from axolotl.utils.dict import DictDefault

    from milora_vl.interop.axolotl import MiloraPlugin

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    base, tokenizer = tiny_llama()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    base.save_pretrained("base")
    tokenizer.save_pretrained("base")
    said = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Red."}]
    (tmp_path / "train.jsonl").write_text((json.dumps({"messages": said}) + "\n") * 32)
    small = {"base_model": "base", "lora_r": 2, "lora_alpha": 2, "max_steps": 4, "learning_rate": 0.01}
    do_cli(str(ROOT / "examples" / "axolotl.yaml"), **small, bf16=False, lr_scheduler="constant", logging_steps=1)
    rules = [{"modules": "language", "method": "milora", "rank": 2}]
    protected = directions(tiny_llama()[0], rules, calibration_texts(tiny_llama()[0]))
    ours = load_adapter(tiny_llama()[0], "runs/axolotl")
    ids = torch.arange(5, 15)[None]
    before, after = base(ids).logits, ours(ids).logits
    assert (after - before).abs().max() > 1e-3
    stock = PeftModel.from_pretrained(base, "runs/axolotl")
    assert torch.equal(stock(ids).logits, after)
    assert max(leaks(stock, protected)) < 1e-5
    with raises_code("", where="rl"):  # DPO asks so
        MiloraPlugin().load_adapter(base, DictDefault(adapter="milora"), config_only=True)
    with raises_code("", where="lora_mlp_kernel"):
        MiloraPlugin().load_adapter(base, DictDefault(adapter="milora", lora_mlp_kernel=True))
    assert MiloraPlugin().load_adapter(base, DictDefault(adapter="mora")) is None


def llava_flags(folder: Path, records: list[dict[str, Any]]) -> list[str]:
    """Write models, pictures and records for LLaVA's `train()`; returns its flags. The result is in `llava-lora`."""
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionModel

    torch.manual_seed(0)
    CLIPVisionModel(tiny_llava()[0].config.vision_config).save_pretrained(folder / "clip")
    small = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    small.save_pretrained(folder / "clip")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlavaLlamaForCausalLM(LlavaConfig(vocab_size=32000, **sizes)).save_pretrained(folder / "vicuna")
    llama_tokenizer("legacy").save_pretrained(folder / "vicuna")
    (folder / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (40, 30), (30 * i, 10, 200)).save(folder / "images" / f"{i}.png")
    (folder / "train.json").write_text(json.dumps(records), encoding="utf-8")
    return f"""--lora_enable True --lora_r 4 --lora_alpha 8 --lora_dropout 0 --mm_projector_lr 2e-3
        --model_name_or_path {folder}/vicuna --version v1 --data_path {folder}/train.json
        --image_folder {folder}/images --vision_tower {folder}/clip
        --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False
        --mm_use_im_patch_token False --image_aspect_ratio pad --group_by_modality_length True --bf16 False
        --output_dir {folder}/llava-lora --num_train_epochs 1 --per_device_train_batch_size 4 --evaluation_strategy no
        --learning_rate 2e-3 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
        --logging_steps 1 --model_max_length 2048 --gradient_checkpointing True --lazy_preprocess True
        --report_to none --use_cpu True""".split()


# On CPUs, HF skips what it does for DeepSpeed on GPUs.
SHARDED = """
import deepspeed
from milora_vl.interop.llava import milora_in_llava

deepspeed.init_distributed("gloo")
with milora_in_llava():
    from llava.train.train import train
    train()
"""


@pytest.mark.slow
@needs_zero3
def test_llavas_own_training_under_zero_3_is_that_under_zero_2(tmp_path: Path, tiny_records) -> None:
    pytest.importorskip("llava")
    flags, out = llava_flags(tmp_path, tiny_records), tmp_path / "llava-lora"
    torch.manual_seed(0)
    projector = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)).state_dict()
    torch.save({f"mm_projector.{name}": weight for name, weight in projector.items()}, tmp_path / "projector.bin")
    (tmp_path / "train.py").write_text(SHARDED, encoding="utf-8")
    flags += ["--pretrain_mm_mlp_adapter", str(tmp_path / "projector.bin"), "--save_strategy", "no"]
    trained = []
    for stage in ("zero2", "zero3"):
        (tmp_path / f"{stage}.json").write_text(llava_recipes.read(stage, "deepspeed"), encoding="utf-8")
        words = [str(tmp_path / "train.py"), *renamed_flags(flags), "--deepspeed", str(tmp_path / f"{stage}.json")]
        codes, printed = in_two_processes(words, tmp_path)
        assert codes == [0, 0], printed[0][-3000:]
        whole = torch.load(out / "non_lora_trainables.bin", weights_only=True)
        trained.append({**load_file(out / "adapter_model.safetensors"), **whole})
        shutil.rmtree(out)
    moved = trained[0]["base_model.model.model.mm_projector.0.weight"] - projector["0.weight"]
    assert float(moved.abs().max()) > 1e-3
    torch.testing.assert_close(trained[1], trained[0], atol=5e-4, rtol=0)


@torch.no_grad()
def _as_llava_loads(root: Path, folder: Path) -> torch.Tensor:
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    config = LlavaConfig.from_pretrained(folder)
    model = LlavaLlamaForCausalLM.from_pretrained(root / "vicuna", config=config, dtype=torch.float32)
    stored = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    assert any("mm_projector" in key for key in stored)
    model.load_state_dict({key.removeprefix("base_model.model."): t for key, t in stored.items()}, strict=False)
    model.get_vision_tower().load_model()
    model.get_vision_tower().half().float()  # LLaVA's train() rounds the tower to float16 without --bf16
    tuned = PeftModel.from_pretrained(model, folder).eval()
    ids = torch.arange(5, 15)[None]
    ids[0, 3] = -200
    images = torch.ones(1, 3, 32, 32)
    return tuned(input_ids=ids, attention_mask=torch.ones_like(ids), images=images).logits


def test_protect_calibrates_and_refuses_a_base_whose_class_cannot_write(tiny_llama, monkeypatch) -> None:
    base = tiny_llama()[0]

    def generate(*_: object, **__: object) -> None:
        raise TypeError("forward() got an unexpected keyword argument 'cache'")

    monkeypatch.setattr(base, "generate", generate)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    with get_peft_model_replaced(protect=0.95), raises_code("", message="argument 'cache'"):
        peft.get_peft_model(base, lora)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    base = T5ForConditionalGeneration(T5Config(vocab_size=99, **sizes))  # an encoder needs its own input
    with get_peft_model_replaced(protect=0.95), raises_code("", message="T5"):
        peft.get_peft_model(base, LoraConfig(r=2, target_modules=["q"]))
    with raises_code("", where="protect"), get_peft_model_replaced(protect=95):
        pass
    with get_peft_model_replaced(protect=0.5):
        assert peft.get_peft_model(tiny_llama()[0], lora).milora_protection
