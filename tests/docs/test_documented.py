"""Every command and snippet of README.md, CONTRIBUTING.md and docs/ runs, with small models in place of large ones."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from milora_vl.models import generate, smol_llava
from milora_vl.models.tiny import tiny_llama
from support import documented_files
from support.documented import PAGES, ROOT, SHELLS, Block, Command, blocks, commands, name_of
from support.documented_run import (
    LAUNCHER,
    flags_of,
    in_one,
    in_two,
    launch_of,
    run_here,
    run_outside,
    run_together,
    substituted,
)
from support.documented_tables import (
    EXCEPTIONS,
    FILES,
    NO_CODE,
    PAGES_PRESUME,
    SLOW,
)
from support.llava_parts import small_vicuna_and_clip

NAMES = [name_of(page) for page in PAGES]
ALL = [command for page in NAMES for command in commands(page)]
TYPED = "What is this?\n/quit\n"


def row_of(table: dict[str, str], text: str) -> str | None:
    """Return the reason in the first row of a table that matches a command."""
    return next((reason for pattern, reason in table.items() if re.match(pattern, text)), None)


def is_slow(command: Command) -> bool:
    return launch_of(command.text) is not None or row_of(SLOW, command.text) is not None


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_records: list[dict[str, Any]]) -> Path:
    folder = tmp_path_factory.mktemp("documented")
    documented_files.write_files(folder, tiny_records)
    return folder


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is not trained ends no answer: it would generate the 512 tokens that some benchmarks allow."""
    greedy = generate._greedy

    def shorter(reader: generate.Reader, max_new_tokens: int, num_beams: int) -> Any:
        return greedy(reader, min(max_new_tokens, 8), num_beams)

    monkeypatch.setattr(generate, "_greedy", shorter)


@pytest.fixture
def place(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_answers: None, forked_programs: None
) -> Path:
    """A working folder with the files that the pages presume, and a separate cache."""
    from milora_data.assets import cache_dir

    folder, cache, assets = tmp_path / "reader", tmp_path / "cache", cache_dir() / "assets"
    shutil.copytree(files, folder)
    cache.mkdir()
    assets.mkdir(parents=True, exist_ok=True)
    (cache / "assets").symlink_to(assets)
    monkeypatch.setenv("MILORA_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return folder


def written(block: Block) -> Command | None:
    """Write a block that is a file, and return the command that reads it; None for other blocks."""
    first = block.text.splitlines()[0]
    if (block.page, first) not in FILES:
        return None
    name, before, command = FILES[block.page, first]
    Path(name).write_text(before + block.text, encoding="utf-8")
    return Command(block.page, block.line, command)


def run_page(page: str, run: Callable[[Command], None]) -> None:
    """Run all commands of a page in order, then report every failure."""
    documented_files.prepare(PAGES_PRESUME.get(page, ()))
    ours = [command for command in commands(page) if row_of(EXCEPTIONS, command.text) is None]
    ours += [found for block in blocks() if block.page == page and (found := written(block))]
    failed = []
    for command in sorted(ours, key=lambda command: command.line):
        try:
            run(command)
        except AssertionError as error:
            failed.append(f"{command}\nran as: {substituted(command.text)}\n{error}")
    assert not failed, "\n\n".join(failed)


def here(command: Command) -> None:
    text = substituted(command.text)
    if text.startswith("make "):
        run_outside(text, ROOT)
    else:
        run_here(in_one(text) if launch_of(text) else text, TYPED)


def repeats(command: Command, seen: set[str]) -> bool:
    """Return whether earlier trainings of the paper's page have shown this recipe and this method.

    `-m slow` runs them all, and tests/docs/test_reproduce.py resolves the flags of each to the layers that it trains.
    """
    recipe = re.search(r"milora_vl\.train --recipe (\S+)", command.text)
    if command.page != "docs/reproduce.md" or recipe is None:
        return False
    method = re.search(r"--method \S+", command.text)
    shown = {recipe[1], method[0] if method else "--method milora"}
    is_repeated = shown <= seen
    seen |= shown
    return is_repeated


@pytest.mark.filterwarnings("ignore:too little calibration")  # the data of the pages is tiny
@pytest.mark.parametrize("page", [name for name in NAMES if commands(name)])
def test_the_commands_of_a_page_run(page: str, place: Path) -> None:
    seen: set[str] = set()
    run_page(page, lambda command: None if row_of(SLOW, command.text) or repeats(command, seen) else here(command))


@pytest.mark.parametrize("page", [name for name in NAMES if commands(name)])
def test_the_flags_of_a_page_exist(page: str) -> None:
    """The commands themselves run in CI (tests/support/thorough.py)."""
    for command in commands(page):
        text = LAUNCHER.sub("python -m ", re.split(r" \S+\.(?:py|sh)\b", command.text)[0])  # then flags of the script
        if re.match(r"(python3? -m )?milora[_ ]", text) and not row_of(EXCEPTIONS, text):
            named = {word.partition("=")[0].replace("-", "_") for word in text.split() if re.match(r"--\w", word)}
            known = {flag.replace("-", "_") for flag in flags_of(substituted(text))}
            assert named - {"__help"} <= known, str(command)


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name in NAMES if any(map(is_slow, commands(name)))])
def test_slow_and_launched_commands_of_a_page_run_as_typed(page: str, place: Path) -> None:
    """The first command of each launcher starts two processes, and so does FSDP2; the others run in one."""
    launched = set()

    def run(command: Command) -> None:
        text = substituted(command.text)
        how = launch_of(text)
        if not is_slow(command) or (how in launched and " --fsdp" not in text):
            here(command)
        elif how:
            launched.add(how)
            run_together(in_two(text), place)
        else:
            run_outside(text, place)

    small_vicuna_and_clip(place)
    (place / "benchmarks").symlink_to(ROOT / "benchmarks")
    shutil.copytree(ROOT / "docs" / "studies", place / "docs" / "studies")
    run_page(page, run)


@pytest.fixture
def small_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny Llama in place of SmolLM2, whose file takes ten seconds to read; tests/models/test_smol_llava.py does."""
    monkeypatch.setattr(smol_llava, "language_model", tiny_llama)


@pytest.mark.usefixtures("small_language_model")
@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_a_snippet_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", blocks("py"), ids=str)
def test_a_script_for_other_programs_compiles_and_its_imports_of_ours_exist(block: Block) -> None:
    imports = [node for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if node.module and node.module.startswith("milora_")]
    assert ours
    for node in ours:
        module = importlib.import_module(node.module or "")
        assert [name.name for name in node.names if not hasattr(module, name.name)] == []


def test_every_block_is_run_or_has_a_reason() -> None:
    fences = sum(page.read_text(encoding="utf-8").count("```") for page in PAGES)
    assert fences == 2 * len(blocks()), "a fence that does not start its line"
    for block in blocks():
        first = block.text.splitlines()[0]
        run = block.language in (*SHELLS, "python") or (block.page, first) in FILES
        assert run or (block.page, block.language) in NO_CODE, f"{block} does not run and has no reason in NO_CODE"


def test_the_reference_uses_every_public_call_in_an_example() -> None:
    import milora_vl

    of_others = "Record load_records encode encode_prompt ImageTextCollator Benchmark Item run score".split()
    names = {*milora_vl.__all__, *of_others}
    examples = "".join(block.text for block in blocks("python") if block.page == "docs/api.md")
    uses = {name: len(re.findall(rf"\b{name}\b", examples)) for name in names}
    assert [name for name, count in uses.items() if count < 2] == []  # the import, and a use


def test_no_command_that_runs_loads_a_model_of_the_hub() -> None:
    """A missing substitution would download gigabytes where there is a network."""
    from milora_vl.models.names import BUILT_IN_MODELS, NAMED_MODELS, PART_OF, SAME_WEIGHTS

    hub = {*NAMED_MODELS, *NAMED_MODELS.values(), *PART_OF, *SAME_WEIGHTS} - {*BUILT_IN_MODELS}
    run = [substituted(command.text) for command in ALL if row_of(EXCEPTIONS, command.text) is None]
    assert [text for text in run if "--dry-run" not in text and hub & set(text.split())] == []


@pytest.mark.parametrize("command", [c for c in ALL if row_of(EXCEPTIONS, c.text)], ids=str)
def test_exceptions_are_checked_as_far_as_possible(command: Command) -> None:
    """Flags of our own programs, extras named to pip, and files exist."""
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    for names in re.findall(r"pip install .*(?:\.|milora-vl)\[([\w,]+)\]", command.text):
        assert [name for name in names.split(",") if not re.search(rf"^{name} = ", extras, re.MULTILINE)] == []
    for path in re.findall(r"(?:benchmarks|tests)/\S+\.py", command.text):
        text = (ROOT / path).read_text(encoding="utf-8")
        flags = re.findall(r"--\w+", command.text.partition(" -- ")[0]) if path.startswith("benchmarks") else ()
        assert [flag for flag in flags if f'"{flag}"' not in text] == []
    if command.text.startswith("python -m milora_"):
        assert {word for word in command.text.split() if word.startswith("--")} <= flags_of(command.text)
