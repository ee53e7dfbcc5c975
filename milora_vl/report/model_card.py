"""The model card of a run (README.md): front matter for model hubs, results, usage."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from milora_vl.adapter.checkpoints import read_environment
from milora_vl.adapter.folders import has_config, holds_projector_alone, holds_text_model
from milora_vl.recipe.schema import Recipe

UNFINISHED = (
    "This training did not finish, so this folder has no final weights. To resume, repeat the command of\n"
    "`environment.json` with `--resume_from_checkpoint auto`."
)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FRONT = re.compile(r"---\n(.*?)^---$", re.DOTALL | re.MULTILINE)
SCORES_BEGIN, SCORES_END = "<!-- scores -->", "<!-- end of scores -->"


def render(path: Path, recipe: Recipe) -> str:
    """Return the card of the run in `path`: summary, how to load it, scores, how to repeat it."""
    environment = read_environment(path)
    base = str(environment.get("base", recipe.model))
    parts = [
        _written(_front_matter(path, recipe, base)),
        f"# {path.resolve().name}",
        _summary(path, recipe, environment),
        "## Use\n\n" + (_usage(path, recipe, base) if environment.get("finished") else UNFINISHED),
        _scores(path),
        "## Repeat\n\n```\npython -m milora_vl.train --recipe recipe.yaml --output_dir NEW_FOLDER\n```\n\n"
        "`recipe.yaml` contains all settings, `environment.json` the versions, `policy.json` the trained modules and\n"
        "the measurements per layer. Method: MiLoRA, arXiv:2406.09044.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(path: Path, recipe: Recipe, base: str) -> dict[str, Any]:
    """Return the front matter in the hub's schema, where names of folders and of local files are invalid.

    The license is the base model's, which the hub calls `other` with a name and a link.
    """
    is_adapter, is_on_hub = has_config(path), _HUB_ID.fullmatch(base) is not None and not Path(base).is_dir()
    link = {"license_link": f"https://huggingface.co/{base}"} if is_on_hub and "/" in base else {}
    sets = [name.removeprefix("hub:").split(":")[0] for name in _data_files(recipe) if name.startswith("hub:")]
    return {
        **({"base_model": base} if is_on_hub else {}),
        **({"base_model_relation": "adapter" if is_adapter else "finetune"} if is_on_hub else {}),
        "library_name": "peft" if is_adapter else "transformers",
        "license": "other",
        "license_name": "license-of-the-base-model",
        **link,
        "pipeline_tag": _task(path),
        "tags": sorted({"milora"} | {str(rule["method"]) for rule in recipe.policy or () if "method" in rule}),
        **({"datasets": sets} if sets else {}),
        **_results(path),
    }


def _task(path: Path) -> str:
    return "text-generation" if holds_text_model(path) else "image-text-to-text"


def _results(path: Path) -> dict[str, Any]:
    """Return `metrics` and `model-index` with the headline of each benchmark of the finished model, if any."""
    results, metrics = [], []
    for file in sorted(path.glob("eval/*/final/results.json")):
        for benchmark in _json(file).get("benchmarks", []):
            for metric in benchmark["metrics"][:1]:
                factor = 100 if metric.get("unit", "fraction") == "fraction" else 1
                value = {"type": "accuracy", "name": metric["name"], "value": round(factor * metric["value"], 2)}
                data = {"name": benchmark["name"], "type": benchmark["name"]}
                results.append({"task": {"type": _task(path)}, "dataset": data, "metrics": [value]})
                metrics.append("accuracy")
    if not results:
        return {}
    return {"metrics": sorted(set(metrics)), "model-index": [{"name": path.resolve().name, "results": results}]}


def _written(front: dict[str, Any]) -> str:
    return "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---"


def update_scores(path: Path) -> None:
    """Update the scores in the card of the run in `path`, also in its front matter.

    The rest, which users may edit, does not change.
    """
    card = path / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    before, begin, tail = text.partition(SCORES_BEGIN)
    _, end, after = tail.partition(SCORES_END)
    if begin and end:
        card.write_text(_with_results(before, _results(path)) + _scores(path) + after, encoding="utf-8")


def _with_results(text: str, results: dict[str, Any]) -> str:
    """Return the begin of a card with other results in its front matter; unchanged without front matter."""
    found = _FRONT.match(text)
    if found is None:
        return text
    front = yaml.safe_load(found[1]) or {}
    kept = {key: value for key, value in front.items() if key not in ("metrics", "model-index")}
    return _written(kept | results) + text[found.end() :]


def _summary(path: Path, recipe: Recipe, environment: dict[str, Any]) -> str:
    policy = _json(path / "policy.json")
    trained = f", {policy['trainable']:,} of {policy['total']:,} parameters trained" if "trainable" in policy else ""
    records = environment.get("data", {}).get("train")
    data = "" if records is None else f" on {records:,} records"  # the length of a stream is unknown
    loss = _last_loss(path)
    rules = "\n".join(f"- {_rule_text(rule)}" for rule in recipe.policy or ())
    return (
        f"`{recipe.model}` fine-tuned{data}{trained}."
        + (f" Training loss at the end: {loss:.4f}." if loss is not None else "")
        + f"\n\n{rules}"
    )


def _rule_text(rule: dict[str, Any]) -> str:
    return f"`{rule.get('modules')}`: " + ", ".join(f"{k} {v}" for k, v in rule.items() if k != "modules")


def _usage(path: Path, recipe: Recipe, base: str) -> str:
    if has_config(path):
        code = (
            "from milora_vl import load_model\n\n"
            f'model, processor = load_model("{recipe.model}", adapter="PATH_OF_THIS_FOLDER")'
        )
        return (
            f"```python\n{code}\n```\n\n"
            f"It is a stock PEFT LoRA for `{base}`. On the loaded base model, `PeftModel.from_pretrained(base, PATH)` "
            "works without `milora_vl`."
        )
    if holds_projector_alone(path):
        return f"```\npython -m milora_vl.train --model {recipe.model} --projector_weights PATH_OF_THIS_FOLDER ...\n```"
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


def _data_files(recipe: Recipe) -> list[str]:
    path = recipe.data.path
    return [source.path for source in path] if isinstance(path, list) else [path] if path else []
