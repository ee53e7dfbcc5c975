"""The README and docs/ hold together: make targets exist, links lead somewhere. test_documented.py runs their code."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from milora_vl import train
from support.documented import PAGES, ROOT, Block, blocks


@pytest.mark.parametrize("block", [block for block in blocks("yaml") if "model:" in block.text], ids=str)
def test_a_whole_recipe_fits_a_device_of_24_gib(block: Block, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(block.text, encoding="utf-8")
    command = [sys.executable, "-m", "milora_vl.train", "--recipe", "recipe.yaml", "--dry-run", "--gpu-memory", "24"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout  # its data is not here
    assert "fits   24 GiB" in shown


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    call = re.compile(r"(?:^|`)make (?:[A-Z]+=\S+ )?([a-z-]+)", re.MULTILINE)
    named = {target for page in PAGES for target in call.findall(page.read_text(encoding="utf-8"))}
    assert {"demo", "test"} <= named
    assert not named - targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_first_screen_has_what_a_newcomer_needs() -> None:
    first = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40]
    for command in ("pip install", "python -m milora_vl.train --model", "make demo", "make test"):
        assert any(line.startswith(command) for line in first), command


def test_the_memory_of_the_first_training_is_what_a_dry_run_plans(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.findall(r"^python -m milora_vl\.train (--model .*) --data_path .*$", readme, re.MULTILINE)[0].split()
    smaller = re.findall(r"or [\d.]+ GiB with `(--per_device_[^`]*)`", readme)[0].split()
    for flags, place in (([], "GiB on one GPU"), (smaller, "GiB with `--per_device_train_batch_size")):
        assert train.main([*first, *flags, "--dry-run", "--gpu-memory", "24"]) == 0
        needed = re.findall(r"needs ([\d.]+) GiB", capsys.readouterr().out)[0]
        assert f"{needed} {place}" in readme


def test_the_demo_is_shown_as_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python benchmarks/demo.py` wrote both."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    demo = importlib.import_module("demo")
    found = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))["demo"]["result"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert demo.written(readme, found) == readme


def test_machines_without_a_network_are_told_of_the_pinned_wheels() -> None:
    from milora_data.assets import ASSETS

    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert [asset.requirement for asset in ASSETS.values() if asset.requirement not in page] == []
