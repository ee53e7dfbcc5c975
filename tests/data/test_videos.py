"""Videos as lists of frames: tensors of the family's processor, masks, lengths, cuts, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from milora_data.batches.processor_collator import ProcessorCollator
from milora_data.pictures.load import ImageError
from milora_data.records.record import parse_record
from milora_vl.common.errors import DataError
from milora_vl.models.losses import summed_loss
from support.problems import raises_code
from support.versions import needs_places
from support.videos import VIDEO_PARTS, asked, video_template
from support.vlm_families import model_of, processor_of
from support.vlm_runs import write_pictures

pytestmark = [pytest.mark.filterwarnings("ignore"), needs_places]
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


def test_a_missing_frame_is_replaced_or_its_record_skipped(pictures: Path) -> None:
    value = asked({"type": "video", "video": ["f0.png", "none.png"]}, "What?")
    with pytest.raises(ImageError):
        collator("qwen2_5_vl", pictures)([value])
    replacing = collator("qwen2_5_vl", pictures, bad_images="replace")
    assert replacing([value])["video_grid_thw"].tolist()[0][0] == 1
    assert replacing.counts()["replaced"] == 1
    skipping = collator("qwen2_5_vl", pictures, bad_images="skip")
    assert len(skipping([value, asked("Hi")])["input_ids"]) == 1
