"""README and the user's pages stay short, in words as `wc -w` counts them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README_LINES, ALL_WORDS = 160, 22_000


def words(page: Path) -> int:
    return len(page.read_text(encoding="utf-8").split())


def test_readme_is_short() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_readme_and_the_pages_for_users_are_short() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # not those in contributing/
    assert sum(map(words, pages)) <= ALL_WORDS, {page.name: words(page) for page in pages}
