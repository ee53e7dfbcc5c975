"""A handful of records in the form of PEFT's data.py."""

from __future__ import annotations

from datasets import Dataset


def get_train_valid_test_datasets(*, tokenizer, query_template, print_fn):
    texts = [query_template.format(query=f"What is {n} plus {n}?") + f" The answer is: {2 * n}" for n in range(12)]
    tokenized = tokenizer(texts)
    rows = {"response": texts, "input_ids": tokenized["input_ids"], "attention_mask": tokenized["attention_mask"]}
    return Dataset.from_dict(rows), None, None
