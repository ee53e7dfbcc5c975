"""The model card of a run (README.md): front matter for model hubs, results, usage."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from milora_vl.common.atomic_write import write_text
from milora_vl.core.adapter.folders import has_config, holds_projector_alone, holds_text_model, read_environment
from milora_vl.core.policy.rules import METHODS, label_of, what_trains
from milora_vl.models.names import BUILT_IN_MODELS
from milora_vl.report.read_run import Evaluation, SuiteScores, in_units
from milora_vl.report.tables import lowered_shares

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SCORES_BEGIN, SCORES_END = "<!-- scores -->", "<!-- end of scores -->"
_CARD = """\
---
{front}
---

# {name}

{summary}

## Use

{usage}

{scores}

## Repeat

```
python -m milora_vl.train --recipe recipe.yaml --output_dir NEW_FOLDER
```

`recipe.yaml` contains all settings, `environment.json` the versions, `policy.json` the trained modules and
the measurements per layer.
"""


def render(path: Path, recipe: Mapping[str, Any]) -> str:
    """Return the card of the run in `path`: summary, how to load it, scores, how to repeat it.

    `recipe` has a value for each key, like `Recipe.model_dump()`.
    """
    environment = read_environment(path)
    base = str(environment.get("base", recipe["model"]))
    return _CARD.format(
        front=_front_matter(path, recipe, base).to_yaml(),
        name=path.resolve().name,
        summary=_summary(path, recipe, environment),
        usage=_usage(path, recipe["model"], base, is_finished=bool(environment.get("finished"))),
        scores=_scores(path),
    )


def _front_matter(path: Path, recipe: Mapping[str, Any], base: str) -> ModelCardData:
    """Return the front matter for hubs, where names of folders and of local files are invalid.

    The license is the base model's, which the hub calls `other` with a name and a link.
    """
    from huggingface_hub import ModelCardData

    is_adapter, is_on_hub = has_config(path), _HUB_ID.fullmatch(base) is not None and not Path(base).is_dir()
    data = recipe["data"]["path"]
    files = [source["path"] for source in data] if isinstance(data, list) else [data or ""]
    sets = [name.removeprefix("hub:").split(":")[0] for name in files if name.startswith("hub:")]
    methods = [_method(rule).lower().replace(" ", "-") for rule in recipe["policy"] or () if "method" in rule]
    relation: dict[str, Any] = {"base_model_relation": "adapter" if is_adapter else "finetune"} if is_on_hub else {}
    return ModelCardData(
        base_model=base if is_on_hub else None,
        library_name="peft" if is_adapter else "transformers",
        license="other",
        license_name="license-of-the-base-model",
        license_link=f"https://huggingface.co/{base}" if is_on_hub and "/" in base else None,
        pipeline_tag=_task(path),
        tags=sorted({"milora-vl", *methods}),
        datasets=sets or None,
        model_name=path.resolve().name,
        eval_results=_results(path) or None,
        **relation,
    )


def _method(rule: Mapping[str, Any]) -> str:
    protect = rule.get("protect")
    return label_of(rule["method"], METHODS[rule["method"]].protect if protect is None else protect)


def _task(path: Path) -> str:
    return "text-generation" if holds_text_model(path) else "image-text-to-text"


def _results(path: Path) -> list[EvalResult]:
    """Return the headline of each benchmark, over the questions that the table of scores compares."""
    from huggingface_hub import EvalResult

    files = sorted(path.glob("eval/**/final/results.json"))
    finals = [Evaluation("final", _json(file), ()) for file in files]
    suites = [SuiteScores("", Evaluation("base", {}, ()), final).scores() for final in finals]
    headlines = [next(of_one) for suite in suites for _, of_one in groupby(suite, lambda score: score.benchmark)]
    return [
        EvalResult(
            task_type=_task(path),
            dataset_type=score.benchmark,
            dataset_name=score.benchmark,
            metric_type=score.any["name"],
            metric_name=score.any["name"],
            metric_value=round(in_units(score.any, score.after["value"]), 2),
        )
        for score in headlines
        if score.after
    ]


def update_scores(path: Path) -> None:
    """Update the scores in the card of the run in `path`, also in its front matter.

    The rest, which users may edit, does not change.
    """
    from huggingface_hub import ModelCard

    file = path / "README.md"
    with FileLock(path / "eval" / ".lock"):  # two evaluations of one run may end at the same time
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        before, begin, tail = text.partition(SCORES_BEGIN)
        _, end, after = tail.partition(SCORES_END)
        if begin and end:
            card = ModelCard(before + _scores(path) + after, ignore_metadata_errors=True)
            data: Any = card.data
            data.model_name, data.eval_results = path.resolve().name, _results(path) or None
            write_text(file, str(card))


def _summary(path: Path, recipe: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    policy, state = _json(path / "policy.json"), _json(path / "trainer_state.json")
    trained = f", {policy['trainable']:,} of {policy['total']:,} parameters trained" if "trainable" in policy else ""
    records = environment.get("data", {}).get("train")
    data = "" if records is None else f" on {records:,} records"  # the length of a stream is unknown
    adapter = f" with the adapter `{recipe['adapter']}`" if recipe["adapter"] else ""
    text = f"`{recipe['model']}`{adapter} fine-tuned{data}{trained}."
    losses = [entry["loss"] for entry in state.get("log_history", []) if "loss" in entry]
    text += f" Training loss at the end: {losses[-1]:.4f}." if losses else ""
    earlier = ", ".join(f"`{task['run']}`" for task in _json(path / "milora.json").get("tasks", ())[:-1])
    text += f" The LoRA also holds the updates of {earlier}." if earlier else ""
    rules = []
    for rule in recipe["policy"] or ():
        fields = ", ".join(f"{name} {value}" for name, value in rule.items() if name not in ("modules", "method"))
        named = f"{_method(rule)} ({what_trains(rule['method'], rule.get('protect'))}), " if "method" in rule else ""
        rules.append(f"- `{rule.get('modules')}`: {named}{fields}".rstrip(", "))
    return "\n\n".join(filter(None, [text, "\n".join(rules), lowered_shares(policy)]))


def _usage(path: Path, model: str, base: str, *, is_finished: bool) -> str:
    if not is_finished:
        return (
            "This training did not finish, so this folder has no final weights. To resume, repeat the command of\n"
            "`environment.json` with `--resume_from_checkpoint auto`."
        )
    if holds_projector_alone(path):
        return f"```\npython -m milora_vl.train --model {model} --projector_weights PATH_OF_THIS_FOLDER ...\n```"
    names = f'"{model}", adapter="PATH_OF_THIS_FOLDER"' if has_config(path) else '"PATH_OF_THIS_FOLDER"'
    code = f"```python\nfrom milora_vl import load_model\n\nmodel, processor = load_model({names})\n```"
    if not has_config(path):
        return code
    of = f"`{base}`"
    if model in BUILT_IN_MODELS:
        of = f"`{model}`, which `load_model` builds anywhere (`adapter_config.json` names the folder of its training)"
    return (
        f"{code}\n\nIt is a stock PEFT LoRA for {of}. On the loaded base model, "
        "`PeftModel.from_pretrained(base, PATH)` works without `milora_vl`."
    )


def _scores(path: Path) -> str:
    tables: list[str] = []
    for suite in sorted({file.parent.parent for file in path.glob("eval/**/table.md")}):
        texts = {
            file.parent.name: file.read_text(encoding="utf-8").strip() for file in sorted(suite.glob("*/table.md"))
        }
        tables += [text for which, text in texts.items() if which != "base" or len(texts) == 1]
    text = "## Scores\n\n" + "\n\n".join(dict.fromkeys(tables)) + "\n\n" if tables else ""
    return f"{SCORES_BEGIN}\n\n{text}{SCORES_END}"


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
