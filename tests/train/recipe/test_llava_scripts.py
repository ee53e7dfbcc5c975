"""LLaVA's training scripts with only the program's name changed: planned at real shapes, run on tiny parts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llava_recipes
from milora_vl.models.base import config_of
from milora_vl.train.__main__ import main
from support.launched import needs_deepspeed
from support.problems import raises_code

SCRIPTS: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parents[2] / "reference" / "llava_scripts.json").read_text(encoding="utf-8")
)["scripts"]
# What each script trains, in numbers that are known: r = 128 on 13B (40 layers), r = 64 on 7B, the projector.
COUNTS = {
    "scripts/v1_5/finetune_lora.sh": "adapters 272,629,760, in full 31,467,520",
    "scripts/v1_5/finetune_task_lora.sh": "adapters 272,629,760, in full 31,467,520",
    "scripts/v1_5/finetune.sh": "adapters 0, in full 13,047,987,200",
    "scripts/v1_5/pretrain.sh": "adapters 0, in full 31,467,520",
    "scripts/finetune_qlora.sh": "adapters 87,031,808, in full 20,979,712",
}


@pytest.fixture
def folder(tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder as the scripts expect it, with the tiny data where theirs lies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "scripts").mkdir()
    for name in ("zero2", "zero3"):
        (tmp_path / "scripts" / f"{name}.json").write_text(llava_recipes.read(name, "deepspeed"), encoding="utf-8")
    return tmp_path


def words(script: str, folder: Path, **changed: str) -> list[str]:
    """The script's command line on the tiny data; nothing is logged elsewhere (wandb is not installed)."""
    data = folder / "data" / ("captions.json" if "pretrain.sh" in script else "train.json")
    flags = {
        **SCRIPTS[script],
        "--report_to": "none",
        "--data_path": str(data),
        "--image_folder": str(folder / "data/images"),
    }
    flags |= {f"--{name}": value for name, value in changed.items()}
    return [word for flag, value in flags.items() if value for word in (flag, value)]


def captions(folder: Path) -> None:
    records = [r for r in json.loads((folder / "data" / "train.json").read_text()) if "image" in r]
    for record in records:
        record["conversations"] = record["conversations"][:2]
    (folder / "data" / "captions.json").write_text(json.dumps(records))


# The first two are planned alike.
@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.slow if "task" in name else ()) for name in SCRIPTS]
)
def test_every_script_is_planned_at_its_real_shapes(script: str, folder: Path, capsys: Any) -> None:
    captions(folder)
    projector = SCRIPTS[script].get("--pretrain_mm_mlp_adapter")
    if projector:
        Path(projector).parent.mkdir(parents=True)
        torch.save({"model.mm_projector.0.weight": torch.zeros(1)}, projector)
    vicuna = Path("checkpoints/vicuna-v1-3-7b")
    vicuna.mkdir(parents=True)
    config_of("lmsys/vicuna-7b-v1.5").save_pretrained(vicuna)
    if SCRIPTS[script].get("--bits"):
        pytest.importorskip("bitsandbytes")
    assert main([*words(script, folder), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert COUNTS[script] in shown
    assert shown.count("warning:") <= 2  # tf32 on a CPU; the tower of a LLaVA stays its own
    assert "GiB per device" in shown
    assert ("ZeRO-2" if "zero2" in SCRIPTS[script]["--deepspeed"] else "ZeRO-3") in shown


@pytest.fixture
def parts(tiny_llava: Callable[..., Any], tiny_llama: Callable[..., Any], folder: Path) -> dict[str, str]:
    """A language model without <image>, and a CLIP tower, as folders."""
    from transformers import CLIPVisionModel

    from milora_vl.models.tiny import tiny_tokenizer

    language = tiny_llama()[0]
    language.resize_token_embeddings(260)  # as Vicuna, which has no <image>
    language.save_pretrained(folder / "vicuna")
    tiny_tokenizer().save_pretrained(folder / "vicuna")
    tower = CLIPVisionModel(tiny_llava()[0].config.vision_config)
    tower.save_pretrained(folder / "clip")
    return {"model_name_or_path": str(folder / "vicuna"), "vision_tower": str(folder / "clip")}


def tiny_run(script: str, folder: Path, **changed: str) -> Path:
    """Run a script on tiny parts, for two steps in one process; returns its folder."""
    small = {"per_device_train_batch_size": "4", "lora_r": "", "lora_alpha": "", "dataloader_num_workers": "0"}
    lora = {"lora_r": "4", "lora_alpha": "8"} if "--lora_r" in SCRIPTS[script] else {}
    one = {"deepspeed": "", "max_steps": "2", "use_cpu": "True", "disable_tqdm": "True"}
    assert main(words(script, folder, **{**small, **lora, **one, **changed})) == 0
    return folder / changed.get("output_dir", SCRIPTS[script]["--output_dir"])


def test_both_stages_from_vicuna_and_clip_and_stock_peft_loads_what_comes_out(
    parts: dict[str, str], folder: Path, capfd: Any
) -> None:
    captions(folder)
    first = tiny_run("scripts/v1_5/pretrain.sh", folder, **parts)
    assert "trains only the projector" in capfd.readouterr().err
    stage1 = load_file(first / "mm_projector.safetensors")
    for_llava = torch.load(first / "mm_projector.bin", weights_only=True)
    assert torch.equal(for_llava["model.mm_projector.2.bias"], stage1["multi_modal_projector.linear_2.bias"])

    projector = {"pretrain_mm_mlp_adapter": str(first / "mm_projector.bin")}
    second = tiny_run("scripts/v1_5/finetune_lora.sh", folder, **parts, **projector)
    shown = capfd.readouterr().err
    assert "composed from" in shown
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    config = json.loads((second / "adapter_config.json").read_text())
    assert config["r"] == 4  # protected: A is fixed
    base = AutoModelForImageTextToText.from_pretrained(config["base_model_name_or_path"])
    started = base.model.multi_modal_projector.state_dict()
    assert torch.equal(started["linear_1.weight"], stage1["multi_modal_projector.linear_1.weight"])
    tuned = PeftModel.from_pretrained(base, second)
    assert not torch.equal(
        tuned.base_model.model.model.multi_modal_projector.linear_1.modules_to_save["default"].weight,
        stage1["multi_modal_projector.linear_1.weight"],
    )
    shutil.rmtree(second)
    tiny_run("scripts/v1_5/finetune_lora.sh", folder, **parts, **projector)
    assert "composed before from" in capfd.readouterr().err


def test_a_whole_model_in_llavas_layout_is_a_base(tiny_llava: Callable[..., Any], folder: Path, capfd: Any) -> None:
    from milora_vl import load_model
    from support.llava_oracle import original_llava

    hf, processor = tiny_llava()
    original_llava(hf, processor, folder).save_pretrained(folder / "llava-v1.5-tiny")
    processor.tokenizer.save_pretrained(folder / "llava-v1.5-tiny")
    config = json.loads((folder / "llava-v1.5-tiny" / "config.json").read_text())
    (folder / "llava-v1.5-tiny" / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    run = tiny_run("scripts/v1_5/finetune_task_lora.sh", folder, model_name_or_path=str(folder / "llava-v1.5-tiny"))
    assert "from LLaVA's original layout to Hugging Face's" in capfd.readouterr().err
    base = json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"]
    model, _ = load_model(base)
    ids = torch.tensor([[257, 10, 11, 12]])
    torch.testing.assert_close(model(input_ids=ids).logits[..., :260], hf(input_ids=ids).logits[..., :260])
    read_from = ["--projector_weights", str(folder / "llava-v1.5-tiny"), "--dry-run"]
    assert main(["--model", "tiny", *read_from]) == 0  # its projector serves other models too


@pytest.mark.slow
@needs_deepspeed
def test_parts_are_composed_whole_for_a_run_that_shares_its_weights_out(parts: dict[str, str], folder: Path) -> None:
    """LLaVA's scripts say ZeRO-3, and start from parts."""
    changed = {
        "pretrain_mm_mlp_adapter": "",
        "per_device_train_batch_size": "4",
        "lora_r": "4",
        "max_steps": "1",
        "bf16": "",
    }
    flags = words(
        "scripts/v1_5/finetune_lora.sh", folder, **parts, **changed, use_cpu="True", dataloader_num_workers="0"
    )
    done = subprocess.run([sys.executable, "-m", "milora_vl.train", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (base,) = filter(Path.is_dir, (folder / "cache" / "models").iterdir())
    made, given = load_file(base / "model.safetensors"), load_file(folder / "vicuna" / "model.safetensors")
    name = "layers.0.mlp.up_proj.weight"
    assert torch.equal(next(made[key] for key in made if key.endswith(name)), given[f"model.{name}"])


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        (
            {"deepspeed": "./scripts/zero9.json"},
            "",
            r"--deepspeed: .*zero9.json(.|\n)*name one of these",
        ),
        ({"report_to": "wandb"}, "tracker-unavailable", r"--report_to: WandbCallback requires wandb"),
        ({"report_to": "tensorbord"}, "tracker-unavailable", r"--report_to: tensorbord is not supported"),
        ({"pretrain_mm_mlp_adapter": "none.bin"}, "", r"none.bin: no projector weights"),
        ({"mm_projector_type": "linear"}, "flag-unsupported", r"only mlp2x_gelu"),
        ({"vision_tower": "./nowhere"}, "model-unknown", r"nowhere"),
    ],
)
def test_what_is_not_there_is_told_before_anything_loads(
    changed: dict[str, str], code: str, message: str, parts: dict[str, str], folder: Path
) -> None:
    if "report_to" in changed:
        import importlib.util

        if importlib.util.find_spec("wandb"):
            pytest.skip("wandb is installed")
    chosen = {"pretrain_mm_mlp_adapter": "", "use_cpu": "True", "lora_r": "4", **parts, **changed}
    with raises_code(code, says=message):
        main(words("scripts/v1_5/finetune_lora.sh", folder, **chosen))
