"""`python -m milora_vl.analyze` on every form that a training can have; its measures."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor

from milora_vl import Policy, apply_milora, load_model, merge
from milora_vl.analyze import layers as measures
from milora_vl.analyze.__main__ import main
from milora_vl.analyze.layers import LowRankUpdate, layers_of, rows_of
from milora_vl.core.svd import decompose
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
    rows = rows_of(layers, "cpu", 8, folder / "rows.jsonl")
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
    """||dW|| of each layer equals merged minus base, for every form; so are the first directions."""
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
def test_the_command_writes_a_table_and_figures(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after it was interrupted, and a line was cut off: the layers that were finished are not computed again."""
    rules = "[{modules: language.mlp, method: milora, rank: 2, protect: 0}]"
    disturbed(apply_milora(load_model(base)[0], Policy.parse(rules))).save_pretrained(str(tmp_path / "run"))
    folder = tmp_path / "analysis"
    flags = ["--base", str(base), "--modules", "*language*mlp*", "--output_dir", str(folder)]
    rows, computed = measures.Layer.row, list[str]()

    def row(layer: Any, *settings: Any) -> Any:
        computed.append(layer.path)
        if len(computed) == 4:
            raise KeyboardInterrupt
        return rows(layer, *settings)

    monkeypatch.setattr(measures.Layer, "row", row)
    with pytest.raises(KeyboardInterrupt):
        main([str(tmp_path / "run"), *flags])
    store = folder / "unfinished.jsonl"
    store.write_text(store.read_text()[:-9])
    assert main([str(tmp_path / "run"), *flags]) == 0
    assert computed[4:6] == computed[2:4]
    assert len(computed) == 8
    assert not store.exists()
    with (folder / "layers.csv").open() as table:
        assert len(list(csv.DictReader(table))) == 6
    printed = capsys.readouterr().out
    assert "Means over the layers of each part." in printed
    assert all(words in printed for words in ("language mlp", "like bottom", "A moved"))
    for name in ("similarity", "amplification"):
        assert (folder / f"{name}.png").stat().st_size > 100


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
    with raises_code("", says="is not the folder of an adapter"):
        main(["tiny"])
    with raises_code("", says="--output_dir: .* is not the folder of a training"):
        main(["tiny", "--base", str(base)])
    with raises_code("", where="--modules", message="no layer matches"):
        main([str(tmp_path / "adapter"), *flags, "--modules", "nothing"])
    with raises_code("", message="changes no matrix"):
        main([str(base), "--base", str(base)])


SHAPES = st.tuples(st.integers(3, 12), st.integers(3, 12))

SEEDS = st.integers(0, 2**31)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(SHAPES, SEEDS, st.floats(0.1, 9), st.sampled_from(["minor", "principal"]))
def test_amplification_of_a_scaled_part_is_its_scale(shape: tuple[int, int], seed: int, c: float, part: str) -> None:
    """dW = c W_part: U and V are W's own, so that ||U'dWV|| = c ||W_part|| and the factor is c, for every part."""
    W = randn(*shape, seed=seed)
    f = decompose(W, 2, part)
    update = LowRankUpdate.from_factors(c * f.U * f.S, f.Vh)
    of_update, of_base = measures.amplification(W, update, 2)
    held = float(f.S.square().sum().sqrt())
    assert (of_update, of_base) == (pytest.approx(c * held, rel=1e-6), pytest.approx(held, rel=1e-6))
    whole = decompose(W, min(shape), "principal")
    top, bottom, rest = measures.similarities(whole, update, 2)
    assert (bottom if part == "minor" else top) == pytest.approx(1, abs=1e-6)
    assert rest == pytest.approx(2 / min(shape), rel=1e-6)  # the subspace lies within W's columns


def test_the_papers_random_column_is_the_expectation() -> None:
    """Table of method: q_proj 1.50, down_proj 1.17 of LLaMA2-7B at r = 64."""
    assert measures.expected_inside(97.36, (4096, 4096), 64) == pytest.approx(1.50, rel=0.03)
    assert measures.expected_inside(123.0, (4096, 11008), 64) == pytest.approx(1.17, rel=0.03)


def test_an_intruder_is_a_direction_that_was_not_there() -> None:
    """W diagonal: a strong update along (e1 + ... + e8)/sqrt(8) has a cosine of 0.35 with every vector of W."""
    W = torch.diag(torch.arange(8, 0, -1).double())
    whole = decompose(W, 8, "principal")
    new = torch.full((8, 1), 1 / math.sqrt(8), dtype=torch.float64)
    tuned = decompose(W + 100 * new @ new.T, 3, "principal")
    assert measures.intruders(whole, tuned.U[:, :1]) == 1
    assert measures.intruders(whole, tuned.U[:, :1], epsilon=0.3) == 0
    assert measures.intruders(whole, decompose(3 * W, 8, "principal").U) == 0


def test_factors_and_matrix_give_the_same_update() -> None:
    B, A = randn(7, 3), randn(3, 9, seed=1)
    low, whole = LowRankUpdate.from_factors(B, A), LowRankUpdate.from_matrix(B @ A, 5)
    assert (len(low.S), len(whole.S)) == (3, 3)
    torch.testing.assert_close(low.S, whole.S)
    torch.testing.assert_close(low.U * low.S @ low.Vh, B @ A)
    assert LowRankUpdate.from_factors(torch.zeros(4, 2), randn(2, 4)).S.numel() == 0
    assert measures.moved(A, A) == pytest.approx(1)
    assert measures.moved(A, torch.zeros(3)) is None
