"""The documentation builds into a site: no warnings, every page in the menu, nothing asked of other hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip(), done.stderr
    return folder


def test_every_page_is_in_the_menu(site: Path) -> None:
    menu = (site / "index.html").read_text("utf-8")
    docs = ROOT / "docs"
    pages = {page.stem for page in docs.glob("*.md")}  # those in contributing/ are read in the repository
    assert {name for name in pages if f'href="{name}.html"' not in menu} == set()


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    import milora_data
    import milora_eval
    import milora_vl

    reference = (site / "api.html").read_text("utf-8")
    anchors = set(re.findall(r'id="([\w.]+)"', reference))
    there = {(anchor.split(".")[0], anchor.split(".")[-1]) for anchor in anchors}
    for package in (milora_vl, milora_data, milora_eval):
        assert [name for name in package.__all__ if (package.__name__, name) not in there] == []


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    loads = re.compile(r'<(?:script|img|iframe|source)[^>]+src="https?:|<link[^>]+rel="stylesheet"[^>]+href="https?:')
    assert [page.name for page in site.glob("*.html") if loads.search(page.read_text("utf-8"))] == []
