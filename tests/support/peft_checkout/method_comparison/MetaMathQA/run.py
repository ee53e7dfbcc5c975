"""The way of PEFT's run.py: the same names and keywords, two steps on made-up records, measured on made-up texts."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftConfig
from utils import (
    FILE_NAME_TRAIN_PARAMS,
    get_model,
    get_peft_branch,
    get_tokenizer,
    get_train_config,
    log_results,
)

from data import get_train_valid_test_datasets


def general_loss(model, tokenizer):
    batch = tokenizer(["The river rises in the north."], return_tensors="pt")
    with torch.inference_mode():
        return model(**batch, labels=batch["input_ids"]).loss.item()


def train(*, model, config, tokenizer):
    optimizer = getattr(torch.optim, config.optimizer_type)(model.parameters(), **config.optimizer_kwargs)
    trained, _ = model.get_nb_trainable_parameters()
    with model.disable_adapter():
        before = general_loss(model, tokenizer)
    rows, _, _ = get_train_valid_test_datasets(
        tokenizer=tokenizer, query_template=config.query_template, print_fn=print_verbose
    )
    losses = []
    status, error_msg = "success", ""
    try:
        for step in range(config.max_steps):
            batch = tokenizer.pad(
                {k: v for k, v in rows[4 * step : 4 * step + 4].items() if k != "response"}, return_tensors="pt"
            )
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if "fail" in config.query_template:
            raise RuntimeError("made to fail")
    except Exception as error:
        status, error_msg = "canceled", str(error)
    forgetting = general_loss(model, tokenizer) - before
    metrics = [{"step": len(losses), "test accuracy": 0.5, "train loss": losses[-1], "forgetting": forgetting}]
    return {
        "run_info": {"total_time": 2.0, "error_msg": error_msg, "losses": losses},
        "train_info": {
            "status": status, "train_time": 1.0, "accelerator_memory_max": 2**30, "file_size": 10**6,
            "num_trainable_params": trained, "metrics": metrics,
        },
        "meta_info": {"system_info": {"accelerator": "a CPU"}},
    }  # fmt: skip


def main(*, path_experiment, experiment_name, clean, bucket_name):
    print_verbose(get_peft_branch())
    peft_config = PeftConfig.from_pretrained(path_experiment)
    config = get_train_config(Path(path_experiment) / FILE_NAME_TRAIN_PARAMS)
    torch.manual_seed(0)
    tokenizer = get_tokenizer(model_id=config.model_id, max_seq_length=config.max_seq_length)
    model = get_model(
        model_id=config.model_id,
        dtype=config.dtype,
        peft_config=peft_config,
        autocast_adapter_dtype=config.autocast_adapter_dtype,
    )
    log = train(model=model, config=config, tokenizer=tokenizer)
    log["run_info"]["max_steps"] = config.max_steps
    log_results(experiment_name=experiment_name, log=log, print_fn=print_verbose)


if __name__ == "__main__":  # as in PEFT's script, which is not the main program for us
    print_verbose = print
