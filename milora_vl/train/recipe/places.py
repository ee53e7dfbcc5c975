"""Where the user sets a key of the recipe: the flag, or the file and its line. Code that checks a recipe knows keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

from milora_vl.common.errors import Key, Problem, UserError, with_problems
from milora_vl.train.recipe import hf_flags, llava_flags
from milora_vl.train.recipe.command_line import RECIPE_FLAGS, Request
from milora_vl.train.recipe.merge import file_of_rules

# The flag of every key that has one.
FLAGS = {path: name for name, (path, *_) in RECIPE_FLAGS.items()}


@contextmanager
def at_their_places(request: Request) -> Iterator[None]:
    """Turn the keys in the errors of the block into flags, or into the lines of the recipe."""
    try:
        yield
    except UserError as error:
        try:
            problems = placed(error.problems, request)
        except UserError:  # the recipe itself cannot be read, as the error says
            raise error from None
        raise with_problems(error, problems) from error


def placed(problems: Sequence[Problem], request: Request) -> list[Problem]:
    """Return the problems; a key is where the user has set it, or at the flag that would set it.

    A flag changes several rules, so it may have the same problem several times: one stays. An alpha that follows from
    --rank has no separate problem.
    """
    typed, of_rules = _typed(request), _rule_flags(request)
    ranks = {p.where.parts[:2] for p in problems if isinstance(p.where, Key) and p.where.parts[2:] == ("rank",)}
    moved: list[Problem] = []
    for problem in problems:
        key = problem.where
        if isinstance(key, Key):
            rule, field = key.parts[:2], key.parts[2:]
            is_rule = key.parts[0] == "policy" and len(field) == 1
            if is_rule and field == ("alpha",) and "alpha" not in of_rules and "rank" in of_rules and rule in ranks:
                continue
            flag = of_rules.get(str(field[0])) if is_rule else typed.get(str(key))
            if flag is None and request.recipe is None and key.parts[0] != "policy":
                flag = _flag_of(key)
            if flag is not None:
                problem = replace(problem, where=f"--{flag}")
        moved.append(problem)
    file = file_of_rules(request)
    if request.policy is not None:  # the rules have a separate file
        moved = [file.located([problem])[0] if _is_of_rules(problem) else problem for problem in moved]
        file = request.recipe_file
    return list(dict.fromkeys(file.located(moved)))


def _is_of_rules(problem: Problem) -> bool:
    return isinstance(problem.where, Key) and problem.where.parts[0] == "policy"


def _flag_of(key: Key) -> str | None:
    """Return the flag that sets a key, None without such a flag."""
    if key.parts[0] == "train" and len(key.parts) == 2 and key.parts[1] in hf_flags.flags():
        return str(key.parts[1])
    return FLAGS.get(str(key))


def _typed(request: Request) -> dict[str, str]:
    """Return the flag that has set each key, by the dotted key; training arguments also by their newest names."""
    train = request.overrides.get("train", {})
    flags = {f"train.{hf_flags.RENAMED.get(name, name)}": name for name in train}
    flags |= {f"train.{name}": name for name in train}
    flags |= {path: name for path, name in FLAGS.items() if request.sets(path)}
    flags |= {f"parts.{key}": name for name, key in llava_flags.PARTS.items() if name in request.llava}
    if request.llava.get("bits") is not None:
        flags["quantization"] = "bits"
    if request.policy is not None:
        flags["policy"] = "policy"
    return flags


def _rule_flags(request: Request) -> dict[str, str]:
    """Return the flag that has set each key of the rules; a key that two flags set in different rules is left out."""
    edits = asdict(request.edits)
    of_rules = ("method", "protect", "rank", "alpha", "dropout", "learning_rate")
    flags = {name: name for name in of_rules if edits[name] is not None}
    if edits["projector_learning_rate"] is None:
        return flags
    if "learning_rate" in flags:
        del flags["learning_rate"]
        return flags
    return flags | {"learning_rate": "mm_projector_lr"}
