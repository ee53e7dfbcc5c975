"""`python -m milora_vl.analyze` on every form that a training can have, and on files instead of a loaded model."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from milora_vl import Policy, apply_milora, load_model, merge
from milora_vl.analyze.__main__ import main
from milora_vl.analyze.job import plan, rows_of
from milora_vl.analyze.page import lede
from milora_vl.analyze.weights import Weights, open_weights
from support.adapter_cases import move
from support.problems import raises_code

Made = tuple[Any, Any]


def disturbed(model: Any) -> Any:
    move(model, 0.1)
    return model


def analysed(folder: Path, base: Path) -> dict[str, dict[str, Any]]:
    """The rows of a trained folder by path, without figures, which take their time."""
    todo = plan(str(folder), str(base), rank=8, device="cpu")
    return {row["path"]: row for row in rows_of(todo, folder / "analysis")}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = load_model("tiny")
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(str(folder))
    processor.save_pretrained(str(folder))
    return folder


METHODS = ["milora", "pissa", "random", "lora", "dora"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_change_that_merging_makes(method: str, base: Path, tmp_path: Path) -> None:
    """||dW|| of each layer is that of merged minus base, whatever the form; so are the first directions."""
    before, _ = load_model(base)
    rules = f"[{{modules: language.mlp, method: {method}, rank: 3, alpha: 6}}, {{modules: projector, method: full}}]"
    model = disturbed(apply_milora(load_model(base)[0], Policy.parse(rules)))
    model.save_pretrained(str(tmp_path))
    rows = analysed(tmp_path, base)
    merged = merge(model)
    after = Weights.of(merged)
    weights = Weights.of(before)
    assert {row["tower"] for row in rows.values()} == {"language", "projector"}
    for path, row in rows.items():
        change = (after.matrix(path) - weights.matrix(path)).double()
        assert row["update_norm"] == pytest.approx(float(torch.linalg.norm(change)), rel=1e-4)
        U, S, Vh = torch.linalg.svd(change)
        r = row["rank"]
        inside = torch.linalg.norm(U[:, :r].T @ weights.matrix(path).double() @ Vh[:r].T)
        assert row["amplification"] == pytest.approx(float(S[:r].norm() / inside), rel=1e-3)
    moved = next(row for row in rows.values() if row["tower"] == "language")
    assert ("moved_A" in moved) == (method in ("milora", "pissa", "random"))


def test_a_model_tuned_in_full_and_an_adapter_of_peft(base: Path, tmp_path: Path) -> None:
    model = load_model(base)[0]
    path = "model.language_model.layers.0.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(path).weight.mul_(1.5)
    model.save_pretrained(str(tmp_path / "full"))
    (row,) = analysed(tmp_path / "full", base).values()
    assert (row["path"], row["relative_update"]) == (path, pytest.approx(0.5, rel=1e-5))
    assert row["amplification"] == pytest.approx(0.5, rel=1e-4)  # dW = W/2: its directions are W's own
    assert row["similarity_top"] > 0.99
    config = LoraConfig(r=2, target_modules=r".*layers\.1\.mlp\.up_proj", use_dora=True, init_lora_weights=False)
    get_peft_model(load_model(base)[0], config).save_pretrained(str(tmp_path / "peft"))
    (row,) = analysed(tmp_path / "peft", base).values()
    assert (row["method"], row["rank"], row["norm_A"] > 0) == ("dora", 2, True)


def test_the_headline_keeps_a_projector_in_full_apart() -> None:
    def row(tower: str, moved: float, top: float) -> dict[str, Any]:
        return {"tower": tower, "relative_update": moved, "similarity_top": top, "similarity_bottom": 0.5}

    said = lede("update", [row("projector", 0.16, 0.75), row("language", 0.01, 0.1), row("language", 0.02, 0.2)])
    assert said == (
        "The training changed language (2 layers) by 1.5 % of its norm "
        "(similarity with the last directions 0.50, first 0.15), projector (1 layer) by 16 % of its norm "
        "(similarity with the last directions 0.50, first 0.75)"
    )


@pytest.mark.usefixtures("real_plots")
def test_a_text_only_base_and_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny-text", "--rank", "8", "--output_dir", str(tmp_path), "--format", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    model, _ = load_model("tiny-text")
    row = printed["rows"][0]
    sigma = torch.linalg.svdvals(model.get_submodule(row["path"]).weight.detach().double())
    assert row["minor_energy"] == pytest.approx(float(sigma[-8:].square().sum() / sigma.square().sum()), rel=1e-4)
    assert {row["family"] for row in printed["rows"]} == {"attention", "mlp"}
    for name in ("spectra", "minor-energy", "heat-effective_rank", "heat-minor_energy"):
        for suffix in ("png", "pdf"):
            assert (tmp_path / f"{name}.{suffix}").stat().st_size > 100
    with (tmp_path / "layers.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(printed["rows"])
    page = (tmp_path / "analysis.html").read_text()
    assert page.count("<figure") == 5
    assert "Roy and Vetterli" in page


def test_what_was_interrupted_goes_on(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(rank: int) -> None:
        todo = plan(str(base), None, rank=rank, device="cpu", modules="*language*mlp*")
        assert len(rows_of(todo, tmp_path)) == 6

    run(4)
    file = tmp_path / "layers.jsonl"
    capsys.readouterr()
    whole = file.read_text().splitlines(keepends=True)
    file.write_text("".join(whole[:3]) + whole[3][:20])
    run(4)
    assert "2 of 6 layers are already analysed" in capsys.readouterr().err
    again = file.read_text().splitlines(keepends=True)
    assert again[:3] == whole[:3]
    assert [json.loads(line)["sigma"] for line in again[1:]] == [json.loads(line)["sigma"] for line in whole[1:]]
    with raises_code("output-exists", message="another analysis"):
        run(5)


def test_files_are_read_layer_by_layer_in_any_layout(base: Path, tmp_path: Path) -> None:
    """From the folder, and from one with LLaVA's older key names, the weights are those of the loaded model."""
    from safetensors.torch import load_file, save_file

    model, _ = load_model(base)
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((base / "config.json").read_text())
    renamed = {}
    for key, tensor in load_file(base / "model.safetensors").items():
        key = key.removeprefix("model.")
        key = key.replace("language_model.layers", "language_model.model.layers") if "model.model" not in key else key
        renamed[key] = tensor
    save_file(renamed, old / "model.safetensors", metadata={"format": "pt"})
    for folder in (base, old):
        weights = open_weights(str(folder))
        assert weights.stored is not None
        for path in weights.paths():
            assert torch.equal(weights.matrix(path), model.get_submodule(path).weight.flatten(1))


def test_a_wrong_base_and_a_place_without_files_are_refused(
    base: Path, tmp_path: Path, tiny_llava: Callable[..., Made]
) -> None:
    model = disturbed(
        apply_milora(
            load_model("tiny")[0], Policy.parse("[{modules: language.mlp, method: milora, protect: 0, rank: 2}]")
        )
    )
    model.save_pretrained(str(tmp_path / "adapter"))
    other = disturbed(tiny_llava()[0])
    other.save_pretrained(str(tmp_path / "other"))
    with raises_code("adapter-wrong-base", where="--base"):
        main([str(tmp_path / "adapter"), "--base", str(tmp_path / "other")])
    (tmp_path / "adapter" / "recipe.yaml").write_text("model: tiny\n")
    flags = ["--base", str(tmp_path / "other"), "--allow-base-mismatch"]
    assert main([str(tmp_path / "adapter"), *flags]) == 0
    assert "A lower factor alone does not show" in (tmp_path / "adapter" / "report.html").read_text()
    with raises_code("flag-required", says="--output_dir: .* is not the folder of a training"):
        main(["tiny"])
    with raises_code("analysis-no-match", where="--modules", message="no layer matches"):
        main(["tiny", "--modules", "nothing", "--output_dir", str(tmp_path / "x")])
    with raises_code("analysis-no-change", message="changes no matrix"):
        main([str(base), "--base", str(base)])


def test_the_screen_has_a_line_for_each_measure_and_a_column_for_each_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tiny-text", "--rank", "8", "--modules", "*layers.0*", "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Means over the layers of each part." in printed
    assert all(words in printed for words in ("language attention", "language mlp", "effective rank"))
