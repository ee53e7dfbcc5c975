"""Pictures inside the records as base64, as in OpenAI's messages: `convert` writes them to files."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from milora_data.__main__ import main
from milora_data.pictures.load import load_image
from milora_data.stream import load_records
from milora_vl.common.errors import UserError
from milora_vl.train.__main__ import main as train
from support.drawn import dump, dump_lines, encoded
from support.train_runs import losses, training


def url(colour: str, kind: str = "PNG", named: str = "png") -> str:
    return f"data:image/{named};base64,{base64.b64encode(encoded(colour, kind=kind)).decode()}"


def asked(picture: str, answer: str = "Red.") -> dict[str, Any]:
    """A record as OpenAI's fine-tuning takes it."""
    parts = [{"type": "text", "text": "What colour?"}, {"type": "image_url", "image_url": {"url": picture}}]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}


def in_llavas(picture: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "Red."}]
    return {"id": "a", "image": picture, "conversations": turns}


def convert(data: Path, out: Path) -> int:
    return main(["convert", str(data), "--output_dir", str(out)])


def test_they_are_written_once_each_with_the_suffix_of_their_format(tmp_path: Path, capsys: Any) -> None:
    data, out = tmp_path / "chat.jsonl", tmp_path / "out"
    pictures = [url("red"), url("blue", "JPEG"), url("red"), url("green", "WEBP", named="jpeg"), url("red", "PPM")]
    dump_lines(data, [asked(picture) for picture in pictures])
    assert convert(data, out) == 0
    records = list(load_records(out / "data.json"))
    names = [record.images[0].name for record in records]
    assert [Path(name).suffix for name in names] == [".png", ".jpg", ".png", ".webp", ".ppm"]
    assert names[0] == names[2]
    assert sorted(path.name for path in (out / "images").iterdir()) == sorted(set(names))
    assert (out / "images" / names[1]).read_bytes() == encoded("blue", kind="JPEG")
    said = capsys.readouterr().err
    assert f"next: python -m milora_data check {out / 'data.json'} --image_folder {out / 'images'}" in said
    assert main(["check", str(out / "data.json"), "--image_folder", str(out / "images")]) == 0


@pytest.mark.parametrize("kind", ["llava", "messages", "table", "hub"])
def test_every_form_that_names_pictures_may_hold_them(kind: str, tmp_path: Path) -> None:
    data, out = tmp_path / "data.json", tmp_path / "out"
    row = {"image": url("red"), "question": "What colour?", "answer": "Red."}
    forms = {"llava": in_llavas(url("red")), "messages": asked(url("red"))}
    dump(data, [forms.get(kind, row)])
    if kind == "hub":
        import datasets

        data = tmp_path / "rows.parquet"
        datasets.Dataset.from_list([row]).to_parquet(data)
        (stored,) = load_records(data)  # like the bytes of other parquet files
        assert load_image(stored.images[0]).size == (48, 32)
    assert convert(data, out) == 0
    (record,) = load_records(out / "data.json")
    assert load_image(out / "images" / record.images[0].name).size == (48, 32)
    assert record.turns[0].text.startswith("<image>\n") or kind == "messages"


BROKEN = {
    "no base64": "data:image/png;base64,%%%not base64%%%",
    "no picture": f"data:image/png;base64,{base64.b64encode(b'no picture').decode()}",
    "cut off": url("red")[:120],
    "not encoded": "data:image/svg+xml,<svg/>",
    "empty": "data:image/png;base64,",
}


@pytest.mark.parametrize(
    "how", [[], ["--bad_images", "skip"], ["--streaming", "True"]], ids=["plain", "skip", "stream"]
)
def test_training_reads_them_as_they_are(how: list[str], tmp_path: Path) -> None:
    if "--streaming" in how:
        pytest.importorskip("torchdata")
    data, out = tmp_path / "my chat.jsonl", tmp_path / "out"
    dump_lines(data, [asked(url("red")), in_llavas(url("blue", "JPEG"))] * 2)
    assert convert(data, out) == 0
    words = ["--method", "lora", "--rank", "4", "--max_steps", "1", "--learning_rate", "1e-2", *how, "--data_path"]
    inside = [*words, str(data), "--image_folder", str(tmp_path)]
    files = [*words, str(out / "data.json"), "--image_folder", str(out / "images")]
    assert train(training(tmp_path, tmp_path / "a", *inside)) == 0
    assert train(training(tmp_path, tmp_path / "b", *files)) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize("fault", BROKEN)
def test_training_names_file_and_record_of_a_broken_one(fault: str, tmp_path: Path) -> None:
    data = tmp_path / "chat.jsonl"
    dump_lines(data, [asked(url("red")), asked(BROKEN[fault])])
    words = "--method lora --rank 4 --max_steps 1 --per_device_train_batch_size 2".split()
    words += ["--data_path", str(data), "--image_folder", str(tmp_path)]
    with pytest.raises(UserError) as caught:
        train(training(tmp_path, tmp_path / "run", *words))
    assert f"{data}:2" in str(caught.value)
    assert caught.value.first.code == "image-unreadable"
    assert "picture" in caught.value.first.message
    assert BROKEN[fault] not in str(caught.value) or fault == "empty"
    assert train(training(tmp_path, tmp_path / "skipped", *words, "--bad_images", "skip")) == 0
