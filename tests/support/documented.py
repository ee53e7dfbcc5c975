"""What README.md, CONTRIBUTING.md and docs/ tell a reader to type, and how a test runs it with tiny models."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
import traceback
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from milora_vl.__main__ import MENU
from milora_vl.common.errors import UserError
from support.command_parsers import parser_of

ROOT = Path(__file__).resolve().parents[2]
# Their blocks build on each other: tests/docs/test_worked_examples.py applies them to a copy of the packages.
CHANGES = ("docs/contributing/add-a-benchmark.md",)  # its blocks are files and changes of them
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.relative_to(ROOT).as_posix() not in CHANGES),
]
TYPED = "What is this?\n/quit\n"  # into a program that asks
_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:(?:python3? -m )?milora_(?:vl|data|eval)[.\w]*|milora) [^`\n]+)`")

# What is too large for a test, and what replaces it, from top to bottom. Commands that plan or list run unchanged.
PLANS = ("--dry-run", "--list-", "--print-recipe", "--plan")
SMALLER: tuple[tuple[str, str], ...] = (
    (r"^(torchrun|deepspeed|accelerate launch) .*?(-m|--module) (?=milora_)", "python -m "),
    (r" --deepspeed \S+| --fsdp\b", ""),
    (r"(?<![-\w])llava-1\.5-(7|13)b|smol-llava(?=[ ,]|$)", "tiny"),
    (r"qwen2\.5-vl-3b", "qwen-vl"),
    (r"llama-2-7b", "tiny-text"),
    (r"--model smollm2", "--model instruct"),
    (r"lmsys/vicuna-7b-v1\.5", "language"),
    (r"openai/clip-vit-large-patch14-336", "tower"),
    (r"timm/vit_small_patch16_224 --language FOLDER", "timm/test_vit --vision_weights random --language language"),
    (r"hub:HuggingFaceH4/ultrafeedback_binarized:train_sft", "ultrafeedback.parquet"),
    (r"(train --recipe milora-paper-llava-\S+ .*)", r"\1 --model language --vision_tower tower"),
    (r"(train --recipe paper-.*)", r"\1 --model tiny-text --fp16 False"),
    (r"(train --recipe (?:smol-llava-|mine\.yaml).*)", r"\1 --model tiny"),
    # Sizes: the last flag of a name counts.
    (r"(milora_vl\.train .*)", r"\1 --max_steps 2 --deepspeed= --dataloader_num_workers 0"),
    (r"(milora_vl\.train (?!.*--tune_mm_mlp_adapter).*)", r"\1 --rank 2"),
    (r"--hold_out 100", "--hold_out 2"),
    (r"(milora_eval run .*)", r"\1 --forgetting_tokens 64"),
    (r"--limit 1000", "--limit 8"),
    (r"(milora_vl\.forgetting .*)", r"\1 --num_tokens 64"),
    (r"^make ", "make -n "),
)
# Commands that no test here runs, and why. Flags of our own programs, extras named to pip and files are checked.
NOT_RUN: dict[str, str] = {
    r".*runs/stage1": "both stages: tests/models/test_compose.py runs them",
    r".*( \.\.\.|\[--|\bBASE\b)": "incomplete",
    r"(python -m )?pip (install|uninstall|download)|source |pre-commit ": "changes an environment",
    r"git clone |hf download ": "needs the network",
    r"(transformers|vllm) serve |curl |python -m sglang": "a server, see tests/export",
    r"python -m lmms_eval |python -m milora_eval\.lm_eval |swift (sft|rlhf) ": "needs another package's environment",
    r"python examples/\w+_trl\.py ": "trl is optional: tests/interop/test_trl.py runs these",
    r"python -m milora_eval run --server ": "needs a server: tests/eval/test_eval_server.py starts one",
    r"python -m milora_vl\.sweep (?!.*--plan)": "each cell is two programs: tests/sweep runs them",
    r"python -m milora_data emoji ": "draws the whole set: tests/data/test_emoji.py does",
    r"python -m studies .*--docs ": "writes into docs: tests/studies does",
    r"python (benchmarks|tests/support)/|pytest ": "minutes each",
}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page; `line` is the number of its first line of text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Every fenced block of one page."""
    content = page.read_text(encoding="utf-8")
    return [
        Block(name_of(page), content.count("\n", 0, match.start("text")) + 1, match["language"], match["text"])
        for match in _FENCE.finditer(content)
    ]


@cache
def blocks(language: str) -> list[Block]:
    """Every fenced block in one language, page by page."""
    return [block for page in PAGES for block in blocks_of(page) if block.language == language]


def commands(page: Path) -> list[str]:
    """The commands in the shell blocks of a page, each on one line and without comments."""
    texts = [re.sub(r"\\\n\s*", "", block.text) for block in blocks_of(page) if block.language == "bash"]
    lines = [re.sub(r"(^|\s+)#.*$", "", line) for text in texts for line in text.splitlines()]
    return [as_module(part.strip()) for line in lines for part in line.split("&&") if part.strip()]


def as_module(text: str) -> str:
    """A command of the script `milora` as the module that it runs; other commands are unchanged."""
    name = re.match(r"milora (\w+)", text)
    if name is None or name[1] not in MENU.modules or name[1] == "demo":
        return text
    return f"python -m {MENU.modules[name[1]].removesuffix('.__main__')}{text[name.end() :]}"


def named_in_prose(page: Path) -> list[str]:
    """Commands of ours in the sentences and tables of a page."""
    return _INLINE.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def is_run(command: str) -> bool:
    return not any(re.match(pattern, command) for pattern in NOT_RUN)


def smaller(command: str) -> str:
    """Return the command as a test runs it, with tiny models and few steps."""
    for pattern, small in () if any(flag in command for flag in PLANS) else SMALLER:
        command = re.sub(pattern, small, command)
    return command


def words_of(command: str) -> tuple[str, list[str]]:
    """Return the module that a command of ours runs, and its arguments."""
    first, *rest = shlex.split(command)
    if first.startswith("python"):
        assert rest[0] == "-m", f"no program of ours: {command}"
        first, rest = rest[1], rest[2:]
    return ("milora_vl" if first == "milora" else first), rest


def run_here(command: str) -> None:
    """Run one of our programs in this process. Raises AssertionError, with the output, if its exit code is not 0."""
    module, arguments = words_of(command)
    target = None
    if ">" in arguments:
        at = arguments.index(">")
        target, arguments = arguments[at + 1], arguments[:at]
    found = import_module(module)
    main = found.main if hasattr(found, "main") else import_module(f"{module}.__main__").main
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)  # the launchers for scripts replace it
        patch.setattr(sys, "stdin", io.StringIO(TYPED))
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code or 0
        except UserError as error:
            code = f"error: {error}"
        except Exception:
            code = traceback.format_exc()
    assert code == 0, f"{command}\nexit code {code}\n{out.getvalue()[-2000:]}{err.getvalue()[-4000:]}"
    if target:
        Path(target).write_text(out.getvalue())


@cache
def flags_of(command: str) -> set[str]:
    """Return the flags that the program of a command declares; none for a bare menu."""
    module, arguments = words_of(command)
    names = {its.removesuffix(".__main__"): name for name, its in MENU.modules.items()}
    name, *arguments = arguments if module == "milora_vl" else [names[module], *arguments]
    if name.startswith("-") or (name in MENU.menus and (not arguments or arguments[0].startswith("-"))):
        return set()
    has_second = name in MENU.menus
    return set(parser_of((name, arguments[0]) if has_second else (name,)).flags())
