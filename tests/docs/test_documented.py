"""Every command and every block of Python in README.md, CONTRIBUTING.md and docs/ runs, with tiny models."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser

from milora_vl.models import generate, smol_llava
from milora_vl.models.tiny import tiny_llama
from milora_vl.train.settings import Recipe
from support import documented_files
from support.documented import (
    PAGES,
    ROOT,
    Block,
    blocks,
    blocks_of,
    commands,
    flags_of,
    is_run,
    name_of,
    named_in_prose,
    run_here,
    smaller,
)

# Page -> what its reader already has: names in PRESUMED of tests/support/documented_files.py.
PRESUMES: dict[str, tuple[str, ...]] = {
    "docs/choose.md": ("runs/mine",),
    "docs/compare.md": ("runs/demo", "runs/full"),
    "docs/evaluate.md": ("runs/a", "runs/demo"),
    "docs/export.md": ("runs/a", "vicuna-clip", "llava-v1.5-7b-lora"),
    "docs/next-task.md": ("runs/a",),
    "docs/train.md": ("runs/a",),
}
# Languages of blocks; a block in another language would not be checked.
LANGUAGES = {"bash", "python", "py", "diff", "yaml", "json", "text", "bibtex", ""}
of_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


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
def folder(
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
    return folder


@pytest.mark.filterwarnings("ignore:too little calibration")  # the data of the pages is tiny
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_the_commands_of_a_page_run(page: Path, folder: Path) -> None:
    documented_files.prepare(PRESUMES.get(name_of(page), ()))
    failed = []
    for command in filter(is_run, commands(page)):
        try:
            text = smaller(command)
            if text.startswith("make "):
                subprocess.run(text.split(), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            else:
                run_here(text)
        except AssertionError as error:
            failed.append(f"{command}\nran as: {error}")
    assert not failed, "\n\n".join(failed)


@of_page
def test_flags_extras_and_files_that_a_page_names_exist(page: Path) -> None:
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    for command in (*commands(page), *named_in_prose(page)):
        for names in re.findall(r"pip install .*(?:\.|milora-vl)\[([\w,]+)\]", command):
            assert [name for name in names.split(",") if not re.search(rf"^{name} = ", extras, re.MULTILINE)] == []
        for path in re.findall(r"(?:benchmarks|examples|tests)/\S+\.py", command):
            assert (ROOT / path).is_file(), command
        text = re.split(r" \S+\.(?:py|sh)\b", smaller(command))[0]  # then flags of the script
        if re.match(r"(python3? -m )?milora(_(vl|data|eval)[. ](?!lm_eval)| )", text):
            named = {word.partition("=")[0].strip("[]").replace("-", "_") for word in text.split() if "--" in word[:3]}
            known = {flag.replace("-", "_") for flag in flags_of(text)}
            assert named - {"__help", "__"} <= known, command


def launched() -> list[str]:
    """Commands with a launcher, which the tests above leave out, each once."""
    programs = ("torchrun ", "deepspeed ", "accelerate launch ")
    return list(dict.fromkeys(text for page in PAGES for text in commands(page) if text.startswith(programs)))


@pytest.mark.parametrize("command", launched())
def test_a_launcher_has_the_flags_and_files_of_a_page_and_meets_at_one_machine(command: str) -> None:
    program, *words = shlex.split(command)
    if program == "torchrun":
        flags = torchrun_parser().parse_args(words)
        assert flags.nnodes.startswith("1:") or not re.match(r"localhost|127\.|$", flags.rdzv_endpoint), (
            "no shared machine"
        )
    elif program == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        flags = parse_args(words)
    else:
        flags = launch_command_parser().parse_args(words[1:])
        assert (ROOT / flags.config_file).is_file()
    assert flags.module


@pytest.fixture
def small_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny Llama in place of SmolLM2, whose file takes ten seconds to read; tests/models/test_smol_llava.py does."""
    monkeypatch.setattr(smol_llava, "language_model", tiny_llama)


@pytest.mark.usefixtures("small_language_model")
@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_a_block_of_python_runs(block: Block, folder: Path) -> None:
    exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", blocks("py"), ids=str)
def test_a_script_for_other_programs_compiles_and_its_imports_of_ours_exist(block: Block) -> None:
    imports = [node for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if node.module and node.module.startswith("milora_")]
    assert ours
    for node in ours:
        module = importlib.import_module(node.module or "")
        assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_a_block_of_yaml_is_a_part_of_a_recipe(block: Block) -> None:
    Recipe.parse({"model": "tiny", "data": {"path": "train.json"}} | yaml.safe_load(block.text))


@of_page
def test_every_fence_starts_a_line_and_has_a_language_that_is_checked(page: Path) -> None:
    found = blocks_of(page)
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(found)
    assert {block.language for block in found} <= LANGUAGES
    for block in found:
        assert block.language != "json" or json.loads(block.text)


def test_the_reference_uses_every_public_call_in_an_example() -> None:
    import milora_vl

    of_others = "Record load_records encode encode_prompt ImageTextCollator Benchmark Item run score".split()
    names = {*milora_vl.__all__, *of_others}
    examples = "".join(block.text for block in blocks("python") if block.page == "docs/api.md")
    uses = {name: len(re.findall(rf"\b{name}\b", examples)) for name in names}
    assert [name for name, count in uses.items() if count < 2] == []  # the import, and a use
