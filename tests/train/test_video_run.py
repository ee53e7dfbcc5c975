"""A run on video files: plan, training, and the same frames in chat and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from milora_data.batches.processor_inputs import ProcessorInputs
from milora_data.pictures.load import Picture
from milora_data.records.record import Turn, Video
from milora_eval.__main__ import main as evaluate
from milora_vl.chat.__main__ import main as chat
from milora_vl.interop.load_model import load_model
from milora_vl.models.generate import Prompt, generate
from milora_vl.models.prompts import prompts_of
from milora_vl.train.__main__ import main
from support.launched import KINDS, needs_deepspeed, train_in_two
from support.problems import raises_code
from support.train_runs import losses
from support.versions import needs_spans
from support.videos import video_template, write_video
from support.vlm_families import model_of, processor_of

pytestmark = [pytest.mark.filterwarnings("ignore"), needs_spans]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    processor = processor_of("qwen2_5_vl")
    processor.chat_template = video_template("qwen2_5_vl")
    model_of("qwen2_5_vl", processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def row(number: int, video: str) -> dict[str, Any]:
    turns = [("human", f"<video>\nWhat is {number}?"), ("gpt", "A cat.")]
    return {"id": str(number), "video": video, "conversations": [{"from": who, "value": text} for who, text in turns]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number in range(3):
        write_video(folder / f"{number}.mp4", 20 + 10 * number)
    (folder / "broken.mp4").write_text("no video")
    rows = [row(number, f"{number}.mp4") for number in range(3)]
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "broken.json").write_text(json.dumps([*rows, row(3, "broken.mp4")]))
    return folder


def words(model: Path, data: Path, name: str = "train.json") -> list[str]:
    flags = [
        "--model",
        str(model),
        "--data_path",
        str(data / name),
        "--image_folder",
        str(data),
        "--method",
        "lora",
        "--rank",
        "2",
    ]
    flags += ["--per_device_train_batch_size", "2", "--max_steps", "4", "--logging_steps", "1", "--device", "cpu"]
    return [*flags, "--num_frames", "6", "--video_min_pixels", "64", "--video_max_pixels", "1024"]


@pytest.fixture(scope="module")
def run(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert main([*words(model, data), "--train_sampling_strategy", "group_by_length", "--output_dir", str(folder)]) == 0
    return folder


def test_the_plan_counts_the_tokens_of_videos(model: Path, data: Path, capsys: Captured) -> None:
    counts = []
    for num_frames in ("6", "12"):
        assert main([*words(model, data), "--num_frames", num_frames, "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert "<video>" in out
        counts.append(int(out.partition(" tokens per record")[0].rpartition(" ")[2]))
    assert counts[1] > counts[0]


def test_a_run_keeps_how_it_read_its_videos(run: Path) -> None:
    assert len(losses(run)) == 4
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())["data"]
    assert (recipe["num_frames"], recipe["video_max_pixels"]) == (6, 1024)
    saved = json.loads((run / "processor_config.json").read_text())["video_processor"]
    assert (saved["num_frames"], saved["do_sample_frames"], saved["size"]["longest_edge"]) == (6, True, 1024)


def test_chat_and_evaluation_read_the_same_frames(run: Path, model: Path, data: Path, capsys: Captured) -> None:
    tuned, processor = load_model(str(run))
    prompts_of(str(model), run).limit(processor)
    video = Video((), None, Picture("0.mp4", data / "0.mp4"))
    assert len(ProcessorInputs(processor).frames(video).frames) == 6
    prompt = Prompt((Turn("user", "<video>\nWhat is 0?"),), videos=(video,))
    (expected,) = generate(tuned, processor, [prompt], max_new_tokens=8)
    capsys.readouterr()
    ask = ["--model", str(model), "--adapter", str(run), "--video", str(data / "0.mp4"), "--max_new_tokens", "8"]
    assert chat([*ask, "What is 0?"]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    out = data / "out"
    benchmark = ["--benchmarks", str(data / "train.json"), "--output_dir", str(out)]
    assert evaluate(["run", "--model", str(model), "--adapter", str(run), *benchmark]) == 0
    folder = next(out.glob("eval/*/final"))
    results = json.loads((folder / "results.json").read_text())
    assert results["asked"] == 3
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert lines[0]["videos"][0]["file"] == str(data / "0.mp4")
    assert lines[0]["prediction"].startswith(expected.text)
    assert evaluate(["run", "--model", str(model), "--adapter", str(run), *benchmark]) == 0
    assert json.loads((folder / "results.json").read_text())["asked"] == 0
    assert evaluate(["score", str(folder)]) == 0


def test_a_broken_file_stops_a_run_by_name_or_is_skipped(model: Path, data: Path, tmp_path: Path) -> None:
    broken = words(model, data, "broken.json")
    broken[broken.index("--per_device_train_batch_size") + 1] = "4"
    with raises_code("video-unreadable", where="broken.mp4", hint="broken.json:record 4"):
        main([*broken, "--output_dir", str(tmp_path / "a")])
    assert main([*broken, "--bad_images", "skip", "--output_dir", str(tmp_path / "b")]) == 0


@pytest.mark.parametrize(
    ("flags", "code", "where"),
    [
        (["--fps", "2"], "recipe-value", ""),
        (["--video_min_pixels", "4096"], "", "--video_min_pixels"),
    ],
)
def test_settings_that_contradict_each_other_are_named(
    flags: list[str], code: str, where: str, model: Path, data: Path
) -> None:
    with raises_code(code, where=where):
        main([*words(model, data), *flags, "--dry-run"])


@pytest.mark.slow
@needs_deepspeed
def test_pictures_train_beside_videos_from_parts(model: Path, data: Path, tmp_path: Path) -> None:
    """A rank that shows a picture waits for the weights that another one needs for a video."""
    rows = [row(0, "0.mp4"), row(1, "1.mp4")]
    for number in range(2):
        Image.new("RGB", (40, 24), (90 * number, 0, 0)).save(data / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
        rows.insert(2 * number, {"id": f"p{number}", "image": f"{number}.png", "conversations": turns})
    (data / "both.json").write_text(json.dumps(rows))
    line = [*words(model, data, "both.json"), "--dropout", "0", "--use_cpu"]
    line = [word for word in line if word not in ("--device", "cpu")]
    assert main([*line, "--output_dir", str(tmp_path / "one")]) == 0
    line += ["--per_device_train_batch_size", "1"]
    kinds = ["fsdp", "zero3"]  # DeepSpeed leaves its state in accelerate
    train_in_two([[*line, *KINDS[kind], "--output_dir", str(tmp_path / kind)] for kind in kinds], tmp_path)
    for kind in kinds:
        assert dict(losses(tmp_path / kind)) == pytest.approx(dict(losses(tmp_path / "one")), abs=1e-4), kind
