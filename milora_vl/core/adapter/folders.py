"""What a folder holds, by its files: adapter, projector, text model, checkpoints; errors for a wrong one; tensor names.

Other modules ask here instead of looking for the files. `interop/imported.py` tells the kinds of adapters apart.

A checkpoint is a folder of HF's Trainer: weights, optimizer, scheduler, random states of all processes and, written
last, trainer_state.json. DeepSpeed stores the optimizer in a folder global_stepN, with a file per process. A checkpoint
is incomplete if its process was killed while writing it.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from milora_vl.common.errors import MALFORMED, Problem, UserError
from milora_vl.common.yaml_text import read_file


class AdapterError(UserError):
    """An adapter that cannot be created, saved or loaded as requested."""


PEFT_PREFIX = "base_model.model."
EARLIER = ("earlier_A", "earlier_B")  # buffers of a base layer with the update of an earlier run
CONFIG = "adapter_config.json"  # of PEFT, also in LLaVA's folders
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
ANCHORS_FILE = "milora_anchors.safetensors"  # of ours, beside milora.json
NON_LORA = "non_lora_trainables.bin"  # of LLaVA: what it trained beside the LoRA
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
RESTORE = "restore the files of one save"
EXPECTED = f"expected a folder with {CONFIG}, for example the output_dir of a run"
# Weight files of a checkpoint; the adapter comes first.
WEIGHTS = ("adapter_model.safetensors", "mm_projector.safetensors", "model.safetensors", "model.safetensors.index.json")
SET_ASIDE = "incomplete-"
STATE = "trainer_state.json"
HELD_OUT = "held_out.jsonl"  # losses of the held-out records, highest first
# Files that only a resumed run needs.
NO_RESULT = (
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "stream_state_*.pth", "latest", "zero_to_*.py",
    STATE,
)  # fmt: skip
SHARDED_OPTIMIZER = "optimizer"  # folder of torch.distributed.checkpoint, by FSDP2; its .metadata is written last
SHARDS = "global_step*/*_optim_states.pt"
SHARDED_WEIGHTS = "global_step*/zero_pp_rank_*_model_states.pt"  # only with ZeRO-3


def local_folder(name: str) -> Path | None:
    """Return the folder of a base model, or its newest snapshot in the hub's cache; None if it is in neither."""
    if Path(name).is_dir():
        return Path(name)
    is_id = name.count("/") <= 1 and not name.startswith((".", "/"))
    file = try_to_load_from_cache(name, "config.json") if is_id else None
    return Path(file).parent if isinstance(file, str) else None


def has_config(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def holds_llava_adapter(folder: Path) -> bool:
    return has_config(folder) and (folder / NON_LORA).is_file()


def are_sizes(numbers: Iterable[object]) -> bool:
    """Return whether all are ranks and alphas that a LoRA can have: JSON knows NaN, and 1e12 would fill the memory."""
    return all(
        isinstance(number, int | float) and 0 <= number <= 2**20 for number in numbers
    )  # `--scale 0` has alpha 0


def holds_adapter(folder: Path) -> bool:
    return holds_llava_adapter(folder) or (has_config(folder) and not (folder / "config.json").is_file())


def adapters_inside(folder: Path) -> list[Path]:
    return sorted(file.parent for file in folder.glob(f"*/{CONFIG}"))


def holds_projector_alone(folder: Path) -> bool:
    return not has_config(folder) and any((folder / name).is_file() for name in PROJECTOR_FILES)


def require_adapter(folder: Path, flag: str, *call: object) -> None:
    """Raise UserError, at `flag`, unless `folder` holds an adapter of any origin, or a projector.

    `call` comes before the newest checkpoint of an unfinished run in the command that the hint suggests.
    """
    problem = not_a_folder(folder, flag)
    if problem is None and not (holds_adapter(folder) or holds_projector_alone(folder)):
        problem = no_adapter_in(folder, flag, *call)
    if problem is not None:
        raise UserError(problems=[problem])


def require_no_base(model: str, adapter: object, base: str | None) -> None:
    if base is not None and (adapter is not None or holds_adapter(Path(model))):
        message = "this flag is for a fully trained --model; the base of an adapter is its --model"
        raise UserError(message, code="flag-conflict", where="--base", hint="remove it")


def not_a_folder(folder: Path, flag: str = "") -> Problem | None:
    """Return the problem of the name of an adapter that is no folder, at `flag` (default: at the folder)."""
    if folder.is_dir():
        return None
    message = "this is a file, but an adapter is a folder" if folder.exists() else "no such adapter folder"
    beside = [folder.parent] if has_config(folder.parent) else adapters_inside(folder.parent)
    paths = {path.name: str(path) for path in beside}
    near = [paths[name] for name in difflib.get_close_matches(folder.name, paths, n=3, cutoff=0)]
    hint = f"adapters there: {', '.join(near)}" if near else EXPECTED
    return Problem(f"{message}: {folder}" if flag else message, "adapter-no-folder", flag or str(folder), hint)


def no_adapter_in(folder: Path, flag: str, *call: object) -> Problem:
    """Return the problem of an existing folder without an adapter, with a hint about what it holds.

    `flag` and `call` are as in `require_adapter`; an empty flag means the folder itself.
    """
    message = f"no adapter in this folder{f': {folder}' if flag else ''}"
    hint = newest_of_unfinished(folder, *call)
    inside = [str(path) for path in adapters_inside(folder)]
    if not hint and inside:
        hint = f"use one of its subfolders:  {', '.join(inside[:6])}"
    if not hint and flag and (folder / "config.json").is_file():
        hint = f"the folder holds a whole model: if it trained in full, use  --model {folder} --base MODEL"
    names = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
    return Problem(message, "adapter-missing", flag or str(folder), hint or f"found {names}; {EXPECTED}")


def newest_of_unfinished(folder: Path, *call: object) -> str:
    """Return a hint for a run that has checkpoints but no result; else "".

    `call` comes before the newest checkpoint in the suggested command: a module and arguments, or only arguments.
    """
    newest = newest_checkpoint(folder)
    if newest is None or holds_adapter(folder) or holds_weights(folder):
        return ""
    if call[-1] == "--adapter" and not (holds_adapter(newest) or holds_projector_alone(newest)):
        call = ("--model",)  # full training: a checkpoint is a whole model
    module, *words = *map(str, call), str(newest)
    typed = ("" if module.startswith("--") else "python -m ") + shlex.join([module, *words])
    return (
        f"the run in it has not finished; its newest checkpoint has step {step_of(newest):,}\n"
        f"use it:    {typed}\n"
        "or resume: the training command with  --resume_from_checkpoint auto"
    )


def projector_file(source: Path) -> Path:
    files = [source / name for name in PROJECTOR_FILES if (source / name).is_file()] if source.is_dir() else [source]
    if not files or not files[0].is_file():
        newest = newest_checkpoint(source)
        hint = newest_of_unfinished(source, "--projector_weights") if newest and holds_projector_alone(newest) else ""
        message = f"no projector weights: expected a file or a folder with {' or '.join(PROJECTOR_FILES)}"
        raise UserError(message, where=str(source), hint=hint)
    return files[0]


def base_of(folder: Path) -> str:
    """Return the name of the base model that an adapter belongs to, as `from_there` finds it.

    Raises UserError if adapter_config.json does not name it or cannot be read.
    """
    file = folder / CONFIG
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except MALFORMED as error:
        hint = "copy the folder again, or use a checkpoint of the run"
        raise UserError(f"cannot read the file: {error}", code="file-unreadable", where=str(file), hint=hint) from None
    if not name:
        hint = f"name it:  --model BASE --adapter {folder},  or  --base BASE"
        raise UserError("the file names no base model", code="adapter-no-base-name", where=str(file), hint=hint)
    return from_there(folder, str(name))


def from_there(folder: Path, name: str) -> str:
    """Return the name of a model that was given where the adapter in `folder` was trained.

    A relative path is looked up here, then in the folders above the adapter: the training ran in one of them.
    """
    if Path(name).is_dir():
        return name
    paths = (parent / name for parent in folder.resolve().parents)
    return next((str(path) for path in paths if (path / "config.json").is_file()), name)


def model_of(model: str | None, adapter: Path | None, *call: object) -> str:
    """Return the value of --model; without it, the base that the adapter names.

    `call` is as in `require_adapter`. Raises UserError without either, and for an adapter that names no base.
    """
    if model is not None:
        return model
    if adapter is not None:
        require_adapter(adapter, "--adapter", *call)
        if has_config(adapter):
            return base_of(adapter)
    raise UserError(
        "required" if adapter is None else f"required: {adapter} names no base",
        code="flag-required",
        where="--model",
        hint="for example  --model llava-1.5-7b" + (", or an adapter, which names its base" if adapter is None else ""),
    )


def recipe_of_run(folder: Path) -> dict[str, Any]:
    """Return the content of the recipe.yaml in a run folder, or in the folder above a checkpoint; empty without one."""
    files = (folder / "recipe.yaml", folder.parent / "recipe.yaml")
    file = next((file for file in files if file.is_file()), None)
    return {} if file is None else read_file(file)


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint, -1 for any other folder.

    >>> step_of(Path("runs/a/checkpoint-20"))
    20
    """
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def checkpoints(run: Path) -> list[Path]:
    folders = [folder for folder in run.glob("checkpoint-*") if folder.is_dir() and step_of(folder) >= 0]
    return sorted(folders, key=step_of)


def newest_checkpoint(run: Path) -> Path | None:
    return next((folder for folder in reversed(checkpoints(run)) if holds_weights(folder)), None)


def holds_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WEIGHTS)


def why_incomplete(folder: Path) -> str | None:
    """Return what is missing in a checkpoint; None if a run can resume from it."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except OSError:
        return f"has no {STATE} (the run was killed while writing it)"
    except ValueError:
        return f"{STATE} is truncated"
    if not isinstance(state, dict) or (step_of(folder) >= 0 and state.get("global_step") != step_of(folder)):
        return f"{STATE} is of another step"
    if not holds_weights(folder) and not is_sharded(folder):
        return "has no weights"
    has_optimizer = is_sharded(folder) or is_of_fsdp(folder) or (folder / "optimizer.pt").is_file()
    if not has_optimizer or not list(folder.glob("rng_state*.pth")):
        return "has no optimizer and random state (--save_only_model): evaluation works, resuming does not"
    if is_sharded(folder) and len(list(folder.glob(SHARDS))) != num_processes(folder):
        return f"has the optimizer of {len(list(folder.glob(SHARDS)))} of {num_processes(folder)} processes"
    return None


def latest(run: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest complete checkpoint, and the newer incomplete ones with the reason."""
    skipped: list[tuple[Path, str]] = []
    for folder in reversed(checkpoints(run)):
        reason = why_incomplete(folder)
        if reason is None:
            return folder, skipped
        skipped.append((folder, reason))
    return None, skipped


def resume_hint(run: Path) -> str:
    newest, _ = latest(run)
    if newest is None:
        return "there is no checkpoint yet; the same command with  --resume_from_checkpoint auto  starts again"
    return f"the same command with  --resume_from_checkpoint auto  continues from step {step_of(newest)}"


def is_sharded(folder: Path) -> bool:
    return any(folder.glob("global_step*"))


def is_of_fsdp(folder: Path) -> bool:
    return (folder / SHARDED_OPTIMIZER / ".metadata").is_file()


def zero_stage(folder: Path) -> int:
    """Return the ZeRO stage of a checkpoint: 0 without DeepSpeed, 2 or 3 (stage 1 counts as 2)."""
    if not is_sharded(folder):
        return 0
    return 3 if any(folder.glob(SHARDED_WEIGHTS)) else 2


def num_processes(folder: Path) -> int:
    return 1 if (folder / "rng_state.pth").is_file() else len(list(folder.glob("rng_state_*.pth")))


def copy_results(folder: Path, run: Path) -> None:
    for file in folder.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in NO_RESULT):
            shutil.copy2(file, run / file.name)


def set_aside(folder: Path) -> Path:
    """Rename an incomplete checkpoint, so that rotation and later resumes ignore it. Return the new path."""
    number = 0
    target = folder.with_name(SET_ASIDE + folder.name)
    while target.exists():
        number += 1
        target = folder.with_name(f"{SET_ASIDE}{folder.name}.{number}")
    return folder.rename(target)


def is_finished(path: Path) -> bool:
    return bool(read_environment(path).get("finished")) and holds_weights(path)


def resumed_run(output_dir: str | None, resume: str | None) -> Path | None:
    wanted = asked_for(resume)
    if wanted is None:
        return None
    if not is_word(wanted):
        return Path(wanted).parent
    run = None if output_dir is None else Path(output_dir)
    return run if run is not None and (checkpoints(run) or is_finished(run)) else None


def asked_for(resume: str | None) -> str | None:
    return None if resume is None or resume.lower() in ("false", "no", "none") else resume


def is_word(wanted: str) -> bool:
    return wanted.lower() in ("true", "yes", "1", "auto")


def read_environment(path: Path) -> dict[str, Any]:
    """Return environment.json of a run; empty if it is missing or truncated."""
    try:
        content = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def holds_text_model(folder: Path) -> bool:
    processors = ("processor_config.json", "preprocessor_config.json")
    return (folder / "tokenizer_config.json").is_file() and not any((folder / name).is_file() for name in processors)


def module_path(name: str, paths: Collection[str]) -> str:
    """Return the longest module path in `paths` that the tensor `name` is inside, or "" if none.

    >>> module_path("base_model.model.lm.q.lora_A.weight", ["lm.q", "lm"])
    'lm.q'
    """
    path = name.removeprefix(PEFT_PREFIX)
    while path and path not in paths:
        path = path.rpartition(".")[0]
    return path


def moved(name: str, paths: Mapping[str, str]) -> str:
    """Return the name of a tensor with its module path replaced by that in `paths`, if it is there.

    >>> moved("base_model.model.a.b.lora_A.weight", {"a.b": "c"})
    'base_model.model.c.lora_A.weight'
    """
    path = module_path(name, paths)
    if not path:
        return name
    prefix = PEFT_PREFIX if name.startswith(PEFT_PREFIX) else ""
    return prefix + paths[path] + name.removeprefix(prefix + path)
