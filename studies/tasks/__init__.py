"""The tasks of the studies by name. The module of a task is imported on first use."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from milora_vl.common.errors import UserError, suggest

if TYPE_CHECKING:
    from studies.task import Task

EMOJI, EASY_VQA = Path("data/emoji"), Path("data/easy-vqa")
# Name -> module and class.
TASKS = {
    "smol-llava": ("smol_llava", "EmojiQuestions"),
    "easy-vqa": ("smol_llava", "EasyVqa"),
    "smollm2": ("smollm2", "NamedTopics"),
    "smollm2-groups": ("smollm2", "NamedGroups"),
    "smollm2-hues": ("smollm2", "NamedHues"),
    "minilm": ("sentences", "SentenceTopics"),
}


def task_class(name: str) -> type[Task]:
    """Return the class of a task. Raises UserError for an unknown name."""
    if name not in TASKS:
        near = suggest(name, TASKS)
        raise UserError(
            f"unknown task {name!r}",
            hint=f"did you mean {near[0]}?" if near else f"known tasks: {', '.join(TASKS)}",
        )
    module, class_name = TASKS[name]
    task: type[Task] = getattr(import_module(f"studies.tasks.{module}"), class_name)
    return task


def require_task(name: str) -> None:
    """Raise UserError for an unknown name, a missing package or missing data."""
    task_class(name)
    folder = {"smol-llava": EMOJI, "easy-vqa": EASY_VQA}.get(name)
    if folder is None:
        return
    if find_spec("sklearn") is None:
        raise UserError(
            f"task {name} needs the pictures of scikit-learn, which is not installed",
            hint="pip install -e '.[studies]'",
        )
    if not (folder / "train.json").is_file():
        raise UserError(
            f"no file {folder / 'train.json'}",
            hint=f"create it:  python -m milora_data {folder.name} --output_dir {folder}",
        )


@cache
def load_task(name: str) -> Task:
    """Return a task; each process builds it once. Raises the errors of `require_task`."""
    require_task(name)
    return task_class(name)()
