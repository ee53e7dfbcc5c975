"""The real smol-llava, trained by the docs' command in one process, under ZeRO-2 and under ZeRO-3: the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from milora_eval.__main__ import main as evaluate
from milora_eval.answers.store import read_lines
from milora_vl.train.command import main
from support.launched import launched, needs_deepspeed
from support.train_runs import losses

DATA = Path(__file__).parents[2] / "data" / "emoji"
COMMAND = (
    "--recipe smol-llava-demo --use_cpu True --max_steps 4 --logging_steps 1 --eval_strategy no --save_strategy no "
    "--dropout 0 --dtype float32 --bf16 False --max_length 128 --rank 8 --base_kl_weight 0 --disable_tqdm True "
    f"--data_path {DATA}/train.json --image_folder {DATA}/images --eval_data_path {DATA}/val.json"
).split()


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.filterwarnings("ignore:too little calibration data")  # of a smoke run
@pytest.mark.skipif(not (DATA / "train.json").is_file(), reason="python -m milora_data emoji --output_dir data/emoji")
def test_the_three_adapters_give_the_same_answers(tmp_path: Path) -> None:
    def answers(name: str) -> list[tuple[str, str]]:
        run = str(tmp_path / name)
        options = ["--suite", "emoji", "--data", str(DATA), "--limit", "20", "--output_dir", run]
        assert evaluate(["run", "--model", "smol-llava", "--adapter", run, *options]) == 0
        lines = read_lines(tmp_path / name / "eval" / "emoji" / "final" / "predictions.jsonl")
        return [(line["id"], line["prediction"]) for line in lines]

    assert main([*COMMAND, "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "one")]) == 0
    expected, told = losses(tmp_path / "one"), answers("one")
    assert len(set(dict(told).values())) > 3, "a model that says one thing would prove little"
    for stage in ("zero2", "zero3"):
        shared = ["--per_device_train_batch_size", "1", "--deepspeed", stage, "--output_dir", str(tmp_path / stage)]
        done = launched(["-m", "milora_vl.train", *COMMAND, *shared], tmp_path)
        assert done.returncode == 0, done.stdout[-3000:]
        torch.testing.assert_close(torch.tensor(losses(tmp_path / stage)), torch.tensor(expected), rtol=0, atol=1e-5)
        assert answers(stage) == told
