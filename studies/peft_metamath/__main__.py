"""`python -m studies.peft_metamath`: run the arms one after the other, then show the table."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_vl.common.atomic_write import read_json, write_json, write_text
from milora_vl.common.cli.command_line import did_you_mean, no_folder, run, suggest
from milora_vl.common.cli.flags import Command, from_zero, option, positive, shared
from milora_vl.common.cli.table import Table
from milora_vl.common.errors import UserError
from milora_vl.sweep.runner import alone
from studies.peft_metamath.arms import ARMS, FIXED, LORA, OSF, OURS
from studies.peft_metamath.one_run import RESULT, SCRIPT

COMMAND = Command(
    "studies.peft_metamath",
    "Run PEFT's comparison on MetaMathQA with our adapters, on one GPU.",
    f"""\
An arm is one of {", ".join(OURS)}, or the folder of an experiment of PEFT ({LORA}).
Run the same command again to resume: finished arms and seeds are kept.

examples:
  python -m studies.peft_metamath --peft_checkout peft --output_dir runs/metamath
  python -m studies.peft_metamath --peft_checkout peft --output_dir runs/metamath --arms gradient --seeds 0 1 2
""",
    inputs=(
        option("--peft_checkout", type=Path, required=True, metavar="FOLDER", help="clone of huggingface/peft"),
        shared("model", about="base model (default: the base of PEFT's comparison, Llama-3.2-3B)"),
    ),
    settings=(
        option("--arms", nargs="+", default=ARMS, metavar="ARM", help="arms to run (default: all)"),
        option("--seeds", nargs="+", type=int, default=[0], metavar="N", help="random seeds (default: 0, PEFT's)"),
        option("--learning_rate", type=from_zero, metavar="X", help="rate of these arms (default: PEFT's)"),
        option("--max_steps", type=positive, help="number of steps, to try the command (default: PEFT's)"),
    ),
    outputs=(shared("output_dir", required=True),),
)
Result = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if an arm failed. Raises UserError for unknown arms."""
    options = COMMAND.parse(argv)
    script: Path = options.peft_checkout / SCRIPT
    if not script.is_dir():
        raise UserError(problems=[no_folder(script, "--peft_checkout")])
    for arm in options.arms:
        _require_arm(arm, script)
    failed = False
    with alone(options.output_dir):
        for arm in options.arms:
            for seed in options.seeds:
                failed |= not _run_one(options, arm, seed)
        table = _table(options.output_dir, script / "results").markdown()
        write_text(options.output_dir / "table.md", table)
    sys.stdout.write(table)
    return int(failed)


def _require_arm(arm: str, script: Path) -> None:
    experiments = script / "experiments"
    if arm in OURS or (experiments / arm / "adapter_config.json").is_file():
        return
    theirs = sorted(file.parent.relative_to(experiments).as_posix() for file in experiments.glob("*/*/*_config.json"))
    hint = (
        did_you_mean(suggest(arm, [*OURS, *theirs])) or f"the arms are {', '.join(OURS)} and folders in {experiments}"
    )
    raise UserError(f"unknown arm {arm!r}", code="flag-value", where="--arms", hint=hint)


def _run_one(options: Any, arm: str, seed: int) -> bool:
    """Run one arm with one seed in a new process, unless its result is there, and return True if it has succeeded."""
    rate = f"-lr_{options.learning_rate:g}" if options.learning_rate else ""
    folder: Path = options.output_dir / f"{arm.replace('/', '--')}{rate}" / f"seed-{seed}"
    settings, chosen = _settings(options, arm, seed), folder / "training_params.json"
    if _status(folder / RESULT) == "success":
        if read_json(chosen) != settings:
            raise UserError(
                f"{folder} has a result with other settings",
                code="study-other-settings",
                where="--output_dir",
                hint="use another folder, or delete this one",
            )
        sys.stderr.write(f"done    {folder}\n")
        return True
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    experiment = options.peft_checkout / SCRIPT / "experiments" / (LORA if arm in OURS else arm)
    adapter = (experiment / "adapter_config.json").read_text(encoding="utf-8")
    write_text(folder / "adapter_config.json", adapter)
    write_json(chosen, settings)
    log = folder / "log.txt"
    sys.stderr.write(f"running {folder}; log: {log}\n")
    words = [sys.executable, "-m", "studies.peft_metamath.one_run", str(options.peft_checkout), arm, str(folder)]
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT).returncode
    if code == 0 and _status(folder / RESULT) == "success":
        return True
    error = (read_json(folder / RESULT) or {}).get("run_info", {}).get("error_msg")
    last_line = log.read_text(encoding="utf-8", errors="replace").rstrip().rpartition("\n")[2]
    sys.stderr.write(f"FAILED  {folder}: {error or last_line or f'exit code {code}'}\n")
    return False


def _settings(options: Any, arm: str, seed: int) -> dict[str, Any]:
    """Return the settings of the arm that differ from PEFT's default, as its run.py reads them."""
    script = options.peft_checkout / SCRIPT
    default = json.loads((script / "default_training_params.json").read_text(encoding="utf-8"))
    own = {} if arm in OURS else read_json(script / "experiments" / arm / "training_params.json") or {}
    settings = {**own, "seed": seed}
    if options.model:
        settings["model_id"] = options.model
    if options.max_steps:
        settings |= {"max_steps": options.max_steps, "eval_steps": min(options.max_steps, default["eval_steps"])}
    if options.learning_rate:
        settings["optimizer_kwargs"] = default["optimizer_kwargs"] | own.get("optimizer_kwargs", {})
        settings["optimizer_kwargs"] |= {"lr": options.learning_rate}
    return settings


def _status(file: Path) -> str | None:
    return ((read_json(file) or {}).get("train_info") or {}).get("status")


def _table(folder: Path, published: Path) -> Table:
    """Return the table of all finished runs in the folder, then PEFT's own published results."""
    header = (
        "arm", "seeds", "test accuracy", "forgetting", "train loss", "trained parameters", "memory max (GiB)",
        "train time (s)", "total time (s)", "checkpoint (MB)", "device",
    )  # fmt: skip
    rows = []
    for arm in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = [file for file in sorted(arm.glob(f"seed-*/{RESULT}")) if _status(file) == "success"]
        if files:
            rows.append(_row(arm.name, [json.loads(file.read_text(encoding="utf-8")) for file in files]))
    for name in (LORA, OSF, *FIXED):
        result = read_json(published / f"{name.replace('/', '--')}.json")
        if result:
            rows.append(_row(f"PEFT's: {name}", [result]))
    return Table(
        header,
        tuple(rows),
        "Accuracy: GSM8K's test set. Forgetting: loss on Wikipedia after the training less before, in nats a token.\n"
        "Several seeds: mean ± standard deviation, or mean. PEFT's: the published results in the checkout.\n"
        "The total time and the memory of our arms contain the calibration.",
    )


def _row(name: str, results: Sequence[Result]) -> tuple[str, ...]:
    trained = [result["train_info"] for result in results]
    last = [info["metrics"][-1] for info in trained]

    def mean(values: Sequence[float], form: str) -> str:
        return format(statistics.mean(values), form)

    def spread(values: Sequence[float], form: str) -> str:
        return mean(values, form) + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")

    return (
        name,
        str(len(results)),
        spread([100 * metrics["test accuracy"] for metrics in last], ".1f") + " %",
        spread([metrics["forgetting"] for metrics in last], ".3f"),
        mean([metrics["train loss"] for metrics in last], ".3f"),
        mean([info["num_trainable_params"] for info in trained], ",.0f"),
        mean([info["accelerator_memory_max"] / 2**30 for info in trained], ".1f"),
        mean([info["train_time"] for info in trained], ",.0f"),
        mean([result["run_info"]["total_time"] for result in results], ",.0f"),
        mean([info["file_size"] / 1e6 for info in trained], ".0f"),
        ", ".join(sorted({result["meta_info"]["system_info"]["accelerator"] for result in results})),
    )


if __name__ == "__main__":
    run(main)
