"""The model card of a run (README.md): front matter for model hubs, results, usage."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora_vl.core.adapter.checkpoints import read_environment
from milora_vl.core.adapter.folders import has_config, holds_projector_alone, holds_text_model
from milora_vl.core.policy.rules import what_trains
from milora_vl.report.wording import lowered_shares

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

UNFINISHED = (
    "This training did not finish, so this folder has no final weights. To resume, repeat the command of\n"
    "`environment.json` with `--resume_from_checkpoint auto`."
)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SCORES_BEGIN, SCORES_END = "<!-- scores -->", "<!-- end of scores -->"


def render(path: Path, recipe: Mapping[str, Any]) -> str:
    """Return the card of the run in `path`: summary, how to load it, scores, how to repeat it.

    `recipe` has a value for each key, like that of `Recipe.model_dump()`.
    """
    environment = read_environment(path)
    base = str(environment.get("base", recipe["model"]))
    parts = [
        f"---\n{_front_matter(path, recipe, base).to_yaml()}\n---",
        f"# {path.resolve().name}",
        _summary(path, recipe, environment),
        "## Use\n\n" + (_usage(path, recipe, base) if environment.get("finished") else UNFINISHED),
        _scores(path),
        "## Repeat\n\n```\npython -m milora_vl.train --recipe recipe.yaml --output_dir NEW_FOLDER\n```\n\n"
        "`recipe.yaml` contains all settings, `environment.json` the versions, `policy.json` the trained modules and\n"
        "the measurements per layer.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(path: Path, recipe: Mapping[str, Any], base: str) -> ModelCardData:
    """Return the front matter for hubs, where names of folders and of local files are invalid.

    The license is the base model's, which the hub calls `other` with a name and a link.
    """
    from huggingface_hub import ModelCardData

    is_adapter, is_on_hub = has_config(path), _HUB_ID.fullmatch(base) is not None and not Path(base).is_dir()
    sets = [name.removeprefix("hub:").split(":")[0] for name in _data_files(recipe) if name.startswith("hub:")]
    relation: dict[str, Any] = {"base_model_relation": "adapter" if is_adapter else "finetune"} if is_on_hub else {}
    return ModelCardData(
        base_model=base if is_on_hub else None,
        library_name="peft" if is_adapter else "transformers",
        license="other",
        license_name="license-of-the-base-model",
        license_link=f"https://huggingface.co/{base}" if is_on_hub and "/" in base else None,
        pipeline_tag=_task(path),
        tags=sorted({"milora-vl"} | {str(rule["method"]) for rule in recipe["policy"] or () if "method" in rule}),
        datasets=sets or None,
        model_name=path.resolve().name,
        eval_results=_results(path) or None,
        **relation,
    )


def _task(path: Path) -> str:
    return "text-generation" if holds_text_model(path) else "image-text-to-text"


def _results(path: Path) -> list[EvalResult]:
    """Return the headline of each benchmark of the finished model."""
    from huggingface_hub import EvalResult

    results = []
    for file in sorted(path.glob("eval/*/final/results.json")):
        for benchmark in _json(file).get("benchmarks", []):
            for metric in benchmark["metrics"][:1]:
                factor = 100 if metric.get("unit", "fraction") == "fraction" else 1
                results.append(
                    EvalResult(
                        task_type=_task(path),
                        dataset_type=benchmark["name"],
                        dataset_name=benchmark["name"],
                        metric_type="accuracy",
                        metric_name=metric["name"],
                        metric_value=round(factor * metric["value"], 2),
                    )
                )
    return results


def update_scores(path: Path) -> None:
    """Update the scores in the card of the run in `path`, also in its front matter.

    The rest, which users may edit, does not change.
    """
    from huggingface_hub import ModelCard

    file = path / "README.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    before, begin, tail = text.partition(SCORES_BEGIN)
    _, end, after = tail.partition(SCORES_END)
    if begin and end:
        card = ModelCard(before + _scores(path) + after, ignore_metadata_errors=True)
        data: Any = card.data
        data.model_name, data.eval_results = path.resolve().name, _results(path) or None
        file.write_text(str(card), encoding="utf-8")


def _summary(path: Path, recipe: Mapping[str, Any], environment: dict[str, Any]) -> str:
    policy = _json(path / "policy.json")
    trained = f", {policy['trainable']:,} of {policy['total']:,} parameters trained" if "trainable" in policy else ""
    records = environment.get("data", {}).get("train")
    data = "" if records is None else f" on {records:,} records"  # the length of a stream is unknown
    loss = _last_loss(path)
    adapter = f" with the adapter `{recipe['adapter']}`" if recipe["adapter"] else ""
    rules = "\n".join(f"- {_rule_text(rule)}" for rule in recipe["policy"] or ())
    earlier = ", ".join(f"`{task['run']}`" for task in _json(path / "milora.json").get("tasks", ())[:-1])
    return (
        f"`{recipe['model']}`{adapter} fine-tuned{data}{trained}."
        + (f" Training loss at the end: {loss:.4f}." if loss is not None else "")
        + (f" The LoRA also holds the updates of {earlier}." if earlier else "")
        + f"\n\n{rules}"
        + (f"\n\n{lowered}" if (lowered := lowered_shares(policy)) else "")
    )


def _rule_text(rule: dict[str, Any]) -> str:
    fields = ", ".join(f"{k} {v}" for k, v in rule.items() if k != "modules")
    trains = f" ({what_trains(rule['method'], rule.get('protect'))})" if "method" in rule else ""
    return f"`{rule.get('modules')}`: {fields}{trains}"


def _usage(path: Path, recipe: Mapping[str, Any], base: str) -> str:
    model = recipe["model"]
    if has_config(path):
        code = (
            "from milora_vl import load_model\n\n"
            f'model, processor = load_model("{model}", adapter="PATH_OF_THIS_FOLDER")'
        )
        return (
            f"```python\n{code}\n```\n\n"
            f"It is a stock PEFT LoRA for `{base}`. On the loaded base model, `PeftModel.from_pretrained(base, PATH)` "
            "works without `milora_vl`."
        )
    if holds_projector_alone(path):
        return f"```\npython -m milora_vl.train --model {model} --projector_weights PATH_OF_THIS_FOLDER ...\n```"
    return '```python\nfrom milora_vl import load_model\n\nmodel, processor = load_model("PATH_OF_THIS_FOLDER")\n```'


def _scores(path: Path) -> str:
    tables: list[str] = []
    for suite in sorted(path.glob("eval/*")):
        texts = {
            table.parent.name: table.read_text(encoding="utf-8").strip() for table in sorted(suite.glob("*/table.md"))
        }
        if len(texts) > 1:
            texts.pop("base", None)  # the table of the tuned model includes the base scores
        tables += texts.values()
    text = "## Scores\n\n" + "\n\n".join(dict.fromkeys(tables)) + "\n\n" if tables else ""
    return f"{SCORES_BEGIN}\n\n{text}{SCORES_END}"


def _last_loss(path: Path) -> float | None:
    losses: Iterable[float] = [
        e["loss"] for e in _json(path / "trainer_state.json").get("log_history", []) if "loss" in e
    ]
    return next(reversed(list(losses)), None)


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _data_files(recipe: Mapping[str, Any]) -> list[str]:
    path = recipe["data"]["path"]
    return [source["path"] for source in path] if isinstance(path, list) else [path] if path else []
