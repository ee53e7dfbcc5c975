"""Videos as lists of frames: tensors of the family's processor, masks, lengths, cuts, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import load_video

from milora_data.__main__ import main
from milora_data.batches.processor_collator import ProcessorCollator
from milora_data.batches.processor_inputs import ProcessorInputs, ProcessorSettings, configure_processor
from milora_data.pictures.load import ImageError
from milora_data.records import parse_record
from milora_data.stream import load_records
from milora_vl.common.errors import DataError
from milora_vl.models.losses import summed_loss
from support.problems import raises_code
from support.versions import needs_spans
from support.videos import VIDEO_PARTS, asked, video_template, write_video
from support.vlm_families import model_of, processor_of
from support.vlm_runs import write_pictures

pytestmark = [pytest.mark.filterwarnings("ignore"), needs_spans]


FRAMES = [f"f{number}.png" for number in range(4)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_pictures(tmp_path_factory.mktemp("pictures"))
    for name in FRAMES:
        Image.effect_noise((40, 24), 90).convert("RGB").save(folder / name)
    return folder


def collator(name: str, pictures: Path, **options: Any) -> ProcessorCollator:
    processor = processor_of(name)
    if name in VIDEO_PARTS:
        processor.chat_template = video_template(name)
    return ProcessorCollator(processor, image_folder=pictures, **options)


CLIP = {"type": "video", "video": FRAMES}


@pytest.mark.parametrize("name", VIDEO_PARTS)
def test_videos_in_a_packed_row_have_the_loss_of_their_records(name: str, pictures: Path) -> None:
    model = model_of(name, processor_of(name))
    collate = collator(name, pictures, model_config=model.config)
    values = [asked(CLIP, "What?"), asked("Hi"), asked("Like", CLIP | {"fps": 2}, "this?", answer="No, a dog.")]
    together = summed_loss(model, collate([values]), chunked=False)[0]
    alone = torch.stack([summed_loss(model, collate([value]), chunked=False)[0] for value in values]).sum()
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("name", [name for name in VIDEO_PARTS if name.startswith(("qwen", "llava"))])
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_tower_runs_for_pictures_and_for_videos_whatever_a_batch_shows(
    name: str, is_packed: bool, pictures: Path
) -> None:
    """Ranks with other kinds of records then gather the weights of a sharded tower equally often."""
    model = model_of(name, processor_of(name))
    collate = collator(name, pictures, model_config=model.config)
    picture = {"type": "image", "image": "0.png"}
    values = [asked("Hi"), asked(picture, "What is this?"), asked(CLIP, "What?"), asked(picture, CLIP, "Both?")]
    for each in values:
        rows = [[each, asked("Hello")]] if is_packed else [each, asked("Hello")]
        collate.always_shows_images = collate.always_shows_videos = False
        expected = summed_loss(model, collate(rows), chunked=False)[0]
        collate.always_shows_images = collate.always_shows_videos = True
        batch = collate(rows)
        assert {"pixel_values", "pixel_values_videos"} <= batch.keys()
        torch.testing.assert_close(summed_loss(model, batch, chunked=False)[0], expected)


@pytest.mark.parametrize("name", VIDEO_PARTS)
def test_tensors_and_masks_are_those_of_the_processor(name: str, pictures: Path) -> None:
    collate = collator(name, pictures)
    value = asked({"type": "image", "image": "0.png"}, "Like", CLIP, "What?")
    if name in ("smolvlm", "glm4v"):  # their models take no pictures beside videos
        batch = collate([asked(CLIP, "What?"), asked("Hi")])
        assert model_of(name, collate.inputs.processor)(**batch).loss.isfinite()
        for mixed in ([value], [asked(CLIP, "What?"), asked({"type": "image", "image": "0.png"}, "What?")]):
            with raises_code("records-mixed", kind=DataError):
                collate(mixed)
        return
    batch = collate([value, asked("Hi")])
    processor = collate.inputs.processor
    frames = [Image.open(pictures / frame).convert("RGB") for frame in FRAMES]
    text = processor.tokenizer.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Like"}, {"type": "video"},
                                         {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        ],
        chat_template=processor.chat_template,
        tokenize=False,
    )  # fmt: skip
    expected = processor(
        text=[text],
        images=[[Image.open(pictures / "0.png").convert("RGB")]],
        videos=[frames],
        do_sample_frames=False,
        add_special_tokens=False,
        return_tensors="pt",
    )
    length = expected["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:1, :length], expected["input_ids"])
    for key in expected.keys() - {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}:
        assert torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(expected[key])), key
    first = batch["labels"][0]
    assert processor.tokenizer.decode(first[first != -100]).lstrip().startswith("A cat.")
    assert (first != -100).sum() < 12
    assert collate.num_tokens(parse_record(value)) == length
    assert model_of(name, processor)(**batch).loss.isfinite()


def test_smolvlm_writes_videos_in_the_template_of_its_processor(pictures: Path) -> None:
    """Its published template omits videos; the processor has another one for them."""
    pytest.importorskip("num2words")
    processor = processor_of("smolvlm")
    collate = ProcessorCollator(processor, image_folder=pictures)
    batch = collate([asked(CLIP, "What?")])
    frames = [Image.open(pictures / frame).convert("RGB") for frame in FRAMES]
    content = [{"type": "video"}, {"type": "text", "text": "What?"}]
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    text = processor.apply_chat_template(turns, tokenize=False)
    expected = processor(text=[text], videos=[frames], do_sample_frames=False, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]).strip() == "A cat.<end_of_utterance>"


@pytest.mark.parametrize("name", ["internvl", "llava_onevision", "qwen2_5_vl"])
def test_videos_of_several_lengths_are_refused_where_a_processor_cannot_mix_them(name: str, pictures: Path) -> None:
    collate = collator(name, pictures)
    two = asked(CLIP, {"type": "video", "video": FRAMES[:2]}, "What?")
    if name == "qwen2_5_vl":
        assert collate.inputs.takes_mixed_videos
        assert len(collate([two])["video_grid_thw"]) == 2
        return
    assert not collate.inputs.takes_mixed_videos
    message = "videos of 2 and 4 frames together"
    with raises_code("records-mixed", "data.json:2", message, hint="as many frames", kind=DataError):
        collate([parse_record(two, source="data.json:2")])


def test_max_length_drops_a_video_as_a_whole(pictures: Path) -> None:
    turns = [*asked(CLIP, "A?")["messages"], *asked(CLIP, "B?", answer="Two.")["messages"]]
    value = {"messages": turns}
    whole = collator("qwen2_5_vl", pictures)([value])["input_ids"].shape[1]
    for length in range(whole - 1, whole - 30, -4):
        collate = collator("qwen2_5_vl", pictures, max_length=length)
        batch = collate([value])
        tokens = (batch["input_ids"] == collate.inputs.processor.video_token_id).sum()
        assert tokens == batch["video_grid_thw"].prod(1).sum() // 4
        assert batch["input_ids"].shape[1] <= length
    assert len(batch["video_grid_thw"]) == 1


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (asked({"type": "video", "video": "clip.mp4"}, "What?"), "video-unreadable"),
        (
            asked({"type": "video_url", "video_url": {"url": "https://a.org/a.mp4?token=x"}}, "?"),
            "video-unreadable",
        ),
        (asked({**CLIP, "fps": 0}, "What?"), ""),
        (asked({"type": "video"}, "What?"), "record-image-count"),
        (asked({"type": "video", "video": ["f0.png", "0.png"]}, "What?"), "video-frame-sizes"),
        (asked({"type": "video", "video": ["f0.png", "none.png"]}, "What?"), "image-unreadable"),
    ],
)
def test_what_is_no_video_is_named(value: dict[str, Any], code: str, pictures: Path) -> None:
    with pytest.raises(DataError) as error:
        collator("internvl", pictures)([parse_record(value, source="data.json:3")])
    assert error.value.first.code == code
    assert "data.json:3" in str(error.value)
    assert "token=x" not in str(error.value)


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
    shown = again.frames(parse_record(value).within(folder).videos[0])
    before = str(shown.metadata())
    again._of_video(shown)
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
    assert main(["convert", str(tmp_path / "data.json"), "--output_dir", str(out)]) == 0
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
    assert [str(record.videos[0].file) for record in load_records(fixed)] == ["a.mp4", "short.mp4"]
    assert main(["show", str(fixed)]) == 0
    assert "video: a.mp4" in capsys.readouterr().out
