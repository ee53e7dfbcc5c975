"""Free-form answers and their judge: from a file or an OpenAI-compatible server, one question per answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from milora_eval.__main__ import main
from milora_eval.answers.store import Store, to_line
from milora_eval.benchmark import Item
from milora_eval.chat_server import PAUSES
from milora_eval.scores.results import numbers, read_results, write_results
from milora_eval.suites import find_benchmark, folder_of
from support import official_data
from support.problems import raises_code


class Judge(BaseHTTPRequestHandler):
    """Answers with the texts in `replies`, and stores the requests."""

    replies: ClassVar[list[str]] = []
    asked: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if not self.replies:
            self.send_response(503)
            self.send_header("Retry-After", "0")
            self.end_headers()
            return
        body = json.dumps({"choices": [{"message": {"content": self.replies.pop(0)}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Judge.replies, Judge.asked = [], []
    with HTTPServer(("127.0.0.1", 0), Judge) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1"
        running.shutdown()


def stored(name: str, folder: Path) -> Path:
    data = official_data.write(folder / "data", {"llava-bench": "llava-bench-in-the-wild"}.get(name, name))
    benchmark = find_benchmark(name)
    items = benchmark.load(folder_of(benchmark, data))
    Store(folder / "out").finish([to_line(benchmark, item, f"It is {item.id}.", item.id, data) for item in items])
    about = {"suite": name, "which": "final", "data": str(data), "limit": None}
    write_results(folder / "out", about | numbers(folder / "out", name))
    return folder / "out"


def headline(folder: Path) -> dict[str, Any]:
    return dict(read_results(folder)["benchmarks"][0]["metrics"][0])


def test_grades_come_from_a_server_and_are_kept(server: str, tmp_path: Path) -> None:
    folder = stored("mm-vet", tmp_path)
    Judge.replies = ["0.5", " 1.0\n"]
    with raises_code("server-no-answer", message="503") as caught:
        main(["judge", str(folder), "--endpoint", server])
    assert caught.value.exit_code == 1
    Judge.replies = ["0.0"]
    assert main(["judge", str(folder), "--endpoint", server, "--judge_model", "other"]) == 0
    assert [request["model"] for request in Judge.asked] == ["gpt-4-0613"] * (2 + 1 + len(PAUSES)) + ["other"]
    prompt = Judge.asked[0]["messages"][0]["content"]
    assert prompt.endswith("What is it?  | red <OR> a disc | It is v1_0. | ")
    assert prompt.startswith("Compare the ground truth and prediction from AI models")
    metrics = {metric["name"]: metric["value"] for metric in read_results(folder)["benchmarks"][0]["metrics"]}
    assert metrics == {"grade": 0.5, "rec": 0.5, "ocr": 0.5}


@pytest.mark.parametrize(
    ("said", "grade"), [("0.5", 0.5), ("1", 1.0), (".7", 0.7), ("0.5 | What", 0.5), ("0.9\nas", 0.9), ("", None)]
)
def test_a_grade_is_the_first_word(said: str, grade: float | None) -> None:
    assert find_benchmark("mm-vet").grade(Item("v1_0", ()), said) == grade


def test_a_grade_that_is_no_number_is_none_and_not_zero(tmp_path: Path) -> None:
    folder = stored("mm-vet", tmp_path)
    (tmp_path / "grades.json").write_text(json.dumps({"v1_0": "1.0", "v1_1": "I cannot tell", "v1_2": "1.7"}))
    assert main(["judge", str(folder), "--file", str(tmp_path / "grades.json")]) == 0
    assert (headline(folder)["value"], headline(folder)["n"]) == (1.0, 1)


def test_llava_bench_is_the_ratio_of_the_marks(tmp_path: Path) -> None:
    folder = stored("llava-bench", tmp_path)
    reviews = [{"question_id": i, "content": text} for i, text in enumerate(["8 6\nfine", "10 9", "sorry"])]
    official_data.dump_lines(tmp_path / "reviews.jsonl", reviews)
    assert main(["judge", str(folder), "--file", str(tmp_path / "reviews.jsonl")]) == 0
    assert headline(folder)["value"] == pytest.approx(15 / 18)
    assert headline(folder)["note"] == "1 reviews without two numbers are skipped"


def test_a_review_request_is_llavas(tmp_path: Path) -> None:
    stored("llava-bench", tmp_path)
    benchmark = find_benchmark("llava-bench")
    item = benchmark.load(folder_of(benchmark, tmp_path / "data"))[0]
    prompt = benchmark.judge_prompt(item, "Mine.")
    assert benchmark.judge_system == "You are a helpful and precise assistant for checking the quality of the answer."
    start = "[Context]\nA disc.\n\n[Question]\nDescribe it.\n\n[Assistant 1]\nA red disc.\n\n[End of Assistant 1]\n\n"
    assert prompt.startswith(f"{start}[Assistant 2]\nMine.\n\n[End of Assistant 2]\n\n[System]\nWe would like")


def test_a_judgement_belongs_to_the_answer_it_was_made_for(tmp_path: Path) -> None:
    folder = stored("mm-vet", tmp_path)
    (tmp_path / "grades.json").write_text(json.dumps({f"v1_{i}": "1.0" for i in range(3)}))
    main(["judge", str(folder), "--file", str(tmp_path / "grades.json")])
    path = folder / "predictions.jsonl"
    path.write_text(path.read_text().replace("It is v1_1.", "It is another."))
    main(["score", str(folder)])
    assert headline(folder)["n"] == 2


def test_a_partial_or_strange_file_is_said(tmp_path: Path) -> None:
    folder = stored("mm-vet", tmp_path)
    (tmp_path / "grades.json").write_text(json.dumps({"v1_0": "1.0"}))
    with raises_code("judge-incomplete", message="2 answers have no judgement yet"):
        main(["judge", str(folder), "--file", str(tmp_path / "grades.json")])
    (tmp_path / "grades.json").write_text(json.dumps({"v1_7": "1.0"}))
    with raises_code("judge-unknown-id", message='the id "v1_7"'):
        main(["judge", str(folder), "--file", str(tmp_path / "grades.json")])
