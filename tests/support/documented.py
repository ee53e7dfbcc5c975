"""What README.md, CONTRIBUTING.md and docs/ tell a reader to type: blocks of code, commands in them and in prose.

`milora train ...` is read as `python -m milora_vl.train ...`, which is the same.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from milora_vl.__main__ import MENU

ROOT = Path(__file__).resolve().parents[2]
# Their blocks build on each other: tests/docs/test_worked_examples.py applies them to a copy of the packages.
WORKED = ("docs/contributing/add-a-benchmark.md", "docs/contributing/add-a-method.md")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.relative_to(ROOT).as_posix() not in WORKED),
]
SHELLS = ("bash", "sh", "shell", "console")
_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
# Code in a sentence is a command when it starts with one of these programs.
_PROGRAM = re.compile(
    r"(?:milora|make|pip|pre-commit|pytest) \S|(?:hf|vllm|swift|torchrun|accelerate|deepspeed) \S+ \S+ "
    r"|(?:source|docker|git|curl|tensorboard|srun|sbatch|uv|conda) \S"
    r"|(?:\S*/)?python3? \S|milora_(?:vl|data|eval)(?:\.\w+)* \S"
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page; `line` is the number of its first line of text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True, slots=True)
class Command:
    """A command as the page has it, without comments and on one line."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


@cache
def blocks(*languages: str) -> list[Block]:
    """Every fenced block in one of the languages (of none: in any), page by page."""
    found = [block for page in PAGES for block in blocks_of(page)]
    return [block for block in found if not languages or block.language in languages]


def blocks_of(page: Path) -> list[Block]:
    """Every fenced block of one page."""
    content = page.read_text(encoding="utf-8")
    return [
        Block(name_of(page), content.count("\n", 0, match.start("text")) + 1, match["language"], match["text"])
        for match in _FENCE.finditer(content)
    ]


@cache
def commands(page: str) -> list[Command]:
    """Every command of a page in order: in shell blocks and in prose."""
    found = []
    for block in blocks(*SHELLS):
        if block.page == page:
            parts = [part for line in _joined(block.text) for part in line.split("&&")]
            found += [Command(page, block.line, as_module(part.strip())) for part in parts]
    if page != "docs/api.md":
        content = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), (ROOT / page).read_text(encoding="utf-8"))
        for number, line in enumerate(content.splitlines(), start=1):
            found += [Command(page, number, as_module(text)) for text in _INLINE.findall(line) if is_command(text)]
    return sorted(found, key=lambda command: command.line)


def is_command(text: str) -> bool:
    """Whether code starts with a program, and not with what is Python or a name."""
    return bool(_PROGRAM.match(text))


def as_module(text: str) -> str:
    """A command of the script `milora` as the module that it runs; other commands are unchanged."""
    name = re.match(r"milora (\w+)", text)
    if name is None or name[1] not in MENU.modules or name[1] == "demo":
        return text
    return f"python -m {MENU.modules[name[1]].removesuffix('.__main__')}{text[name.end() :]}"


def name_of(page: Path) -> str:
    """The path of a page in the repository."""
    return page.relative_to(ROOT).as_posix()


def words(text: str) -> list[str]:
    """The words of a shell line; redirections and `&&` are separate words."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="&>|;")
    lexer.whitespace_split = True
    return list(lexer)


def _joined(text: str) -> list[str]:
    """Lines of a shell text, continued ones joined, without comments and empty ones."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    bare = [re.sub(r"(^|\s+)#.*$", "", line).strip() for line in lines]
    return [line for line in bare if line]
