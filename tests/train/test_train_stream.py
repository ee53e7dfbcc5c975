"""Training from a stream: killed in an epoch it continues as if nothing had been; what is broken counts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from milora_vl.common.errors import DataError, UserError
from milora_vl.train.__main__ import main
from support import dirty_data
from support.launched import launched
from support.problems import raises_code
from support.train_runs import lengthen_data, losses, training

pytest.importorskip("torchdata.stateful_dataloader", exc_type=ImportError)


@pytest.mark.parametrize(
    ("workers", "buffer"),
    [("2", "8"), pytest.param("0", "16", marks=pytest.mark.slow), pytest.param("2", "0", marks=pytest.mark.slow)],
)
def test_it_resumes_in_the_middle_of_an_epoch(
    workers: str, buffer: str, tiny_data: Path, tmp_path: Path, capfd: Any
) -> None:
    lengthen_data(tiny_data, 50)
    extra = ["--rank", "4", "--dropout", "0.1", "--streaming", "--shuffle_buffer", buffer, "--save_steps", "3"]
    extra += ["--dataloader_num_workers", workers, "--gradient_accumulation_steps", "2"]
    assert main(training(tiny_data, tmp_path / "whole", *extra)) == 0
    said = capfd.readouterr().err
    assert "a stream; the first" in said
    assert "48 records of a stream" in said
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoint-6")
    half = training(tiny_data, tmp_path / "half", *extra)
    assert main([*half, "--resume_from_checkpoint", str(tmp_path / "half" / "checkpoint-3")]) == 0
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")
    assert "warning: of the stream, only the first " in capfd.readouterr().err
    with raises_code("", message="dataloader_num_workers"):
        main([*half, "--dataloader_num_workers", "1", "--max_steps", "9", "--resume_from_checkpoint", "true"])


def test_by_default_the_first_broken_record_is_told_before_the_model_loads(tmp_path: Path) -> None:
    path = dirty_data.make(tmp_path / "dirty")
    with pytest.raises(DataError, match=r"train.jsonl:\d+"):
        main(training(path.parent, tmp_path / "run", "--data_path", str(path), "--rank", "4", "--streaming"))
    assert not (tmp_path / "run").exists()


def test_what_does_not_go_with_a_stream_is_told_at_once(tiny_data: Path, tmp_path: Path) -> None:
    extra = ["--streaming", "--packing", "--limit", "3", "--max_steps", "-1"]
    with pytest.raises(UserError) as error:
        main(training(tiny_data, tmp_path / "run", "--rank", "4", *extra))
    problems = error.value.problems
    assert {problem.code for problem in problems} == {"recipe-conflict"}
    assert [problem.where for problem in problems] == ["--streaming", "--packing", "--limit"]


@pytest.mark.slow
def test_two_processes_share_a_stream_and_resume(tiny_data: Path, tmp_path: Path) -> None:
    lengthen_data(tiny_data, 50)

    def trained(run: str, *extra: str) -> list[tuple[int, float]]:
        options = ["--rank", "4", "--dropout", "0", "--save_steps", "3", *extra]
        # Its exit code is not asked for: gloo may abort when all is done.
        launched(["-m", "milora_vl.train", *training(tiny_data, tmp_path / run, *options)], tmp_path)
        return losses(tmp_path / run)

    stream = ["--streaming", "--shuffle_buffer", "8", "--dataloader_num_workers", "1"]
    whole = trained("whole", *stream)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoint-6")
    checkpoint = str(tmp_path / "half" / "checkpoint-3")
    assert trained("half", *stream, "--resume_from_checkpoint", checkpoint) == whole
