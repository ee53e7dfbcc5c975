"""Sizes of an update: `run --scale` with one or several, each with score and forgetting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from milora_eval.__main__ import main
from milora_vl import apply_milora, load_model, save_adapter
from milora_vl.export import Options, export
from support.adapter_cases import move
from support.eval_questions import write_questions


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("emoji"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a projector trained in full, whose answers differ from its base."""
    folder = tmp_path_factory.mktemp("run")
    rules = "[{modules: language, method: milora, protect: 0, rank: 4}, {modules: projector, method: full}]"
    model = apply_milora(load_model("tiny")[0], rules)
    move(model, 0.1)
    save_adapter(model, folder)
    return folder


def arguments(adapter: Path, data: Path, output: Path, *more: str) -> list[str]:
    what = ["--model", "tiny", "--adapter", str(adapter), "--suite", "emoji", "--data", str(data), "--limit", "24"]
    return ["run", *what, "--output_dir", str(output), "--forgetting_tokens", "300", *more]


def read(output: Path, which: str) -> dict[str, Any]:
    return dict(json.loads((output / "eval" / "emoji" / which / "results.json").read_text()))


def test_several_scales_show_score_and_forgetting_and_resume(
    adapter: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(adapter, data, tmp_path, "--scale", "1,0,0.5", "--format", "json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["base", "final-scale-0.5", "final"]
    half, full = found["final-scale-0.5"]["forgetting"], found["final"]["forgetting"]
    assert 0 < half["kl"] < full["kl"]
    assert 0 < half["pictures"]["kl"] < full["pictures"]["kl"]
    # Scale 1 has the results of a run without the flag, scale 0 as `--with_base`: both find their answers there.
    main(arguments(adapter, data, tmp_path, "--with_base"))
    assert (read(tmp_path, "final")["asked"], read(tmp_path, "base")["asked"]) == (0, 0)
    capsys.readouterr()
    main(arguments(adapter, data, tmp_path, "--scale", "0,0.25,0.5"))
    assert [read(tmp_path, f"final-scale-{scale}")["asked"] > 0 for scale in ("0.25", "0.5")] == [True, False]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = [row for row in rows if row and row[0] in ("0", "0.25", "0.5")]
    assert [row[0] for row in shown] == ["0", "0.25", "0.5"]
    assert shown[0][1:3] == ["0.0000", "0.0000"], "of text and of pictures"


def test_a_scaled_evaluation_is_that_of_the_scaled_export(adapter: Path, data: Path, tmp_path: Path) -> None:
    main(arguments(adapter, data, tmp_path, "--scale", "0.5"))
    export(adapter, "adapter", tmp_path / "half", Options(scale=0.5))
    main(arguments(tmp_path / "half", data, tmp_path))
    scaled, exported = read(tmp_path, "final-scale-0.5"), read(tmp_path, "final")
    assert scaled["scale"] == 0.5
    assert scaled["predictions"] == exported["predictions"]
    assert scaled["forgetting"]["kl"] == pytest.approx(exported["forgetting"]["kl"], rel=1e-4)


def test_a_fully_trained_model_scales_between_its_base_and_itself(data: Path, tmp_path: Path) -> None:
    for name, size in {"base": 0.0, "full": 0.05}.items():
        model, processor = load_model("tiny")
        move(model, size)
        for part in (model, processor):
            part.save_pretrained(tmp_path / name)
    what = ["--model", str(tmp_path / "full"), "--base", str(tmp_path / "base"), "--suite", "emoji", "--limit", "8"]
    output = ["--data", str(data), "--output_dir", str(tmp_path), "--forgetting_tokens", "300"]
    assert main(["run", *what, *output, "--scale", "0,0.5,1"]) == 0
    (half,) = (tmp_path / "eval" / "emoji").glob("*-scale-0.5")
    full = half.with_name(half.name.removesuffix("-scale-0.5"))
    kept = [json.loads((folder / "results.json").read_text())["forgetting"]["kl"] for folder in (half, full)]
    assert 0.0 < kept[0] < kept[1]
    assert main(["run", *what, *output, "--scale", "0.5"]) == 0
    assert json.loads((half / "results.json").read_text())["asked"] == 0
