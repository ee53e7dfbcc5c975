"""Answers on disk survive a kill, and none is ever deleted."""

from __future__ import annotations

from pathlib import Path

from milora_eval.answers.store import Store, read_lines


def lines(*keys: str) -> list[dict[str, str]]:
    return [{"key": key, "benchmark": "pope", "id": key, "prediction": f"answer {key}"} for key in keys]


def stored(folder: Path) -> dict[str, str]:
    return Store(folder).known()


def test_a_finished_file_has_exactly_the_asked_answers_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append(lines("c", "old", "a", "b"))
    store.finish(lines("a", "b", "c"))
    assert read_lines(tmp_path / "predictions.jsonl") == lines("a", "b", "c")
    assert read_lines(tmp_path / "spare.jsonl") == lines("old")
    assert set(stored(tmp_path)) == {"a", "b", "c", "old"}


def test_the_last_of_equal_keys_counts_and_keys_may_be_any_text(tmp_path: Path) -> None:
    key = "0123456789abcdef"
    store = Store(tmp_path)
    store.append(
        [*lines(key, "my own key"), {"key": key, "benchmark": "pope", "id": "2", "prediction": "new\u2028line"}]
    )
    assert store.known() == {key: "new\u2028line", "my own key": "answer my own key"}
