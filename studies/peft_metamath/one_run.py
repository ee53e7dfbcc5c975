"""One arm and seed, in a separate process: `python -m studies.peft_metamath.one_run CHECKOUT ARM FOLDER`.

PEFT's run.py trains and measures. Replaced in it are:

- `get_model`: it returns the base with our adapter for our arms.
- `get_train_valid_test_datasets`: PEFT reads MetaMathQA in its order, and its `init_accelerator` seeds torch with 0
  for any seed. With seed 0 that stays, so the run equals PEFT's; other seeds shuffle the training set and seed the
  start of the adapter.
- `get_peft_branch`: it needs a PEFT that is installed from a git repository.
- `log_to_file`: PEFT's log goes to FOLDER/result.json, with our policy beside its settings.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from milora_vl import apply_milora, calibration_texts
from milora_vl.common.atomic_write import write_json
from milora_vl.common.cli.command_line import run as run_command
from milora_vl.common.errors import UserError
from studies.peft_metamath.arms import OURS, rules

SCRIPT = Path("method_comparison", "MetaMathQA")
RESULT = "result.json"
TASK_RECORDS, TASK_ROWS = 64, 4  # of the task's gradient, as in our command


def main(argv: list[str] | None = None) -> int:
    """Run the arm and write its result. The settings are in the folder, as PEFT's run.py reads them."""
    checkout, arm, folder = sys.argv[1:] if argv is None else argv
    sys.path.insert(0, str(Path(checkout) / SCRIPT))
    script, utils = importlib.import_module("run"), importlib.import_module("utils")
    _require(script, "get_train_valid_test_datasets", "get_model", "get_peft_branch")
    _require(utils, "get_peft_branch", "log_to_file")
    settings = utils.get_train_config(str(Path(folder) / utils.FILE_NAME_TRAIN_PARAMS))
    policy: list[dict[str, Any]] = []
    read, load = script.get_train_valid_test_datasets, script.get_model

    def datasets(**options: Any) -> tuple[Any, ...]:
        train, *others = read(**options)
        return (train.shuffle(seed=settings.seed) if settings.seed else train, *others)

    def get_model(*, peft_config: Any, **options: Any) -> Any:
        if settings.seed:
            torch.manual_seed(settings.seed)
        if arm not in OURS:
            return load(peft_config=peft_config, **options)
        base = load(peft_config=None, **options)
        policy.extend(rules(arm, base, peft_config))
        protects, needs_task = "protect" in OURS[arm], OURS[arm]["method"] == "gradient"
        return apply_milora(
            base,
            policy,
            calibration=calibration_texts(base) if protects else None,
            task=_task(script, utils, settings) if needs_task else None,
            progress=True,
        )

    def log_to_file(*, log_data: dict[str, Any], **_: Any) -> None:
        write_json(Path(folder) / RESULT, {**log_data, "milora_vl": {"arm": arm, "policy": policy}})

    script.get_train_valid_test_datasets, script.get_model = datasets, get_model  # type: ignore[attr-defined]
    script.get_peft_branch = utils.get_peft_branch = lambda: ""  # type: ignore[attr-defined]
    utils.log_to_file = log_to_file  # type: ignore[attr-defined]
    script.print_verbose = print  # type: ignore[attr-defined]  # run.py defines it where it is the main program
    script.main(path_experiment=folder, experiment_name=arm, clean=True, bucket_name=None)
    return 0


def _task(script: ModuleType, utils: ModuleType, settings: Any) -> list[dict[str, Any]]:
    """Return the first training records as batches with labels; as in PEFT's loss, the question counts too."""
    tokenizer = utils.get_tokenizer(model_id=settings.model_id, max_seq_length=settings.max_seq_length)
    train, *_ = script.get_train_valid_test_datasets(
        tokenizer=tokenizer, query_template=settings.query_template, print_fn=print
    )
    batches = []
    for start in range(0, min(TASK_RECORDS, len(train)), TASK_ROWS):
        rows = train[start : start + TASK_ROWS]
        batch = tokenizer.pad({name: rows[name] for name in ("input_ids", "attention_mask")}, return_tensors="pt")
        batches.append({**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)})
    return batches


def _require(module: ModuleType, *names: str) -> None:
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise UserError(
            f"{module.__file__} has no {missing[0]}, so this version of PEFT's script cannot take our adapters",
            code="peft-script-changed",
            where="--peft_checkout",
            hint="use the commit that studies/peft_metamath/README.md names",
        )


if __name__ == "__main__":
    run_command(main)  # type: ignore[arg-type]
