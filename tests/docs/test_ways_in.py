"""The table of docs/trainers.md: how much of the inputs each way protects by default. README's planned numbers."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import LoraConfig

from milora_vl import calibration_texts, reinit_peft
from milora_vl.core.policy import Policy, Target
from milora_vl.interop import llava, replace
from milora_vl.models.tiny import tiny_llama
from milora_vl.train.__main__ import main
from milora_vl.train.settings import PICTURES, SAMPLES
from support.plans import fitted

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
TRAIN = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
LORA = LoraConfig(r=2, target_modules=["q_proj"])
TEXTS = calibration_texts(tiny_llama()[0], count=8, length=16)


def rows() -> dict[str, tuple[str, float]]:
    """What the table says: "what you call" -> (method, share); all train the method that stands above it."""
    table = re.findall(r"^\| .+? \| ([\d.]+) \| (?:yes|no|callback) \| (.+) \|$", PAGE, re.MULTILINE)
    return {call: ("milora", float(share)) for share, call in table}


def of_rule(text: str) -> Target:
    """The first rule in the text of a page or a script, on the language tower of a tiny model."""
    written = re.search(r"\{[^{}]*\bmethod\b[^{}]*\}", text)
    assert written
    method = re.search(r"\bmethod\"?: \"?(\w+)", written[0])
    share = re.search(r"\bprotect\"?: ([\d.]+)", written[0])
    assert method
    rule = {"modules": "language", "method": method[1], "rank": 1}
    return first([rule | ({"protect": float(share[1])} if share else {})])


def first(rules: list[dict[str, object]]) -> Target:
    return Policy.parse(rules).resolve(tiny_llama()[0])[0]


def of_command(words: str) -> Target:
    return next(target for target in fitted(words).targets if target.tower == "language")


def of_launcher(module: object) -> Target:
    """The defaults of its flags and of the function that they are passed to agree, and the LoRA is made with them."""
    flags, _ = replace.parse(module.COMMAND, ["train.py"])  # type: ignore[attr-defined]
    function = llava.milora_in_llava if module is llava else replace.get_peft_model_replaced
    defaults = inspect.signature(function).parameters
    assert flags.protect == defaults["protect"].default
    with replace.get_peft_model_replaced(protect=flags.protect):
        return peft.get_peft_model(tiny_llama()[0], LORA).milora_targets[0]


def of_reinit() -> Target:
    model, _ = tiny_llama()
    return reinit_peft(peft.get_peft_model(model, LORA), calibration=TEXTS).milora_targets[0]


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}")[1].split("\n## ")[0]


def script(name: str) -> str:
    return (ROOT / "examples" / name).read_text(encoding="utf-8")


WAYS: dict[str, Callable[[], list[Target]]] = {
    "`milora train`": lambda: [of_command("--model llava-1.5-7b")],
    "`deepspeed --module milora_vl.train`": lambda: [of_command("--model llava-1.5-7b --lora_enable True")],
    "`apply_milora(model, rules, calibration=...)`": lambda: [of_rule(section("HF Trainer and TRL"))],
    "`reinit_peft(model, calibration=...)`": lambda: [of_reinit()],
    "`milora replace`": lambda: [of_launcher(replace)],
    "`milora llava`": lambda: [of_launcher(llava)],
    "`get_peft_model_replaced(...)`": lambda: [of_launcher(replace)],
    "`examples/axolotl.yaml`": lambda: [of_launcher(replace)],  # the same function; its test needs Axolotl
    "`examples/ms_swift_plugin.py`": lambda: [of_rule(script("ms_swift_plugin.py"))],
    "`examples/grpo_trl.py`, `distillation_trl.py`": lambda: [
        of_rule(script(name)) for name in ("grpo_trl.py", "distillation_trl.py")
    ],
}


def test_the_table_has_every_way_in() -> None:
    assert set(rows()) == set(WAYS)


@pytest.mark.parametrize("call", WAYS)
def test_the_table_says_what_the_code_trains(call: str) -> None:
    assert {(target.method, target.protect) for target in WAYS[call]()} == {rows()[call]}


def test_the_page_names_what_the_recipe_of_the_default_sets_otherwise() -> None:
    recipe = fitted("--recipe milora-llava-1.5-7b --output_dir x --data_path x.json --image_folder x")
    plain = fitted("--model llava-1.5-7b --output_dir x --data_path x.json --image_folder x")
    assert recipe.targets == plain.targets
    (text,) = re.findall(r"^`milora-llava-1.5-7b` has the rules.*?\n\n", TRAIN, re.MULTILINE | re.DOTALL)
    flags = recipe.recipe.train.keys() - plain.recipe.train.keys()
    same = {"learning_rate", "seed", "weight_decay"}  # as in the rules, and defaults
    named = {"activation_checkpointing": "gradient_checkpointing"}
    assert flags
    assert [flag for flag in flags - same if named.get(flag, flag) not in text] == []
    assert f"{recipe.recipe.calibration.samples} texts and {recipe.recipe.calibration.pictures}" in " ".join(
        text.split()
    )
    assert f"({SAMPLES}, {PICTURES})" in text


def test_readme_has_the_numbers_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    def planned(*more: str) -> dict[str, list[Any]]:
        flags = "--model llava-1.5-7b --bf16 --gradient_checkpointing --dry-run --format json"
        assert main([*flags.split(), *more]) == 0
        return dict(json.loads(capsys.readouterr().out))

    (policy,) = re.findall(r"^```yaml\npolicy:\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (.+?) \| (\d+) \| ([\d,]+) \| (\S+) \|$", readme, re.MULTILINE)
    columns = ("modules", "number", "method", "rank", "parameters")
    plan = planned("--policy", policy)["policy"]
    assert [(*(row[name] for name in columns), float(row["rate"])) for row in plan] == [
        (*row[:-1], float(row[-1])) for row in rows
    ]
    fewer = "--per_device_train_batch_size 4 --gradient_accumulation_steps 2"
    for size, flags in ("21.6", ""), ("19.6", fewer), ("15.9", "--model qwen2.5-vl-7b --quantization 4bit"):
        assert flags in readme
        assert f"{size} GiB" in readme
        assert f"about {size} GiB" in planned(*flags.split())["cost"][0]
