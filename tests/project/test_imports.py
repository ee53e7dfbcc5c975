"""What an import needs and does: an SVD that needs torch alone, no effects."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    ROOT / "milora_vl",
    ROOT / "llava_recipes",
    ROOT / "data_tools" / "milora_data",
    ROOT / "eval" / "milora_eval",
]
OURS = {source.name for source in SOURCES}
# Plug-ins that their host imports; tests/eval/test_eval_plugins.py runs them in one.
NEED_THEIR_HOST = {"milora_eval/lmms.py", "milora_vl/interop/axolotl.py"}
FILES = sorted(
    path
    for source in SOURCES
    for path in source.rglob("*.py")
    if path.relative_to(source.parent).as_posix() not in NEED_THEIR_HOST
)


def module_name(path: Path) -> str:
    (source,) = [source for source in SOURCES if path.is_relative_to(source)]
    return ".".join(path.relative_to(source.parent).with_suffix("").parts).removesuffix(".__init__")


def python(code: str) -> str:
    """Standard output of a fresh interpreter that ran `code`."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_milora_vl_adds_no_package_to_import_torch() -> None:
    code = "import sys, torch; before = {*sys.modules}; import milora_vl; print(*sys.modules.keys() - before)"
    added = {name.partition(".")[0] for name in python(code).split()}
    assert added - sys.stdlib_module_names == {"milora_vl"}


def test_a_misspelt_flag_is_refused_before_torch_is_imported() -> None:
    words = ["-X", "importtime", "-m", "milora_vl.train", "--learning_rat", "1", "--resume_from_checkpoint", "true"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean --learning_rate" in done.stderr
    assert "torch" not in {line.rpartition(" ")[2] for line in done.stderr.splitlines()}


def test_public_names_are_no_submodules() -> None:
    """A function that shares its name with its file is hidden by it, once that file is imported, unless it is bound."""
    code = f"""
import importlib, types
packages = [importlib.import_module(name) for name in {sorted(OURS)}]
for _ in range(2):
    values = [(name, getattr(package, name)) for package in packages for name in package.__all__]
print(*[name for name, value in values if isinstance(value, types.ModuleType)])
"""
    assert python(code).split() == []


EFFECTS = """
import importlib, json, logging, os, random, signal, sys, warnings
from pathlib import Path

def state():
    import torch
    return {
        "environment": dict(os.environ),
        "files": sorted(str(path) for path in Path.cwd().rglob("*")),
        "path": list(sys.path),
        "logging": [len(logging.root.handlers), logging.root.level],
        "warning filters": [repr(item) for item in warnings.filters],
        "signals": repr(signal.getsignal(signal.SIGINT)),
        "random": hash((random.getstate(), torch.random.get_rng_state().numpy().tobytes())),
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
    }

foreign, modules = json.loads(sys.argv[1])
for statement in foreign:
    exec(statement, {})
before = state()
for module in modules:
    importlib.import_module(module)
after = state()
changed = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
print(json.dumps(changed, indent=1, default=str))
"""


def foreign_imports() -> list[str]:
    """The module-level imports of other people's packages, as statements: their effects are theirs."""
    statements = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module != "__future__":
                names = [node.module or ""]
            if names and not any(name.partition(".")[0] in OURS for name in names):
                statements[ast.unparse(node)] = None
    return list(statements)


def test_importing_any_module_changes_and_prints_nothing(tmp_path: Path) -> None:
    """No environment variable, file, log handler, warning filter, seed or signal handler is touched."""
    modules = [module_name(path) for path in FILES]
    assert len(modules) > 100
    done = subprocess.run(
        [sys.executable, "-c", EFFECTS, json.dumps([foreign_imports(), modules])],
        capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("{}\n", "")
