"""Answers on disk survive a kill, and none is ever deleted."""

from __future__ import annotations

from pathlib import Path

from milora_eval.answers.store import Store, read_lines


def lines(*keys: str) -> list[dict[str, str]]:
    return [{"key": key, "benchmark": "pope", "id": key, "prediction": f"answer {key}"} for key in keys]


def stored(folder: Path) -> dict[str, str]:
    return Store(folder).known()


def test_a_line_cut_off_by_a_kill_is_asked_again(tmp_path: Path) -> None:
    Store(tmp_path).append(lines("a", "b"))
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    store = Store(tmp_path)
    assert sorted(stored(tmp_path)) == ["a"]
    store.open()
    store.append(lines("b"))
    assert read_lines(path) == lines("a", "b")


def test_a_finished_file_has_exactly_the_asked_answers_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append(lines("c", "old", "a", "b"))
    store.finish(lines("a", "b", "c"))
    assert read_lines(tmp_path / "predictions.jsonl") == lines("a", "b", "c")
    assert read_lines(tmp_path / "spare.jsonl") == lines("old")
    assert set(stored(tmp_path)) == {"a", "b", "c", "old"}


def test_spare_answers_come_back_when_they_are_asked_for(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append(lines("a", "b", "c"))
    store.finish(lines("a"))
    store.finish(lines("a", "b", "c"))
    assert read_lines(tmp_path / "predictions.jsonl") == lines("a", "b", "c")
    assert set(stored(tmp_path)) == {"a", "b", "c"}


def test_the_last_of_equal_keys_counts_and_keys_may_be_any_text(tmp_path: Path) -> None:
    key = "0123456789abcdef"
    store = Store(tmp_path)
    store.append(
        [*lines(key, "my own key"), {"key": key, "benchmark": "pope", "id": "2", "prediction": "new\u2028line"}]
    )
    assert store.known() == {key: "new\u2028line", "my own key": "answer my own key"}
