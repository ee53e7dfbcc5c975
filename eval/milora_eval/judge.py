"""Judge models for free answers (MM-Vet, LLaVA-Bench): from a file, or from any OpenAI-compatible endpoint.

Judgements are kept line by line in judgements.jsonl beside the answers and never asked for twice.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_data.errors import UserError
from milora_eval.answers.identity import digest
from milora_eval.answers.lines import to_item
from milora_eval.answers.store import JUDGEMENTS, PREDICTIONS, Line, each_line
from milora_eval.data_files import read_json, read_jsonl
from milora_eval.scores.results import judgements, review_of
from milora_eval.suites import find_benchmark

Ask = Callable[[str, str, str], str]  # (model, system message or "", prompt) -> what the judge said


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A chat-completions server: `url` up to and including /v1; `key` goes into the Authorization header."""

    url: str
    key: str = ""
    timeout: float = 120.0

    def ask(self, model: str, system: str, prompt: str) -> str:
        """Return the answer at temperature 0. Raises UserError (exit code 1) for a server that refuses."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        body = {"model": model, "temperature": 0, "messages": messages}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = json.load(response)["choices"][0]["message"]["content"]
        except (urllib.error.URLError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
            kept = "what it said so far is kept; the same command goes on"
            raise UserError(f"the judge at {address} did not answer: {error}\n{kept}", exit_code=1) from None
        return str(answer)


def unjudged(folder: Path) -> Iterator[Line]:
    """Yield the answers that need a judge and have no judgement yet."""
    reviews = judgements(folder)
    for line in each_line(folder / PREDICTIONS):
        if find_benchmark(line["benchmark"]).judge and review_of(line, reviews) is None:
            yield line


def judge_by(ask: Ask, line: Line, model: str | None, folder: Path) -> None:
    """Ask the judge about one answer and keep what it says."""
    benchmark = find_benchmark(line["benchmark"])
    prompt = benchmark.judge_prompt(to_item(line), line["prediction"])
    said = ask(model or benchmark.judge, benchmark.judge_system, prompt)
    _keep(line, said, model or benchmark.judge, folder)


def judge_from_file(path: Path, folder: Path) -> int:
    """Take judgements from a file; return how many were new.

    JSONL of {question_id or id, judgement | content | text}, as LLaVA's review files, or one JSON object of id to text.
    Raises UserError that names an id of no question.
    """
    content: Any = read_json(path) if path.suffix == ".json" else list(read_jsonl(path))
    rows = content.items() if isinstance(content, dict) else [_review(row, path) for row in content]
    waiting = {line["id"]: line for line in unjudged(folder)}
    known = {line["id"] for line in each_line(folder / PREDICTIONS) if find_benchmark(line["benchmark"]).judge}
    count = 0
    for name, said in rows:
        if str(name) not in known:
            raise UserError(f'{path}: a judgement for the id "{name}", which is no question of {folder}')
        line = waiting.get(str(name))
        if line is not None:
            _keep(line, str(said), str(path), folder)
            count += 1
    return count


def _review(row: Any, path: Path) -> tuple[str, str]:
    if isinstance(row, dict):
        name = row.get("id") if row.get("question_id") is None else row["question_id"]
        said = next((row[key] for key in ("judgement", "content", "text") if key in row), None)
        if name is not None and said is not None:
            return str(name), str(said)
    raise UserError(f'{path}: expected {{"question_id": ..., "content": ...}}, got {row!r:.80}')


def _keep(line: Line, said: str, judge: str, folder: Path) -> None:
    kept = {name: line[name] for name in ("benchmark", "id", "prediction")}
    kept |= {"judgement": said, "judge": judge, "key": digest([kept, judge])}
    path = folder / JUDGEMENTS
    # Behind a line that a kill has cut off, a new one begins: both would be lost.
    with path.open("ab+") as file:
        file.seek(max(file.tell() - 1, 0))
        start = "" if file.read() in (b"", b"\n") else "\n"
        file.write(f"{start}{json.dumps(kept)}\n".encode())
