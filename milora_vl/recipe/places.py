"""The place of a problem of a recipe: the flag that sets the key, or the file and line of the recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import wraps
from typing import TypeVar

from milora_vl.base.errors import Problem, UserError, with_problems
from milora_vl.recipe import hf_flags, llava_flags
from milora_vl.recipe.command_line import RECIPE_FLAGS, Request
from milora_vl.recipe.hf_flags import RENAMED
from milora_vl.recipe.schema import is_key, located

ResultT = TypeVar("ResultT")


def at_their_places(action: Callable[[Request], ResultT]) -> Callable[[Request], ResultT]:
    """Return the action with errors that name the place where the user sets a key, instead of the key alone.

    The place is the flag of the command line that has set the key, else the line of the recipe. Code that checks a
    recipe knows only the keys; every step of a run can find a mistake in them, so the whole action is covered.
    """

    @wraps(action)
    def placed(request: Request) -> ResultT:
        try:
            return action(request)
        except UserError as error:
            try:
                problems = _at_places(error.problems, request)
            except UserError:  # the recipe itself cannot be read, as the error says
                raise error from None
            raise with_problems(error, problems) from error

    return placed


def _at_places(problems: Sequence[Problem], request: Request) -> list[Problem]:
    """Return the problems; the place of each that has a key of the recipe is a flag, or a line of the recipe."""
    flags = {f"train.{name}": f"--{name}" for name in hf_flags.flags()}
    flags |= {path: f"--{name}" for name, (path, *_) in RECIPE_FLAGS.items()}
    keys = {flag: key for key, flag in flags.items()}
    file = request.recipe_file
    source, lines = file.source, {_canonical(key): line for key, line in file.lines.items()} | file.lines
    moved = []
    for problem in at_flags(problems, request):
        key = problem.where if is_key(problem.where) else keys.get(problem.where, "")
        by_flag = problem.where.startswith("--") and is_typed(request, key)
        if key in lines and not by_flag:
            moved += located([replace(problem, where=key)], source, lines)
        elif is_key(problem.where) and request.recipe is None:
            moved.append(replace(problem, where=flags.get(key, key)))
        else:
            moved += located([problem], source, lines) if is_key(problem.where) else [problem]
    return moved


def _canonical(key: str) -> str:
    section, _, name = key.partition(".")
    return f"train.{RENAMED.get(name, name)}" if section == "train" else key


def at_flags(problems: Sequence[Problem], request: Request) -> list[Problem]:
    """Return the problems with the flag of the command line as the place of each value that a flag has set.

    A flag changes several rules, so it may have the same problem several times: one stays. An alpha that follows from
    --rank has no problem of its own.
    """
    typed = request.overrides.get("train", {})
    flags = {_canonical(f"train.{name}"): name for name in typed} | {f"train.{name}": name for name in typed}
    flags |= {path: name for name, (path, *_) in RECIPE_FLAGS.items() if is_typed(request, path)}
    flags |= {f"parts.{key}": name for name, key in llava_flags.PARTS.items() if name in request.llava}
    if request.llava.get("bits") is not None:
        flags["quantization"] = "bits"
    if request.policy is not None:
        flags["policy"] = "policy"
    of_rules = _rule_flags(request)
    places = {problem.where for problem in problems}
    moved = []
    for problem in problems:
        rule, _, key = problem.where.partition(".")
        is_rule = rule.startswith("policy[")
        if is_rule and key == "alpha" and "alpha" not in of_rules and "rank" in of_rules and f"{rule}.rank" in places:
            continue
        flag = of_rules.get(key) if is_rule else flags.get(problem.where)
        moved.append(problem if flag is None else replace(problem, where=f"--{flag}"))
    return list(dict.fromkeys(moved))


def _rule_flags(request: Request) -> dict[str, str]:
    """Return the flag that has set each key of the rules; a key that two flags set in different rules is left out."""
    edits = asdict(request.edits)
    flags = {name: name for name in ("method", "rank", "alpha", "dropout", "learning_rate") if edits[name] is not None}
    if edits["projector_learning_rate"] is None:
        return flags
    if "learning_rate" in flags:
        del flags["learning_rate"]
        return flags
    return flags | {"learning_rate": "mm_projector_lr"}


def is_typed(request: Request, path: str) -> bool:
    """Return whether a flag of the command line sets the key at the dotted path."""
    *section, name = path.split(".")
    return name in (request.overrides.get(section[0], {}) if section else request.overrides)
