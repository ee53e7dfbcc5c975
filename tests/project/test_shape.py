"""The shape of the code base that STYLE.md promises, measured on the files git knows."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("milora_vl", "llava_recipes", "data_tools/milora_data", "eval/milora_eval")

# `path:function` -> why its **kwargs is no sink: the signature is someone else's, and everything is passed on.
FOREIGN_SIGNATURES: dict[str, str] = {
    "milora_vl/cli/flags.py:option": "argparse's add_argument, passed on to it",
    "data_tools/milora_data/batches/processor_inputs.py:_recorded_places.<locals>.recording": "a method of processors",
    "milora_vl/models/generate.py:Decided.criteria.<locals>.stops": "a stopping criterion of transformers",
    "milora_vl/models/hub.py:_read": "from_pretrained's keywords, passed on to it",
    "milora_vl/integrations/llava.py:_ignoring_arguments.<locals>.call": "Trainer passes what LLaVA's does not take",
    "milora_vl/integrations/llava.py:_tokenizer_argument.<locals>.initialise": "Trainer's constructor",
    "milora_vl/integrations/peft_calls.py:restoring_loader.<locals>.from_pretrained": "PeftModel's method",
    "milora_vl/integrations/peft_calls.py:replacement.<locals>.get_peft_model": "PEFT's function",
    "milora_vl/adapter/peft_model.py:MiloraMixin.add_weighted_adapter": "LoraModel's method",
    "milora_vl/adapter/peft_model.py:MiloraMixin.load_adapter": "PeftModel's method",
    "milora_vl/adapter/peft_model.py:MiloraMixin.save_pretrained": "PeftModel's method",
    "milora_vl/models/timm_tower.py:TimmTower.forward": "LLaVA passes every vision tower the same keywords",
    "milora_vl/models/timm_llava.py:TimmLlavaConfig.__init__": "LlavaConfig's constructor",
    "milora_vl/models/timm_tower_config.py:TimmTowerConfig.__init__": "PretrainedConfig's constructor",
    "milora_vl/policy/rules.py:RulePart.__init__": "BaseModel's constructor",
    "milora_vl/train/fsdp.py:RequireShards.on_train_begin": "TrainerCallback's hook",
    "milora_vl/train/forgetting.py:ForgettingCallback.on_step_end": "TrainerCallback's hook",
    "milora_vl/train/evaluation.py:SuiteCallback.on_step_end": "TrainerCallback's hook",
    "milora_vl/models/hub.py:read_pretrained": "from_pretrained's keywords, passed on to it",
    "milora_vl/train/first_files.py:AtFirstStep.on_step_begin": "TrainerCallback's hook",
    "milora_vl/train/progress.py:Bars.on_log": "TrainerCallback's hook",
    "milora_vl/train/progress.py:Bars.on_train_begin": "TrainerCallback's hook",
    "milora_vl/train/progress.py:Lines.on_log": "TrainerCallback's hook",
    "milora_vl/train/progress.py:Lines.on_train_begin": "TrainerCallback's hook",
    "milora_vl/models/losses.py:_chunked_loss.<locals>.first_position": "an inner model's forward, passed on to it",
    "milora_vl/models/losses.py:add_chunked_loss.<locals>.forward": "a model's forward, passed on to it",
    "milora_vl/forecast/simulate.py:_flash_attention.<locals>.attention": "torch's function",
    "milora_vl/adapter/layers.py:AdaptedLinear.forward": "a method of PEFT's layers",
    "milora_vl/train/shared_prefix.py:attention": "an attention function of transformers",
    "milora_vl/train/trainer.py:TowerNorms.on_pre_optimizer_step": "TrainerCallback's hook",
    "milora_vl/train/features.py:replay.<locals>.forward": "LLaVA passes every vision tower the same keywords",
    "milora_vl/train/trainer.py:ConvertVersion1.on_train_begin": "TrainerCallback's hook",
    "milora_vl/train/trainer.py:ProjectShards.on_optimizer_step": "TrainerCallback's hook",
    "milora_vl/train/trainer.py:Durations.on_train_begin": "TrainerCallback's hook",
    "milora_vl/train/trainer.py:IntervalsOfThisRun.on_train_begin": "TrainerCallback's hook",
    "milora_vl/train/trainer.py:LogBeforeSave.on_step_end": "TrainerCallback's hook",
    "milora_vl/train/trainer.py:FollowFreeCores.on_step_end": "TrainerCallback's hook",
    "milora_vl/train/trainer.py:StopOnSignal.on_step_end": "TrainerCallback's hook",
}
# file -> why it asks an object for a name it may not have.
PROBES: dict[str, str] = {
    "milora_vl/policy/towers.py": "knowing other people's model classes is its job",
    "milora_vl/weights/matrices.py": "ds_id is the only mark of a parameter that ZeRO-3 has partitioned",
    "milora_vl/weights/sharding.py": "ds_tensor is the only name of a shard under ZeRO-3",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tracked(*suffixes: str) -> list[Path]:
    """Files that git tracks or would track; without git (a source archive), all files outside build and run folders."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode == 0:
        paths = [ROOT / line for line in listing.stdout.splitlines()]
    else:
        skip = {".venv", "runs", "data", "build", "dist", "__pycache__"}
        paths = [path for path in ROOT.rglob("*") if not skip & set(path.relative_to(ROOT).parts)]
    return sorted(path for path in paths if path.is_file() and (not suffixes or path.suffix in suffixes))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def ours() -> list[Path]:
    """Python files of the four packages."""
    return [path for path in tracked(".py") if name(path).startswith(tuple(f"{package}/" for package in PACKAGES))]


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Every function of a file with its qualified name, nested ones included."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{prefix}{child.name}", child
                yield from walk(child, f"{prefix}{child.name}.<locals>.")
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.")
            else:
                yield from walk(child, prefix)

    yield from walk(parsed(path), "")


def test_no_star_imports_and_no_grab_bag_modules() -> None:
    stars = [
        f"{name(path)}:{node.lineno}"
        for path in tracked(".py")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert not stars
    assert not [
        name(path) for path in tracked(".py") if re.fullmatch(r"_?(utils?|helpers?|misc|common)\.py", path.name)
    ]


def test_no_signature_swallows_unknown_keywords() -> None:
    sinks = {f"{name(path)}:{label}" for path in ours() for label, node in functions(path) if node.args.kwarg}
    assert sorted(sinks - set(FOREIGN_SIGNATURES)) == []
    assert sorted(set(FOREIGN_SIGNATURES) - sinks) == [], "the allow-list names functions that no longer exist"


def is_public(label: str) -> bool:
    """Neither private nor local; of the magic methods only those with a signature of their own count."""
    return not any(part.startswith("_") or part == "<locals>" for part in label.split(".")) or label.endswith(
        "__init__"
    )


def untyped(node: Function, label: str) -> list[str]:
    """Names of the parameters without annotation, and "return" where that one is missing."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arguments += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
    missing = [argument.arg for argument in arguments if argument.annotation is None]
    is_method = "." in label and bool(arguments)
    if is_method and missing[:1] == [arguments[0].arg] and arguments[0].arg in {"self", "cls"}:
        missing = missing[1:]
    return missing + (["return"] if node.returns is None else [])


def test_public_functions_are_typed() -> None:
    gaps = [
        f"{name(path)}:{node.lineno} {label}: {missing}"
        for path in ours()
        for label, node in functions(path)
        if is_public(label) and (missing := untyped(node, label))
    ]
    assert not gaps


def test_public_functions_classes_and_modules_are_documented() -> None:
    gaps = []
    for path in ours():
        tree = parsed(path)
        if not ast.get_docstring(tree):
            gaps.append(name(path))
        gaps += [
            f"{name(path)}:{node.lineno} {node.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
        ]
        gaps += [
            f"{name(path)}:{node.lineno} {label}"
            for label, node in functions(path)
            if is_public(label) and not label.endswith("__init__") and not ast.get_docstring(node)
        ]
    assert not gaps


# One letter of each stands in brackets, so that this file does not match itself.
NOT_IN_THE_TREE = {
    "a home directory": r"(?<![\w.])(/roo[t]/|/hom[e]/\w|/User[s]/\w|C:\\User[s])",
    "a package registry's host": r"pyp[i]\.org|pythonhoste[d]|registry\.npmj[s]|download\.pytorc[h]",
}


@pytest.mark.parametrize("what", NOT_IN_THE_TREE)
def test_no_file_names(what: str) -> None:
    found = [
        f"{name(path)}:{number}: {line.strip()[:100]}"
        for path in tracked(
            "", ".py", ".md", ".toml", ".yaml", ".yml", ".json", ".jinja", ".txt", ".cfg", ".html", ".css", ".js"
        )
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if re.search(NOT_IN_THE_TREE[what], line)
    ]
    assert not found


def test_only_a_few_files_probe_for_names() -> None:
    """A name probed for is an assumption about someone else's class; those live in one place."""
    probes = {
        name(path): node.lineno
        for path in ours()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and (node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3))
    }
    assert not {file: line for file, line in probes.items() if file not in PROBES}


def test_only_one_module_knows_the_files_of_an_adapter() -> None:
    """What a folder holds is asked of `adapter_folders`; `checkpoints`, below it, lists the weights of a checkpoint."""
    files = {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin"}
    files |= {"mm_projector.safetensors", "mm_projector.bin"}
    found = {
        name(path)
        for path in ours()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Constant) and node.value in files
    }
    assert found == {"milora_vl/adapter/folders.py", "milora_vl/adapter/checkpoints.py"}


# Where a function imports a module of ours, and why. The numbers may only shrink.
QUICK_HELP = "--help answers before torch is imported"
INNER_IMPORTS: dict[str, tuple[int, str]] = {
    "data_tools/milora_data/__init__.py": (1, "the collator needs torch"),
    "eval/milora_eval/commands/run.py": (2, QUICK_HELP),
    "eval/milora_eval/commands/scales.py": (1, QUICK_HELP),
    "eval/milora_eval/lm_eval.py": (2, QUICK_HELP),
    "eval/milora_eval/vlmevalkit.py": (2, "tables are read and written without torch"),
    "milora_vl/analyze/command.py": (1, QUICK_HELP),
    "milora_vl/chat/command.py": (1, QUICK_HELP),
    "milora_vl/compose/command.py": (1, QUICK_HELP),
    "milora_vl/export/command.py": (1, QUICK_HELP),
    "milora_vl/forgetting/__main__.py": (1, QUICK_HELP),
    "milora_vl/integrations/llava.py": (1, QUICK_HELP),
    "milora_vl/integrations/replace.py": (1, QUICK_HELP),
    "milora_vl/models/auto_classes.py": (2, "transformers imports these classes, not the other way round"),
    "milora_vl/policy/policy.py": (1, "reading rules needs no PEFT"),
    "studies/__main__.py": (1, QUICK_HELP),
    "milora_vl/sweep/__main__.py": (1, QUICK_HELP),
    "milora_vl/train/command.py": (3, QUICK_HELP),
}


# Files of milora_vl that load the package above it by its name, if a recipe asks for scores.
UPWARD = {"milora_vl/plan/eval_section.py", "milora_vl/train/evaluation.py"}


def test_only_the_listed_files_load_evaluators_by_name() -> None:
    sources = [path for path in ours() if name(path).startswith("milora_vl/")]
    found = {name(path) for path in sources if 'import_module("milora_eval' in path.read_text(encoding="utf-8")}
    assert found == UPWARD


def inner_imports(path: Path) -> int:
    """Imports of our own modules inside functions."""
    tree = parsed(path)
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    count = 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom) or not node.col_offset or id(node) in guarded:
            continue
        module = (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        own = module.split(".")[0] in ("milora_vl", "milora_data", "milora_eval", "llava_recipes")
        count += own or (isinstance(node, ast.ImportFrom) and node.level > 0)
    return count


def test_imports_inside_functions_have_a_reason_and_only_shrink() -> None:
    found = {name(path): number for path in ours() if (number := inner_imports(path))}
    assert found == {file: number for file, (number, _) in INNER_IMPORTS.items()}, "a smaller number goes into the list"
