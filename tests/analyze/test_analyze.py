"""`python -m milora_vl.analyze` on every form that a training can have."""

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
from milora_vl.analyze.layers import layers_of, rows_of
from milora_vl.core.weights.matrices import read_matrix
from support.adapter_cases import move
from support.problems import raises_code

Made = tuple[Any, Any]


def disturbed(model: Any) -> Any:
    move(model, 0.1)
    return model


def analysed(folder: Path, base: Path) -> dict[str, dict[str, Any]]:
    """The rows of a trained folder by path, without figures, which take their time."""
    _, layers = layers_of(str(folder), str(base))
    rows = rows_of(layers, folder / "analysis", {"subject": str(folder)}, "cpu", 8)
    return {row["path"]: row for row in rows}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = load_model("tiny")
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(str(folder))
    processor.save_pretrained(str(folder))
    return folder


METHODS = ["milora, protect: 0", "pissa", "random", "lora", "dora"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_change_that_merging_makes(method: str, base: Path, tmp_path: Path) -> None:
    """||dW|| of each layer is that of merged minus base, whatever the form; so are the first directions."""
    before, _ = load_model(base)
    rules = f"[{{modules: language.mlp, method: {method}, rank: 3, alpha: 6}}, {{modules: projector, method: full}}]"
    model = disturbed(apply_milora(load_model(base)[0], Policy.parse(rules)))
    model.save_pretrained(str(tmp_path))
    rows = analysed(tmp_path, base)
    merged = merge(model)
    assert {row["tower"] for row in rows.values()} == {"language", "projector"}
    for path, row in rows.items():
        W = read_matrix(before.get_submodule(path)).double()
        change = read_matrix(merged.get_submodule(path)).double() - W
        assert row["update_norm"] == pytest.approx(float(torch.linalg.norm(change)), rel=1e-4)
        U, S, Vh = torch.linalg.svd(change)
        r = row["rank"]
        inside = torch.linalg.norm(U[:, :r].T @ W @ Vh[:r].T)
        assert row["amplification"] == pytest.approx(float(S[:r].norm() / inside), rel=1e-3)
    moved = next(row for row in rows.values() if row["tower"] == "language")
    assert ("moved_A" in moved) == (method not in ("lora", "dora"))


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


@pytest.mark.usefixtures("real_plots")
def test_a_text_only_base_and_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny-text", "--rank", "8", "--output_dir", str(tmp_path), "--format", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    model, _ = load_model("tiny-text")
    row = printed["rows"][0]
    sigma = torch.linalg.svdvals(model.get_submodule(row["path"]).weight.detach().double())
    assert row["minor_energy"] == pytest.approx(float(sigma[-8:].square().sum() / sigma.square().sum()), rel=1e-4)
    assert {row["family"] for row in printed["rows"]} == {"attention", "mlp"}
    for name in ("spectra", "effective-rank", "minor-energy"):
        assert (tmp_path / f"{name}.png").stat().st_size > 100
    with (tmp_path / "layers.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(printed["rows"])
    assert not list(tmp_path.glob("*.html"))


def test_what_was_interrupted_goes_on(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(rank: int) -> None:
        flags = ["--rank", str(rank), "--modules", "*language*mlp*", "--output_dir", str(tmp_path)]
        assert main([str(base), *flags]) == 0
        with (tmp_path / "layers.csv").open() as table:
            assert len(list(csv.DictReader(table))) == 6

    run(4)
    file = tmp_path / "layers.jsonl"
    capsys.readouterr()
    whole = file.read_text().splitlines(keepends=True)
    file.write_text("".join(whole[:3]) + whole[3][:20])
    run(4)
    assert "2 of 6 layers are already analysed" in capsys.readouterr().err
    assert file.read_text().splitlines(keepends=True) == whole
    with raises_code("", message="another analysis"):
        run(5)


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
    with raises_code("adapter-wrong-base"):
        main([str(tmp_path / "adapter"), "--base", str(tmp_path / "other")])
    (tmp_path / "adapter" / "recipe.yaml").write_text("model: tiny\n")
    flags = ["--base", str(tmp_path / "other"), "--allow-base-mismatch"]
    assert main([str(tmp_path / "adapter"), *flags]) == 0
    assert "A lower factor alone does not show" in (tmp_path / "adapter" / "report.html").read_text()
    with raises_code("", says="--output_dir: .* is not the folder of a training"):
        main(["tiny"])
    with raises_code("", where="--modules", message="no layer matches"):
        main(["tiny", "--modules", "nothing", "--output_dir", str(tmp_path / "x")])
    with raises_code("", message="changes no matrix"):
        main([str(base), "--base", str(base)])


def test_the_screen_has_a_line_for_each_measure_and_a_column_for_each_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tiny-text", "--rank", "8", "--modules", "*layers.0*", "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Means over the layers of each part." in printed
    assert all(words in printed for words in ("language attention", "language mlp", "effective rank"))
