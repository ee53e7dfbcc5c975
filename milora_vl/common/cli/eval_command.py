"""The command line of `milora_eval run`, as other commands start or show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def eval_run(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    suite: Sequence[str | Path] | str,
    data: str | Path | None = None,
    limit: int | None = None,
    with_base: bool = True,
    output_dir: str | Path,
) -> list[str]:
    """Return the words of an evaluation of a model with its adapter, or of a full model beside its base.

    `suite` is the name of a suite, or the words that choose benchmarks.

    >>> " ".join(eval_run("tiny", adapter="runs/a", suite="quick", output_dir="runs/a"))
    'milora_eval run --model tiny --adapter runs/a --suite quick --with_base --output_dir runs/a'
    """
    words: list[str | Path] = ["milora_eval", "run", "--model", model]
    words += [] if adapter is None else ["--adapter", adapter]
    words += [] if base is None else ["--base", base]
    words += ["--suite", suite] if isinstance(suite, str) else suite
    words += [] if data is None else ["--data", data]
    words += [] if limit is None else ["--limit", str(limit)]
    words += ["--with_base"] if with_base else []
    return [*map(str, words), "--output_dir", str(output_dir)]


def eval_trained(
    run: Path, model: str, suite: str, *, data: str | None, limit: int | None, with_base: bool = True
) -> list[str]:
    """Return the words that evaluate a run on `model`, into its folder; a config.json there means a full training."""
    if (run / "config.json").is_file():
        return eval_run(run, base=model, suite=suite, data=data, limit=limit, with_base=with_base, output_dir=run)
    return eval_run(model, adapter=run, suite=suite, data=data, limit=limit, with_base=with_base, output_dir=run)


def questions_of(recipe: Mapping[str, Any]) -> list[str]:
    """Return the flags of `milora_eval run` for the questions that the recipe of a run names; [] if it names none.

    These are its suites, else the test set of the demo's data, else the held-out records.
    """
    config, data = recipe.get("eval") or {}, recipe.get("data") or {}
    pictures = ["--data", data["image_folder"]] if data.get("image_folder") else []
    for suite in (config.get("suites") or [])[:1]:
        folder = ["--data", config["data"]] if config.get("data") else pictures if is_file(suite) else []
        return ["--suite", suite, *folder]
    path, held_out = str(data.get("path")), str(data.get("eval_path"))
    if Path(path).parent.name == "emoji" or Path(path).with_name("captions_val.json").is_file():
        return ["--suite", "emoji", "--data", str(Path(path).parent)]
    return ["--benchmarks", held_out, *pictures] if is_file(held_out) else []


def is_file(suite: str) -> bool:
    """Return whether an entry of `eval.suites` is a file of own questions."""
    return Path(suite).suffix in (".json", ".jsonl")
