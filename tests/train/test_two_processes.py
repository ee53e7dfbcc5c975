"""What two processes must not change or get wrong: pieces of the loss, evaluation, half precision, a base of parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from milora_vl.train.__main__ import main
from support.launched import KINDS, needs_bf16_shards, needs_deepspeed, train_in_two
from support.train_runs import losses, training

pytestmark = [pytest.mark.slow, needs_deepspeed]
EXTRA = ["--rank", "4", "--dropout", "0", "--max_steps", "4"]
TWO = ["--per_device_train_batch_size", "2"]


def evaluations(run: Path) -> list[float]:
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    found = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert found
    return found


@pytest.fixture
def uneven(tiny_data: Path) -> Path:
    """8 records with pictures, 24 of text alone, with 1 to 40 words of answer; 7 to evaluate on."""
    records = json.loads((tiny_data / "train.json").read_text())[:8]
    for i in range(24):
        turns = [{"from": "human", "value": f"Count to {i}."}, {"from": "gpt", "value": "word " * (1 + i * 7 % 40)}]
        records.append({"id": f"u{i}", "conversations": turns})
    (tiny_data / "train.json").write_text(json.dumps(records))
    (tiny_data / "val.json").write_text(json.dumps(records[5:12]))
    return tiny_data


def test_losses_in_pieces_and_evaluations_are_those_of_one_process(
    uneven: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Ranks make different numbers of pieces, some empty; the last batch of the evaluation is not full."""
    extra = ["--model", str(tiny_folder), *EXTRA, "--eval_data_path", str(uneven / "val.json")]
    extra += ["--eval_strategy", "steps", "--eval_steps", "2", "--per_device_eval_batch_size", "2"]
    assert main(training(uneven, tmp_path / "one", *extra)) == 0
    lines = [training(uneven, tmp_path / kind, *extra, *TWO, *more) for kind, more in KINDS.items()]
    lines[0] += ["--forgetting_every", "4"]
    train_in_two(lines, tmp_path, chunk=3000)
    for kind in KINDS:
        for found in (losses, evaluations):
            expected = torch.tensor(found(tmp_path / "one"))
            torch.testing.assert_close(torch.tensor(found(tmp_path / kind)), expected, rtol=0, atol=1e-5)


@needs_bf16_shards
def test_the_best_model_comes_back_and_half_precision_trains(uneven: Path, tiny_folder: Path, tmp_path: Path) -> None:
    extra = ["--model", str(tiny_folder), *EXTRA, *TWO]
    best = ["--eval_data_path", str(uneven / "val.json"), "--load_best_model_at_end", "--greater_is_better", "True"]
    half = ["--dtype", "bfloat16", "--bf16", "True"]
    assert main(training(uneven, tmp_path / "half", *EXTRA, *half)) == 0
    zero = [kind for kind in KINDS if kind != "ddp"]
    train_in_two(
        [training(uneven, tmp_path / (kind + name), *extra, *more, *KINDS[kind])
         for kind in zero for name, more in (("best", best), ("half", half))],
        tmp_path,
    )  # fmt: skip
    for kind in zero:
        run = tmp_path / f"{kind}best"
        state = json.loads((run / "trainer_state.json").read_text())
        assert state["best_global_step"] == 2, "the highest loss is the best here"
        kept, final = (load_file(f / "adapter_model.safetensors") for f in (run / "checkpoint-2", run))
        assert all(torch.equal(final[name], kept[name]) for name in kept)
        first, second = losses(tmp_path / "half"), losses(tmp_path / f"{kind}half")
        assert [loss for _, loss in second] == pytest.approx([loss for _, loss in first], rel=5e-3)
