"""The names of PEFT's utils.py that its run.py and our hook use, for a tiny model on a CPU."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import peft

from milora_vl.models.tiny import tiny_llama

HERE = Path(__file__).parent
FILE_NAME_TRAIN_PARAMS = "training_params.json"


def get_train_config(path):
    default = json.loads((HERE / "default_training_params.json").read_text())
    own = Path(path)
    return SimpleNamespace(**default | (json.loads(own.read_text()) if own.is_file() else {}))


def get_tokenizer(*, model_id, max_seq_length):
    tokenizer = tiny_llama()[1]
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def get_model(*, model_id, dtype, peft_config, autocast_adapter_dtype):
    model = tiny_llama()[0]
    if peft_config is None:
        return model
    return peft.get_peft_model(model, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)


def get_peft_branch():
    command = ["git", "rev-parse", "--abbrev-ref", "HEAD"]
    return subprocess.check_output(command, cwd="/").decode().strip()  # fails: the PEFT of a wheel


def log_to_file(*, log_data, save_dir, experiment_name, timestamp, print_fn):
    raise AssertionError("the result belongs to the output folder, not to the checkout")


def log_results(*, experiment_name, log, print_fn):
    log["run_info"]["peft_branch"] = get_peft_branch()
    log_to_file(log_data=log, save_dir="", experiment_name=experiment_name, timestamp="", print_fn=print_fn)
