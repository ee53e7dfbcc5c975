"""Every HTML page of the project in a real browser, on a desk and on a phone, light and dark: whole, legible, alone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from milora_data.__main__ import main as data
from milora_data.cards import fitting, small
from milora_eval.__main__ import main as evaluation
from milora_vl.common.cli import page as render
from milora_vl.common.evaluator_protocol import QuestionSet
from milora_vl.report.page import write_report
from milora_vl.sweep import page as sweep_page
from milora_vl.sweep.cells import make_cells
from milora_vl.sweep.runner import Sweep
from milora_vl.train.settings import Recipe
from support import browser, fake_run
from support.stored_answers import write_answers
from support.sweep_cells import RECIPE, finish_cell

BROKEN = "[...document.images].filter((image) => !image.complete || !image.naturalWidth).length"


CARDS = ".gallery > li"
TEXT = "document.body.innerText.replace(/\\s+/g, ' ')"


def a_report(folder: Path) -> Path:
    return write_report(fake_run.make_run(folder / "run", num_questions=64))


def a_view(folder: Path) -> Path:
    base = write_answers(folder, "base", ["red", "no", "x", "</script><script>alert(1)</script>", "مرحبا", ""])
    final = write_answers(folder, "final", ["red", "yes", "green", "no", "W" * 300, "no"])
    assert evaluation(["view", str(base), str(final)]) == 0
    return final / "view.html"


def a_show(folder: Path) -> Path:
    Image.new("RGB", (60, 40), "red").save(folder / "red.png")
    turns = [{"from": "human", "value": "<image>\nIs 1 < 2?"}, {"from": "gpt", "value": "<b>Yes</b>"}]
    plain = [{"from": "human", "value": "Which is bigger?"}, {"from": "gpt", "value": "W" * 300}]
    pictures = {"a": "red.png", "b": "gone.png"}
    records = [{"id": name, "image": image, "conversations": turns} for name, image in pictures.items()]
    (folder / "three.json").write_text(json.dumps([*records, {"id": "c", "conversations": plain}]))
    out = folder / "show.html"
    words = [str(folder / "three.json"), "--image_folder", str(folder), "--limit", "9", "--html", str(out)]
    assert data(["show", *words]) == 0
    return out


def a_sweep(folder: Path) -> Path:
    sweep = Sweep(folder, Recipe.parse(RECIPE), QuestionSet("emoji"))
    cells = make_cells(sweep.recipe, ["milora", "lora", "random"], [1e-4, 1e-3], None, 2)
    for index, cell in enumerate(cells[:-1]):
        finish_cell(sweep, cell, loss=1 - cell.learning_rate, right=[True, index % 2 == 0], forgetting=0.1 + index / 50)
    failure = folder / "failed" / f"{cells[-1].name}.json"
    failure.parent.mkdir()
    failure.write_text(json.dumps({"said": "error: the data is gone"}))
    command = "python -m milora_vl.sweep " + "--methods milora,lora " * 9
    return sweep_page.write(sweep_page.of_sweep(sweep, cells, 2, command))[0]


PAGES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "report": (a_report, ("Before and after", "What it forgot", "Do it again", "64 test questions")),
    "view": (a_view, ("final corrects 3 wrong answers of base", "</script><script>alert(1)</script>", "6 shown")),
    "show": (a_show, ("3 records as training sees them", "gone.png (no such file)", "<b>Yes</b></s>")),
    "sweep": (a_sweep, ("11 of 12 cells are done, 1 failed", "random − protected MiLoRA", "Do it again")),
}


@pytest.fixture(scope="module")
def tab() -> Iterator[browser.Browser]:
    program = browser.find()
    if program is None:
        pytest.skip(f"none of {', '.join(browser.NAMES)} is installed")
    with contextlib.closing(browser.Browser(program)) as opened:
        yield opened


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_whole_and_alone_on_every_screen(name: str, tab: browser.Browser, tmp_path: Path) -> None:
    make, words = PAGES[name]
    page = make(tmp_path)
    assert page.stat().st_size < render.MAX_BYTES
    for width in browser.WIDTHS:
        tab.open(page, width=width)
        assert (tab.said, tab.elsewhere()) == ([], [])
        assert tab.run(browser.TOO_WIDE) == []
        assert tab.run(BROKEN) == 0
    text = tab.run(TEXT)
    assert [word for word in words if word not in text] == []


def shown(tab: browser.Browser, cards: str) -> Any:
    return tab.run(f"[...document.querySelectorAll({cards!r})].filter((card) => card.checkVisibility()).length")


def choose(tab: browser.Browser, kind: str) -> None:
    tab.run(f"[...document.querySelectorAll('button')].find((b) => b.textContent.startsWith({kind!r})).click()")


def search(tab: browser.Browser, words: str) -> None:
    field = "document.getElementById('search')"
    tab.run(f"{field}.value = {words!r}; {field}.dispatchEvent(new Event('input'))")


def test_answers_are_filtered_by_what_changed_and_by_words(tab: browser.Browser, tmp_path: Path) -> None:
    tab.open(a_view(tmp_path))
    assert shown(tab, CARDS) == 6
    found = {}
    for kind in ("right", "wrong", "changed", "now right", "now wrong"):
        choose(tab, kind)
        found[kind] = shown(tab, CARDS)
    assert found["right"] + found["wrong"] == 6
    assert (found["changed"], found["now right"]) == (5, 3)
    choose(tab, "all")
    search(tab, "ALERT(1)")
    assert shown(tab, CARDS) == 1
    assert "1 shown" in tab.run(TEXT)
    assert tab.said == []


def test_records_are_filtered_by_kind_and_by_words(tab: browser.Browser, tmp_path: Path) -> None:
    tab.open(a_show(tmp_path))
    assert shown(tab, CARDS) == 3
    for kind in ("with pictures", "with unreadable", "text only"):
        choose(tab, kind)
        assert shown(tab, CARDS) == 1
    choose(tab, "all")
    search(tab, "is 1 < 2")
    assert shown(tab, CARDS) == 2
    assert tab.said == []


def test_many_pictures_are_made_smaller_until_they_fit() -> None:
    noise = [small(Image.effect_noise((400, 400), 90).convert("RGB")) for _ in range(4)]
    whole = sum(len(uri) for uri in fitting(noise, 10_000_000))
    made = fitting([*noise, None], whole // 3)
    assert whole // 20 < sum(map(len, made)) <= whole // 3
    assert made[4] == ""
    assert len({uri[:40] for uri in made[:4]}) == 1


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
