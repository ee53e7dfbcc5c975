"""FSDP2: the losses of one process, and checkpoints that it continues; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from milora_vl.models.tiny import tiny_tokenizer
from milora_vl.train import launch
from milora_vl.train.__main__ import main
from support.launched import FSDP, needs_bf16_shards, train_in_two
from support.problems import raises_code
from support.train_runs import losses, training

NAME = "adapter_model.safetensors"


def difference(first: Path, second: Path) -> float:
    return max(abs(one - other) for (_, one), (_, other) in zip(losses(first), losses(second), strict=True))


@pytest.mark.slow
def test_a_run_with_fsdp_continues_with_the_same_bits_and_in_one_process_without(
    tiny_data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another folder and with an empty cache. LLaVA reads no last layer of the vision tower: it has no gradients."""
    rules = "[{modules: language, method: milora, rank: 4}, {modules: vision, method: lora, rank: 4}]"
    extra = ["--model", str(tiny_folder), "--policy", rules, "--dropout", "0", "--gradient_checkpointing"]
    extra += ["--base_kl_weight", "0"]  # each process reads other texts
    two = [*extra, "--per_device_train_batch_size", "2"]
    resume = ["--resume_from_checkpoint", str(tmp_path / "two" / "checkpoint-4")]
    assert main(training(tiny_data, tmp_path / "one", *extra)) == 0
    train_in_two(
        [
            training(tiny_data, tmp_path / "two", *two, *FSDP),
            training(tiny_data, tmp_path / "again", *two, *FSDP, *resume),
            training(tiny_data, tmp_path / "gradients", *two, "--fsdp", "shard_grad_op"),
        ],
        tmp_path,
    )
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "empty"))
    assert main(training(tiny_data, tmp_path / "elsewhere", *extra, *resume)) == 0
    assert losses(tmp_path / "again")[-2:] == losses(tmp_path / "two")[-2:]
    assert (tmp_path / "again" / NAME).read_bytes() == (tmp_path / "two" / NAME).read_bytes()
    last, expected = (dict(losses(tmp_path / run)[-2:]) for run in ("elsewhere", "one"))
    assert last == pytest.approx(expected, abs=1e-5)
    for run in ("two", "gradients"):
        assert difference(tmp_path / "one", tmp_path / run) <= 1e-5, run
    one, *others = (load_file(tmp_path / run / NAME) for run in ("one", "two", "elsewhere", "gradients"))
    for other in others:
        torch.testing.assert_close(other, one, rtol=0, atol=2e-4)  # what a step of Adam makes of rounding
    assert max(float(tensor.abs().max()) for name, tensor in one.items() if "lora_B" in name) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_of_a_text_model_trains_under_fsdp(tied: bool, tiny_data: Path, tmp_path: Path) -> None:
    """accelerate shards norm and head as one group, a tied head with the embedding; our loss calls the head alone."""
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    records = [
        {"id": str(i), "conversations": [{"from": "human", "value": f"Count to {i}."},
                                         {"from": "gpt", "value": "word " * (1 + i % 9)}]}
        for i in range(24)
    ]  # fmt: skip
    (tiny_data / "train.json").write_text(json.dumps(records))
    methods = {
        "paper": ["--protect", "0", "--rank", "4", "--dropout", "0"],
        "default": ["--rank", "4", "--dropout", "0", "--protect", "0.5"],
    }
    extra = ["--model", str(tmp_path / "base"), "--template", "vicuna_v1", "--max_steps", "4"]
    evaluation = ["--eval_data_path", str(tiny_data / "train.json"), "--eval_strategy", "steps", "--eval_steps", "2"]
    two = [*extra, *evaluation, "--per_device_train_batch_size", "2", *FSDP]
    train_in_two(
        [training(tiny_data, tmp_path / name, *two, *words) for name, words in methods.items()], tmp_path, chunk=3000
    )
    for name, words in methods.items():
        assert main(training(tiny_data, tmp_path / f"one-{name}", *extra, *evaluation, *words)) == 0
        assert difference(tmp_path / f"one-{name}", tmp_path / name) <= 1e-5


@pytest.mark.slow
@needs_bf16_shards
def test_float32_adapters_train_on_a_bfloat16_base_under_autocast(
    tiny_data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    words = ["--model", str(tiny_folder), "--rank", "4", "--dropout", "0", "--bf16", "True", "--dtype", "bfloat16"]
    assert main(training(tiny_data, tmp_path / "one", *words)) == 0
    train_in_two([training(tiny_data, tmp_path / "two", *words, "--per_device_train_batch_size", "2", *FSDP)], tmp_path)
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-3
    adapters = [load_file(tmp_path / run / NAME) for run in ("one", "two")]
    assert adapters[0].keys() == adapters[1].keys()
    assert {tensor.dtype for tensor in adapters[1].values()} == {torch.float32}


def test_another_strategy_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    with raises_code("launch-fsdp", where="--fsdp", message="expected full_shard or shard_grad_op"):
        main(training(tiny_data, tmp_path / "run", "--rank", "4", "--fsdp", "hybrid_shard"))
    with raises_code("recipe-refused", where="--fsdp_config"):
        main(training(tiny_data, tmp_path / "run", "--rank", "4", "--fsdp", "--fsdp_config", '{"version": 1}'))


@pytest.mark.parametrize("more", [["--fp16"], ["--deepspeed", "zero2"], ["--torch_compile"]])
def test_arguments_that_fsdp_does_not_support_are_refused(more: list[str], tiny_data: Path, tmp_path: Path) -> None:
    with raises_code("launch-fsdp", where="--fsdp", message="does not work together with"):
        main(training(tiny_data, tmp_path / "run", "--rank", "4", *FSDP, *more))
    assert not (tmp_path / "run").exists()


def test_a_version_that_would_double_the_frozen_base_is_refused(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "is_accelerate_available", lambda minimum: minimum != "1.13.0")
    with raises_code("launch-fsdp", where="--fsdp", hint="accelerate>=1.13"):
        main(training(tiny_data, tmp_path / "run", "--rank", "4", *FSDP, "--bf16", "True"))


def test_one_process_has_nothing_to_shard(tiny_data: Path, tmp_path: Path) -> None:
    with raises_code("launch-fsdp", where="--fsdp"):
        main(training(tiny_data, tmp_path / "run", "--rank", "4", *FSDP))
    assert not (tmp_path / "run").exists()
