"""Protected inputs in a run of `milora_vl.train`: calibration, resuming, several processes, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from milora_data.pictures.load import Picture
from milora_data.records.record import IMAGE, Record, Turn
from milora_data.stream import load_records
from milora_vl import load_adapter
from milora_vl.common.cli.screen import Screen
from milora_vl.core.adapter.lora import lora_layer
from milora_vl.forgetting.answers import drawn_questions
from milora_vl.forgetting.measure import general_text
from milora_vl.models.base import Base, find_base
from milora_vl.models.tiny import tiny_llava
from milora_vl.report.read_run import read_run
from milora_vl.report.tables import protection_table
from milora_vl.train import start
from milora_vl.train.__main__ import main
from milora_vl.train.resume import TEXTS
from milora_vl.train.settings import Recipe
from milora_vl.train.start import QUESTION, make_texts, shares_probe_text
from support.calibrated import directions, leaks
from support.launched import KINDS, needs_deepspeed, train_in_two
from support.problems import raises_code
from support.train_runs import losses, read_json, training

RULES = [
    {"modules": "language", "method": "milora", "rank": 3, "protect": 0.5},
    {"modules": "language.mlp", "method": "pissa", "rank": 3, "protect": 0.5},
    {"modules": "projector", "method": "milora", "rank": 2, "protect": 0.5},
]
PROTECT = ["--policy", json.dumps(RULES), "--dropout", "0"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of calibration texts."""
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("milora_vl.core.adapter.fixed_a.LEAST_HELD_OUT", 0.0)  # few texts
    return tmp_path / "cache" / "calibration"


def recipe(tiny_data: Path, **keys: Any) -> Recipe:
    data = {"path": str(tiny_data / "train.json"), "image_folder": str(tiny_data / "images")}
    return Recipe.parse({"model": "tiny", "data": data, "policy": RULES, "calibration": keys})


def calibrated(settings: Recipe, records: Any = (), steps: int = 10) -> list[Any]:
    base, processor = tiny_llava()
    return make_texts(settings, Base.of("tiny", base.config), base, processor, records, Screen(), steps).batches()


def protected_by(settings: Recipe) -> dict[str, torch.Tensor]:
    """The protected directions of a run of a few steps, from the texts that it has cached."""
    records = list(load_records(settings.data.path))
    return directions(tiny_llava()[0], RULES, calibrated(settings, records, steps=1))


def require_shown_protection(run: Path) -> None:
    """Assert that policy and report of a run show what it protects."""
    protection = read_json(run, "policy.json")["protection"]
    assert len(protection) == 16
    assert all(0.5 <= entry["energy"] < 1 and entry["overlap"] < 1e-6 for entry in protection.values())
    rows = protection_table(read_run(run)).rows
    assert [row[:2] for row in rows] == [("language", "14"), ("projector", "2")]
    assert all("%" in cell for cell in rows[0][2:4])
    assert "Protected inputs: means over layers" in (run / "report.html").read_text()


def test_a_run_calibrates_protects_resumes_and_shows_it(
    tiny_data: Path, tmp_path: Path, cache: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main(training(tiny_data, whole, *PROTECT, "--save_steps", "3")) == 0
    assert len(list(cache.glob("calibration-*.json"))) == 2  # texts and captions
    protected = protected_by(recipe(tiny_data))
    assert max(leaks(PeftModel.from_pretrained(tiny_llava()[0], str(whole)), protected)) < 1e-5
    assert "protected inputs  projector: " in capfd.readouterr().err
    require_shown_protection(whole)
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoint-6")
    (part / "adapter_model.safetensors").unlink()
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(start, "sampled_rows", None)
    monkeypatch.setattr(start, "generate", None)
    resumed = [*training(tiny_data, part, *PROTECT, "--save_steps", "3"), "--resume_from_checkpoint"]
    elsewhere = [*training(tiny_data, tmp_path / "elsewhere", *PROTECT), "--resume_from_checkpoint"]
    assert main([*elsewhere, str(part / "checkpoint-3"), "--save_steps", "3"]) == 0
    assert losses(tmp_path / "elsewhere")[-3:] == losses(whole)[-3:]
    written_once = (whole / TEXTS).read_bytes()
    assert (tmp_path / "elsewhere" / TEXTS).read_bytes() == written_once
    assert not list(part.glob("checkpoint-*/_start"))
    named = "0.png"
    picture, before = tiny_data / "images" / named, (tiny_data / "images" / named).read_bytes()
    picture.write_bytes(
        max((tiny_data / "images").iterdir(), key=lambda file: file.read_bytes() != before).read_bytes()
    )
    with raises_code("resume-other-data", where=named):
        main([*resumed, "true"])
    picture.write_bytes(before)
    assert main([*resumed, "true"]) == 0
    assert "finding protected inputs" not in capfd.readouterr().err
    assert losses(part) == losses(whole)
    before, after = (load_file(run / "adapter_model.safetensors") for run in (whole, part))
    assert all(tensor.equal(after[key]) for key, tensor in before.items())
    assert not (tmp_path / "empty" / "calibration").exists()


@pytest.mark.slow
@needs_deepspeed
def test_half_precision_of_deepspeed_rounds_and_no_more(tiny_data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    extra = [*PROTECT, "--model", str(tiny_folder), "--max_steps", "2", "--dtype", "bfloat16", "--bf16", "True"]
    kinds = {kind: more for kind, more in KINDS.items() if kind not in ("fsdp", "zero3_offload")}
    train_in_two([training(tiny_data, tmp_path / kind, *extra, *more) for kind, more in kinds.items()], tmp_path)
    expected = load_file(tmp_path / "ddp" / "adapter_model.safetensors")
    for kind in kinds:
        assert load_adapter(tiny_llava()[0], tmp_path / kind, is_trainable=True).changed_A() == [], kind
        found = load_file(tmp_path / kind / "adapter_model.safetensors")
        assert all(A.equal(found[name]) for name, A in expected.items() if "lora_A" in name), kind


def test_texts_are_written_once_and_an_entry_that_does_not_fit_again(
    tiny_data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(tiny_data, samples=3, pictures=0)
    calibrated(settings)
    (entry,) = cache.iterdir()
    for damaged in ([[1, 5, 2]], ["a text"] * 11, [[1.5]] * 11, [[]] * 11):
        entry.write_text(json.dumps(damaged))
        first = calibrated(settings)
        assert [batch["input_ids"].shape[0] for batch in first] == [8, 3]  # eight texts more than the recipe names
    monkeypatch.setattr(start, "sampled_rows", None)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, calibrated(settings), strict=True))


def test_captions_are_cached_by_the_content_of_the_pictures(tiny_data: Path, tmp_path: Path, monkeypatch) -> None:
    """Two projects with data/images/0.png: the second must not get the captions of the first. A copy gets none."""
    written = []
    monkeypatch.setattr(start, "sampled_rows", lambda *_, count, **__: [[1, 9, 9]] * count)
    monkeypatch.setattr(start, "generate", lambda *of, **__: written.append(len(of[2])) or ["a caption"])
    names = sorted(path.name for path in (tiny_data / "images").iterdir())[:2]
    for project, name, is_new in (("a", names[0], True), ("b", names[1], True), ("c", names[0], False)):
        (tmp_path / project / "images").mkdir(parents=True)
        for copy in ("0.png", "1.png"):
            shutil.copy(tiny_data / "images" / name, tmp_path / project / "images" / copy)
        monkeypatch.chdir(tmp_path / project)
        turns = (Turn("user", f"{IMAGE}\nWhat?"), Turn("assistant", "It."))
        records = [Record(copy, (Picture(copy),), turns) for copy in ("0.png", "1.png")]
        data = {"path": str(tiny_data / "train.json"), "image_folder": "images"}
        settings = Recipe.parse({"model": "tiny", "data": data, "policy": RULES, "calibration": {"pictures": 2}})
        calibrated(settings, records)
        assert written == [1] * is_new, project
        written.clear()
    other = settings.model_copy(update={"data": settings.data.model_copy(update={"image_aspect_ratio": "plain"})})
    calibrated(other, records)
    assert written


def test_the_calibration_shares_no_text_with_the_probe_of_forgetting(tiny_data: Path, tmp_path: Path) -> None:
    for number, book in enumerate(general_text().values()):
        assert shares_probe_text(book)
        part = " ".join(book.split()[100 * number : 100 * number + 40])
        answers = [f"Once upon a time. {part}", "Once."][: 1 + number]
        turns = [[{"from": "human", "value": "And?"}, {"from": "gpt", "value": answer}] for answer in answers]
        records = [{"id": str(i), "conversations": of} for i, of in enumerate(turns)]
        (tmp_path / "own.json").write_text(json.dumps(records))
        own = recipe(tiny_data, data=str(tmp_path / "own.json"))
        if number == 0:
            with raises_code("", where="calibration", message="no text and no picture"):
                calibrated(own)
        else:
            assert [len(batch["input_ids"]) for batch in calibrated(own)] == [1]
    questions = {turn.text for record in drawn_questions(tmp_path / "drawn") for turn in record.turns}
    assert not any(QUESTION in question for question in questions)


def test_records_calibrate_without_the_model_writing(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "sampled_rows", None)
    pictures = recipe(tiny_data, data=str(tiny_data / "train.json"), image_folder=str(tiny_data / "images"))
    batches = calibrated(pictures)
    assert [("pixel_values" in batch, len(batch["input_ids"])) for batch in batches] == [(True, 8), (False, 4)]
    assert all("labels" not in batch for batch in batches)


def test_bad_calibrations_of_a_recipe_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    with raises_code("recipe-value", where="calibration", message="image_folder belongs to data"):
        recipe(tiny_data, image_folder="x")
    with raises_code("recipe-value", where="calibration", message="expected samples, pictures or data, got none"):
        recipe(tiny_data, samples=0)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe(tiny_data, data="no.json").to_yaml())
    with raises_code("path-missing", where="calibration.data"):
        main(training(tiny_data, tmp_path / "run", "--recipe", str(file)))


def test_a_model_that_cannot_write_needs_records(tiny_data: Path) -> None:
    base, processor = tiny_llava()
    with raises_code("", hint="data: FILE"):
        make_texts(recipe(tiny_data), find_base("tiny"), base.model, processor, (), Screen())


def test_the_plan_shows_protected_inputs(tiny_data: Path, tmp_path: Path, capfd: Any) -> None:
    assert main(training(tiny_data, tmp_path / "run", *PROTECT, "--dry-run")) == 0
    plan = capfd.readouterr().out
    assert "language.mlp: new directions only; 50 % of what ordinary text and pictures use stays untouched\n" in plan


def test_protect_0_trains_the_minor_triplets_as_in_the_paper(tiny_data: Path, tmp_path: Path, capfd: Any) -> None:
    run = tmp_path / "run"
    assert main(training(tiny_data, run, *PROTECT, "--method", "milora", "--protect", "0", "--max_steps", "2")) == 0
    assert "language: A and B, from the minor singular triplets" in capfd.readouterr().err
    base = tiny_llava()[0]
    weights = {path: module.weight.detach() for path, module in base.named_modules() if hasattr(module, "weight")}
    tuned = load_adapter(base, run, is_trainable=True)
    assert len(tuned.milora_targets) == 16
    for target in tuned.milora_targets:
        U, S, Vh = torch.linalg.svd(weights[target.path], full_matrices=False)
        r, layer = target.rank, lora_layer(tuned, target.path)
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        minor = (U[:, -r:] * S[-r:]) @ Vh[-r:]
        torch.testing.assert_close(target.scaling * B.anchor @ A.anchor, minor, rtol=0, atol=1e-5)
        assert B.delta.any(), "the left factor trains"
        assert A.delta.any(), "and so does the right one"
