"""Run the training code of LLaVA with MiLoRA instead of LoRA, without changes to that code:

    python -m milora_vl.interop.llava llava/train/train_mem.py --lora_enable True --lora_r 128 ...

LLaVA pins transformers 4.37.2, which is older than this package supports, so training needs a separate environment with
LLaVA installed without its pins; compat/llava.py handles what has changed since then. The saved files (with
the projector in non_lora_trainables.bin) load in LLaVA's own environment with its load_pretrained_model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import signature
from itertools import pairwise
from pathlib import Path

from milora_vl.common.cli.console import run
from milora_vl.common.errors import UserError
from milora_vl.core.adapter.folders import CONFIG, NON_LORA
from milora_vl.interop.replace import get_peft_model_replaced, launch, launcher, parse

# Flags of LLaVA's scripts that newer versions of transformers have renamed.
RENAMED_FLAGS = {"--evaluation_strategy": "--eval_strategy", "--warmup_ratio": "--warmup_steps"}


@contextmanager
def milora_in_llava(modules: Sequence[str] = (), protect: float | None = None) -> Iterator[None]:
    """Inside this context LLaVA's `train()` creates MiLoRA adapters and runs on the installed transformers.

    `modules` are modules that have imported `get_peft_model` already. LLaVA's own code imports it when it trains.
    `protect` is as in `get_peft_model_replaced`.
    """
    if find_spec("llava") is None:
        message, hint = "llava is not installed", "pip install --no-deps llava-torch   (or -e the repository)"
        raise UserError(message, code="package-missing", hint=hint)
    from milora_vl.common.compat.llava import llava_on_new_transformers

    with llava_on_new_transformers(NON_LORA), get_peft_model_replaced(*modules, protect=protect):
        yield


def renamed_flags(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the flag names of the installed TrainingArguments.

    >>> renamed_flags(["--evaluation_strategy", "no", "--bf16=True"])
    ['--eval_strategy', 'no', '--bf16=True']
    """
    from transformers import TrainingArguments

    known = signature(TrainingArguments.__init__).parameters
    out = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        new = RENAMED_FLAGS.get(flag, flag)
        out.append((flag if flag.removeprefix("--") in known else new) + equals + value)
    return out


@contextmanager
def configs_trimmed(folders: Sequence[Path]) -> Iterator[None]:
    """At the end of this context, remove keys from adapter_config.json that the PEFT version of LLaVA does not know.

    Files that existed before and did not change belong to another run and are not changed.
    """
    from milora_vl.interop.llava_layout import KNOWN_KEYS

    files = [folder / CONFIG for folder in folders]
    before = {file: file.read_bytes() for file in files if file.is_file()}
    try:
        yield
    finally:  # a script may leave by sys.exit
        for file in files:
            if file.is_file() and file.read_bytes() != before.get(file):
                content = json.loads(file.read_text(encoding="utf-8"))
                known = {key: value for key, value in content.items() if key in KNOWN_KEYS}
                file.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")


COMMAND = launcher(
    "milora_vl.interop.llava",
    "Run LLaVA's train.py with MiLoRA as its LoRA.",
    "llava/train/train_mem.py --lora_enable True --lora_r 128",
)


def main(argv: Sequence[str] | None = None) -> int:
    chosen, given = parse(COMMAND, argv)
    arguments = renamed_flags(given)
    if "--lora_enable" not in [argument.partition("=")[0] for argument in arguments]:
        sys.stderr.write("milora: warning: --lora_enable is missing, so this run trains without an adapter\n")
    with (
        configs_trimmed(_output_dirs(arguments)),
        milora_in_llava(chosen.modules, chosen.protect),
    ):
        launch(chosen.script, arguments)
    return 0


def _output_dirs(arguments: Sequence[str]) -> list[Path]:
    values = []
    for argument, following in pairwise([*arguments, ""]):
        flag, equals, value = argument.partition("=")
        if flag == "--output_dir":
            values.append(value if equals else following)
    return [Path(value) for value in values if value]


if __name__ == "__main__":
    run(main)
