"""The pages have the numbers of the studies, and README and those that advise no measured number beside them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from studies import figures

CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
# A ratio below one, a factor, a percentage, or a mean with its interval.
MEASURED = re.compile(r"(?<![\w.])0\.\d+|\d ?(?:times|x)\b|\d ?%(?! intervals)|±")


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_the_numbers_of_a_page_are_those_of_the_studies(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert figures.written(text) == text, "python -m studies.figures writes the page again"


@pytest.mark.parametrize(
    "page", [page for page in figures.PAGES if page.name != "results.md"], ids=lambda page: page.name
)
def test_no_measured_number_is_typed(page: Path) -> None:
    typed = CODE.sub("", figures.BLOCK.sub("", page.read_text(encoding="utf-8")))
    assert [line for line in typed.splitlines() if MEASURED.search(line)] == []


def test_a_changed_number_is_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(figures.FIGURES, "table", lambda: "| 0.5 |\n")
    page = "a\n<!-- figures: table -->\n| {} |\n<!-- end -->\nb\n"
    assert figures.written(page.format("0.4")) == page.format("0.5")
