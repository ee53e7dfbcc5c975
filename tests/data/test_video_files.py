"""Video files: frames and tensors are those of transformers for the same file; broken, short, long files are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import load_video

from milora_data.__main__ import main
from milora_data.batches.processor_collator import ProcessorCollator
from milora_data.batches.processor_inputs import ProcessorInputs, as_named
from milora_data.pictures.load import ImageError
from milora_data.records.record import parse_record
from milora_data.stream import load_records
from milora_vl.models.processors import ProcessorSettings, configure_processor
from support.problems import raises_code
from support.versions import needs_places
from support.videos import VIDEO_PARTS, asked, video_template, write_video
from support.vlm_families import model_of, processor_of

pytestmark = [pytest.mark.filterwarnings("ignore"), needs_places]
SETTINGS = [{"fps": 2.0}, {"fps": 5.0}, {"num_frames": 5}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name in ("a.mp4", "b.mkv", "c.webm"):
        write_video(folder / name)
    write_video(folder / "short.mp4", 2)
    whole = (folder / "a.mp4").read_bytes()
    early = write_video(folder / "early.mp4", faststart=True)
    early.write_bytes(early.read_bytes()[: early.stat().st_size * 2 // 3])
    (folder / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("no video")
    (folder / "empty.mp4").touch()
    return folder


def with_template(name: str, **settings: Any) -> Any:
    """The processor of a family, whose template writes videos, with settings of a recipe."""
    processor = processor_of(name)
    processor.chat_template = video_template(name)
    if name == "smolvlm":  # as published
        processor.video_processor.fps, processor.video_processor.num_frames = 1, 64
    configure_processor(processor, ProcessorSettings(**settings))
    return processor


def own_call(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings in a call of the processor; Qwen3-VL has a number of frames per second that forbids `num_frames`."""
    return {**settings, "fps": None} if name == "qwen3_vl" and "num_frames" in settings else settings


def read_by_pyav(self: Any, files: Any, sample_indices_fn: Any = None) -> Any:
    """`fetch_videos` of transformers, with its reader for PyAV in place of torchcodec, which needs FFmpeg."""
    if isinstance(files, list):
        return list(zip(*[read_by_pyav(self, file, sample_indices_fn) for file in files], strict=True))
    return load_video(files, backend="pyav", sample_indices_fn=sample_indices_fn)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", VIDEO_PARTS)
def test_the_batch_is_that_of_apply_chat_template_for_the_file(
    name: str, settings: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "glm4v" and "num_frames" in settings:
        with raises_code("video-sampling-unsupported", where="data.num_frames"):
            with_template(name, **settings)
        return
    processor = with_template(name, **settings)
    collate = ProcessorCollator(processor, image_folder=folder)
    value = asked({"type": "video", "video": "a.mp4"}, "What?")
    batch = collate([value, asked("Hi")])
    monkeypatch.setattr(BaseVideoProcessor, "fetch_videos", read_by_pyav)
    messages = asked({"type": "video", "video": str(folder / "a.mp4")}, "What?")["messages"]
    messages[1]["content"] = [{"type": "text", "text": messages[1]["content"]}]
    expected = with_template(name).apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=dict(own_call(name, settings))
    )
    end = [processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")] if name == "glm4v" else []
    length = expected["input_ids"].shape[1] + len(end)
    assert batch["input_ids"][0, :length].tolist() == [*expected["input_ids"][0].tolist(), *end]
    for key in expected.keys() - {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}:
        assert torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(expected[key])), key
    again = ProcessorInputs(processor)
    shown = again.frames(parse_record(value).videos[0], lambda name: folder / name)
    before = str(shown.metadata())
    again._of_video(shown, as_named)
    assert str(shown.metadata()) == before
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]).lstrip().startswith("A cat.")
    assert collate.num_tokens(parse_record(value)) == length
    assert model_of(name, processor)(**batch).loss.isfinite()


def test_every_form_of_record_is_the_same_record(tmp_path: Path) -> None:
    def turns(mark: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": f"{mark}\nWhat?"}, {"from": "gpt", "value": "A cat."}]

    messages = [{"role": "user", "content": "<video>\nWhat?"}, {"role": "assistant", "content": "A cat."}]
    forms = [
        asked({"type": "video", "video": "a.mp4"}, "What?"),
        asked({"type": "video_url", "video_url": {"url": "a.mp4"}}, "What?"),
        asked({"type": "video"}, "What?") | {"videos": ["a.mp4"]},
        {"conversations": turns("<video>"), "video": "a.mp4"},
        {"conversations": turns("<image>"), "video": "a.mp4"},  # LLaVA-Video
        {"messages": messages, "videos": [{"file": "a.mp4"}]},
        {"query": "<video>\nWhat?", "response": "A cat.", "videos": ["a.mp4"]},
    ]
    records = [parse_record(form) for form in forms]
    assert {(record.turns, record.videos) for record in records} == {(records[0].turns, records[0].videos)}
    (tmp_path / "data.json").write_text(json.dumps(forms))
    out = tmp_path / "out"
    assert main(["convert", "--from", "messages", str(tmp_path / "data.json"), "--output_dir", str(out)]) == 0
    assert {record.videos for record in load_records(out / "data.json")} == {records[0].videos}


def test_a_record_may_choose_its_own_frames(folder: Path) -> None:
    collate = ProcessorCollator(with_template("qwen2_5_vl", fps=2), image_folder=folder)
    grids = [
        collate([asked({"type": "video", "video": "a.mp4", **own}, "What?")])["video_grid_thw"].tolist()[0][0]
        for own in ({}, {"fps": 4}, {"num_frames": 10})
    ]
    assert grids == [3, 6, 5]


def test_limits_of_pixels_count_for_videos(folder: Path) -> None:
    few, more = (
        ProcessorCollator(with_template("qwen2_5_vl", video_min_pixels=16, video_max_pixels=most), image_folder=folder)
        for most in (512, 2048)
    )
    value = asked({"type": "video", "video": "a.mp4"}, "What?")
    for collate, most in ((few, 512), (more, 2048)):
        _, height, width = collate([value])["video_grid_thw"].tolist()[0]
        patch = collate.inputs.processor.video_processor.patch_size
        assert height * width * patch**2 <= most
    assert few.num_tokens(parse_record(value)) < more.num_tokens(parse_record(value))
    with raises_code("pixels-unsupported", where="data.video_max_pixels"):
        with_template("internvl", video_max_pixels=9)
    with raises_code("record-videos", where="data.fps"):
        configure_processor(processor_of("gemma3"), ProcessorSettings(fps=2))


BROKEN = [
    ("missing.mp4", {}, "video-unreadable", "no such file"),
    ("text.mp4", {}, "video-unreadable", "it is damaged"),
    ("empty.mp4", {}, "video-unreadable", "the file is empty"),
    ("half.mp4", {}, "video-unreadable", "it is damaged"),
    ("early.mp4", {"fps": 5}, "video-unreadable", "ends early"),
    ("short.mp4", {"num_frames": 8}, "", "which has 2 in 0.20 seconds"),
    ("c.webm", {}, "", "which has 0 in 0.00 seconds"),
    ("../a.mp4", {}, "video-unreadable", "outside the image folder"),
]


@pytest.mark.parametrize(("file", "own", "code", "words"), BROKEN)
def test_a_file_that_gives_no_frames_is_named_with_its_record(
    file: str, own: dict[str, Any], code: str, words: str, folder: Path
) -> None:
    value = parse_record(asked({"type": "video", "video": file, **own}, "What?"), source="data.json:3")
    for name in ("qwen2_5_vl", "internvl"):
        with raises_code(code, message=words, kind=ImageError) as error:
            ProcessorCollator(with_template(name), image_folder=folder)([value])
        assert file in str(error.value)
        assert "data.json:3" in str(error.value)
    good = asked({"type": "video", "video": "a.mp4"}, "What?")
    skipping = ProcessorCollator(with_template("qwen2_5_vl"), image_folder=folder, bad_images="skip")
    assert len(skipping([value, good])["video_grid_thw"]) == 1
    assert skipping.counts()["skipped"] == 1
    replacing = ProcessorCollator(with_template("qwen2_5_vl"), image_folder=folder, bad_images="replace")
    assert len(replacing([value, good])["video_grid_thw"]) == 2
    assert replacing.counts()["replaced"] == 1


def test_check_names_broken_and_missing_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a.mp4", "short.mp4", "missing.mp4", "text.mp4", "empty.mp4", "half.mp4", "early.mp4"]
    rows = [{"video": name, "conversations": asked("<video>")["messages"]} for name in names]
    data, fixed = tmp_path / "data.json", tmp_path / "fixed.json"
    data.write_text(json.dumps(rows))
    words = ["check", str(data), "--image_folder", str(folder), "--fix", str(fixed)]
    assert main([*words, "--format", "json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["kinds"] == {"missing_picture": 1, "corrupt_video": 4}
    assert report["with_videos"] == 7
    assert all(finding["where"].startswith(f"{data}:") for finding in report["findings"])
    assert "early.mp4: it " in str(report["findings"])  # with one thread of FFmpeg other words follow than with two
    assert [record.videos[0].file for record in load_records(fixed)] == ["a.mp4", "short.mp4"]
    assert main(["show", str(fixed)]) == 0
    assert "video: a.mp4" in capsys.readouterr().out
