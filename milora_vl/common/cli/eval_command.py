"""The command line of `milora_eval run`, as other commands start or show it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


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
