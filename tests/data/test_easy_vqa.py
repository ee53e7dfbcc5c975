"""easy-VQA as LLaVA records: every official question once, splits by picture, short answers."""

from __future__ import annotations

import json
from collections import Counter

from milora_data import easy_vqa
from milora_data.__main__ import main as milora_data
from milora_data.assets import fetch
from support.problems import raises_code


def test_every_official_question_is_asked_once_about_its_picture_in_its_split(tmp_path, capsys):
    folder = tmp_path / "easy-vqa"
    assert easy_vqa.main(["--output_dir", str(folder), "--format", "json"]) == 0
    counts = json.loads(capsys.readouterr().out)["records"]
    files = {name: json.loads((folder / name).read_text()) for name in counts}
    assert counts == {name: len(records) for name, records in files.items()}
    asked = {name: [pair for record in records for pair in _pairs(record)] for name, records in files.items()}
    official = {
        part: {
            (f"{part}/{i}.png", q, a)
            for q, a, i in json.loads((fetch("easy_vqa") / part / "questions.json").read_text())
        }
        for part in ("train", "test")
    }
    assert sum(map(len, asked.values())) == 48_248
    assert set(asked["test.json"]) == official["test"]
    assert set(asked["train.json"]) | set(asked["val.json"]) == official["train"]
    pictures = {name: {picture for picture, _, _ in pairs} for name, pairs in asked.items()}
    assert [len(pictures[f"{part}.json"]) for part in ("train", "val", "test")] == [3800, 200, 1000]
    assert not pictures["train.json"] & pictures["val.json"]
    assert all((folder / "images" / picture).is_file() for names in pictures.values() for picture in names)
    first_answers = Counter(record["conversations"][1]["value"] for record in files["train.json"])
    assert first_answers["yes"] + first_answers["no"] > 0.7 * counts["train.json"]  # not always shape and colour first
    assert easy_vqa.main(["--output_dir", str(folder)]) == 0
    assert "already" in capsys.readouterr().err
    with raises_code("output-exists", message="python -m milora_data emoji --seed 1 --variants 0"):
        milora_data(["emoji", "--seed", "1", "--output_dir", str(folder)])


def _pairs(record):
    turns = [
        turn["value"].removeprefix("<image>\n").removesuffix(f"\n{easy_vqa.SHORT}") for turn in record["conversations"]
    ]
    return [(record["image"], *pair) for pair in zip(turns[::2], turns[1::2], strict=True)]
