"""The tasks of the studies by name; the module of one is imported when it is asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from milora_data.command.cli import suggest
from milora_data.errors import UserError
from milora_vl.studies.task import Task

EMOJI = Path("data/emoji")  # the demo's data set
# Name -> module and class.
TASKS = {
    "smol-llava": ("smol_llava", "EmojiQuestions"),
    "smollm2": ("smollm2", "NamedTopics"),
    "minilm": ("sentences", "SentenceTopics"),
    "lite0": ("pictures", "TurnedEmoji"),
    "digits-cnn": ("digits", "DigitsCnn"),
    "digits-rnn": ("digits", "DigitsRnn"),
    "digits-vit": ("digits", "DigitsVit"),
}


def task_class(name: str) -> type[Task]:
    """Return the class of a task, which knows what is measured; UserError for no such name, and for what it lacks."""
    if name not in TASKS:
        near = suggest(name, TASKS)
        raise UserError(f"no task {name!r}\n" + (f"did you mean {near[0]} ?" if near else f"known: {', '.join(TASKS)}"))
    module, cls = TASKS[name]
    if module in ("pictures", "digits") and find_spec("sklearn") is None:
        raise UserError(f'the pictures of task {name} come with scikit-learn\npip install "milora-vl[studies]"')
    if name == "smol-llava" and not (EMOJI / "train.json").is_file():
        raise UserError(f"no {EMOJI / 'train.json'}\nmake it:  python -m milora_data emoji --output_dir {EMOJI}")
    found: type[Task] = getattr(import_module(f"milora_vl.studies.tasks.{module}"), cls)
    return found


@cache
def load_task(name: str) -> Task:
    """Return a task, built once in a process; see `task_class`."""
    return task_class(name)()
