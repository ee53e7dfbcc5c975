"""Merge the settings of a run, in layers: defaults, adapter, recipe file, LLaVA's flags, flags. Later layers win.

It looks at no model, no data and no device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from milora_vl.common.cli.command_line import beside
from milora_vl.common.errors import Key, Problem, UserError, collected, with_problems
from milora_vl.common.yaml_text import TEXT, read_mapping
from milora_vl.core.adapter import checkpoints
from milora_vl.train.recipe import continued, hf_flags, llava_flags
from milora_vl.train.recipe.flags import PROG, RECIPE_FLAGS, Request
from milora_vl.train.recipe.layers import RecipeFile, Section, merged, place_of, placed
from milora_vl.train.recipe.llava_flags import Meaning
from milora_vl.train.recipe.policy_edits import ADAPTERS, edited
from milora_vl.train.recipe.schema import Recipe, checked, train_section

DECIDES_POLICY = ("lora_enable", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "freeze_backbone")
FLAGS = {path: name for name, (path, *_) in RECIPE_FLAGS.items()}  # of every key that has one


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The one recipe of a run, and where the user set each of its values.

    With `problems`, the recipe has defaults for values that are wrong, and no policy if a rule is.
    """

    request: Request
    recipe: Recipe
    file: RecipeFile  # the content of all layers, under the name of the recipe
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def source(self) -> str:
        """Return the name of the recipe, or of the policy without one, for lists of problems."""
        policy = self.request.policy
        if self.request.recipe or policy is None:
            return self.file.source
        return policy if _is_file(policy) else "--policy"

    def is_set(self, *parts: str | int) -> bool:
        """Return whether the user has set a key: in the adapter, in the recipe or by a flag."""
        return bool(place_of(self.file.content, Key(parts)))

    def located(self, problems: Sequence[Problem]) -> list[Problem]:
        """Return the problems; a key is where the user has set it, or, without a recipe, at the flag that would.

        A flag changes several rules, so it may have the same problem several times: one stays.
        """
        return list(dict.fromkeys(self.file.located([self._at_flag(problem) for problem in problems])))

    def _at_flag(self, problem: Problem) -> Problem:
        key = problem.where
        if self.request.recipe or not isinstance(key, Key) or self.is_set(*key.parts):
            return problem
        is_argument = len(key.parts) == 2 and key.parts[0] == "train" and key.parts[1] in hf_flags.flags()
        flag = str(key.parts[1]) if is_argument else FLAGS.get(str(key))
        return problem if flag is None else replace(problem, where=f"--{flag}")

    @contextmanager
    def places(self) -> Iterator[None]:
        """Turn the keys in the errors of the block into the places of their values."""
        try:
            yield
        except UserError as error:
            raise with_problems(error, self.located(error.problems)) from error


def merge(request: Request) -> Settings:
    """Merge the layers of a run, and check all values. Raises UserError only for a recipe that cannot be read."""
    problems, file, meaning = list(request.problems), request.recipe_file, Meaning([])
    adapter, after = (str(request.overrides.get(n) or file.content.get(n) or "") for n in ("adapter", "after"))
    of_adapter, note, of_flags = Section(), "", _of_flags(request)
    with collected(problems):
        of_adapter, note = _of_after(after, request) if after and not adapter else (_of_adapter(adapter), "")
    with collected(problems):
        meaning = _meaning(request, adapter or after)
    if request.policy is not None:
        with collected(problems):
            of_flags.put("policy", _read_policy(request.policy), "--policy")
    for layer in (file.content, of_flags):  # each by itself, too: a flag hides no mistake of the file
        problems += replace(file, content=layer).located(checked(layer, is_whole=False)[1])
    below = merged(_newest(of_adapter), _newest(file.content))
    notes = [*filter(None, [note]), *_give_way(below, of_flags)]
    of_llava = _of_llava(request, meaning, adapter or after)
    if "data" in of_llava and not request.sets("data.image_aspect_ratio"):
        notes.append("LLaVA flags: without --image_aspect_ratio images are cropped to a square")
    content = merged(below, of_llava, _newest(of_flags))
    is_known = bool(of_adapter) or not (adapter or after)  # what an adapter with a problem names is not
    rules, after_flags = content.get("policy"), None
    if is_known and (rules is None or (isinstance(rules, list) and all(isinstance(rule, Mapping) for rule in rules))):
        with collected(problems):
            after_flags = edited(rules, request.edits)
    content.put("policy", after_flags, content.places.get("policy", ""))
    recipe, wrong = checked(content, is_whole=not problems)
    file = replace(file, content=content)
    settings = Settings(request=request, recipe=recipe, file=file, warnings=meaning.warnings)
    problems += settings.located(wrong)
    if adapter and of_adapter and not problems:
        problems += settings.located(continued.contradictions(adapter, of_adapter, recipe))
    if not content.get("model") and is_known:
        hint = f"see: {PROG} --list-recipes"
        message = "no model: set --model NAME, or use a --recipe that names one"
        problems.append(Problem(message, "recipe-no-model", "--model", hint))
    line = [meaning.line] if meaning.line else []
    return replace(settings, problems=list(dict.fromkeys(problems)), notes=[*line, *notes])


def batch_of(file: RecipeFile) -> tuple[int, int] | None:
    """Return what a recipe itself says of batches: records per device, accumulation steps; None if it says nothing."""
    train, _ = train_section(file.content.get("train"))
    per_device = train.get("per_device_train_batch_size")
    return None if not per_device else (int(per_device), int(hf_flags.value_of(train, "gradient_accumulation_steps")))


def _of_adapter(adapter: str) -> Section:
    """Return the settings of the adapter that trains further; they stand in its folder."""
    return placed(continued.settings_of(Path(adapter)), lambda key: adapter) if adapter else Section()


def _of_after(after: str, request: Request) -> tuple[Section, str]:
    """Return the settings of the run that the new one comes after, and a note; a resumed run has them itself."""
    run = checkpoints.resumed_run(request.output_dir, request.resume)
    if run is not None and checkpoints.latest(run)[0] is not None:
        settings, note, after = continued.settings_resumed(run), "", str(run)
    else:
        settings, note = continued.settings_after(Path(after))
    return placed(settings, lambda key: after), note


def _of_flags(request: Request) -> Section:
    """Return the settings of the flags that are keys of the recipe."""

    def flag_of(key: str) -> str:
        name = key.removeprefix("train.") if key.startswith("train.") else FLAGS.get(key)
        return f"--{name}" if name else ""

    flags = placed(request.overrides, flag_of)
    sampled = [name for name in ("fps", "num_frames") if name in flags.get("data", {})]
    if len(sampled) == 1:  # the flag replaces either setting of the recipe
        flags["data"]["num_frames" if sampled == ["fps"] else "fps"] = None
    return flags


def _of_llava(request: Request, meaning: Meaning, adapter: str) -> Section:
    """Return the settings that LLaVA's flags mean."""
    layer, flags = Section(), request.llava
    if meaning.rules:
        deciding = [f"--{name}" for name in (*DECIDES_POLICY, "vision_tower") if flags.get(name)]
        layer.put("policy", meaning.rules, " ".join(deciding) or "--lora_enable")
    if meaning.quantization:
        layer.put("quantization", meaning.quantization, "--bits")
    if flags.get("group_by_modality_length"):
        places = {"train_sampling_strategy": "--group_by_modality_length"}
        layer["train"] = Section({"train_sampling_strategy": "group_by_length"}, places)
    named = {key: name for name, key in llava_flags.PARTS.items() if flags.get(name) is not None}
    layer["parts"] = Section(llava_flags.parts(flags), {key: f"--{name}" for key, name in named.items()})
    if llava_flags.is_script(flags) and not request.recipe and not adapter:
        layer["data"] = {"image_aspect_ratio": "plain"}
    return layer


def _newest(layer: Section) -> Section:
    """Return a layer whose training arguments have their newest names."""
    return Section({**layer, "train": train_section(layer.get("train"))[0]}, layer.places)


def _give_way(below: Section, flags: Section) -> list[str]:
    """Drop what the flags replace beside their own keys: an argument by an older name, held-out records of other data.

    Returns a note about the held-out records.
    """
    below["train"] = below["train"].without(hf_flags.replaced(flags.get("train", {})))
    data, over = below.get("data"), flags.get("data", {})
    if not isinstance(data, Section) or not data.get("eval_path") or "eval_path" in over:
        return []
    if over.get("path", data.get("path")) == data.get("path"):
        return []
    below["data"] = data.without(["eval_path"])
    below["train"] = below["train"].without(["eval_strategy", "load_best_model_at_end"])
    note = f"--data_path replaces the data of the recipe, so {data['eval_path']} is not used"
    return [f"{note} (set --eval_data_path FILE)"]


def _meaning(request: Request, adapter: str) -> Meaning:
    """Return what LLaVA's flags mean. Raises UserError for flags that something else has decided already."""
    flags = dict(request.llava)
    if not flags:
        return Meaning([])
    if request.recipe or request.policy or adapter:
        clash = [f"--{name}" for name in DECIDES_POLICY if flags.get(name) and not (adapter and name == "lora_enable")]
        if clash:
            decided_by = "adapter" if adapter else "recipe" if request.recipe else "policy"
            raise UserError(
                f"the {decided_by} already decides what trains",
                code="flag-conflict",
                where=" ".join(clash),
                hint="remove the flags" if adapter else "use --method",
            )
        # --rank and the like change the rules given, not those that LLaVA's flags would mean.
        meaning = llava_flags.meaning(flags, rank=None, alpha=None, dropout=None)
        return Meaning([], meaning.quantization, "", meaning.warnings)
    if request.edits.method in ADAPTERS and (llava_flags.is_script(flags) or flags.get("freeze_backbone")):
        flags["lora_enable"] = True
    edits = request.edits
    return llava_flags.meaning(flags, rank=edits.rank, alpha=edits.alpha, dropout=edits.dropout)


def _is_file(text: str) -> bool:
    return os.path.isfile(text)  # noqa: PTH113 - Path.is_file raises if the text is too long


def _read_policy(text: str) -> list[Section]:
    """Return the unchecked rules of --policy."""
    is_file = _is_file(text)
    source = text if is_file else "--policy"
    try:
        body = Path(text).read_text(encoding="utf-8") if is_file else text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the file: {error}", code="file-unreadable", where=text, hint=TEXT) from None
    if not is_file and text.endswith((".yaml", ".yml")):
        raise UserError(f"no such file: {text}", code="path-missing", where="--policy", hint=beside(Path(text)))
    indented = "\n".join("  " + line for line in body.splitlines())
    content, lines = read_mapping(f"policy:\n{indented}", source, above=1)
    rules = placed(content, lambda key: f"{source}:{lines[key]}" if is_file and key in lines else source)["policy"]
    if isinstance(rules, Mapping):
        rules = rules.get("policy", [rules])
    if not isinstance(rules, list) or not all(isinstance(rule, Mapping) for rule in rules):
        example = "[{modules: language, method: milora, rank: 64, learning_rate: 2.0e-4}]"
        raise UserError("expected a list of rules", code="policy-value", where=source, hint=f"for example {example}")
    return rules
