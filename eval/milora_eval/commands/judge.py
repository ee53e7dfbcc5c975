"""`python -m milora_eval judge FOLDER`: grade free-form answers (MM-Vet, LLaVA-Bench) with a judge model, then score.

The judgements come from a file or an OpenAI-compatible server (timeout, no retry). They are stored one per line in
judgements.jsonl, in the folder of the answers. No answer is judged twice.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import read_json
from milora_eval.answers.identity import digest
from milora_eval.answers.store import JUDGEMENTS, PREDICTIONS, Line, each_line, to_item
from milora_eval.data_files import read_jsonl
from milora_eval.scores.results import judgements, require_answers, review_of, score
from milora_eval.scores.table import write_table
from milora_eval.suites import import_plugins, stored_benchmark
from milora_vl.base.errors import UserError
from milora_vl.cli.command_line import next_step
from milora_vl.cli.flags import Command, option, shared
from milora_vl.cli.table import FORMATS, show

Ask = Callable[[str, str, str], str]  # (model, system message or "", prompt) -> text of the judge

COMMAND = Command(
    "milora_eval judge",
    "Grade free-form answers with a judge model, then compute the scores.",
    """\
examples:
  python -m milora_eval judge runs/one/eval/mm-vet/final --endpoint https://api.openai.com/v1
  python -m milora_eval judge runs/one/eval/mm-vet/final --file judgements.jsonl
""",
    inputs=(
        option("folder", type=Path, metavar="FOLDER", help="results folder with MM-Vet or LLaVA-Bench"),
        (
            option("--endpoint", metavar="URL", help="OpenAI-compatible server, up to and including /v1"),
            option("--file", type=Path, help="file with existing judgements (JSONL or JSON)"),
        ),
    ),
    settings=(
        shared("plugin"),
        option("--judge_model", metavar="NAME", help="judge model (default: set by the benchmark)"),
        option(
            "--key_variable",
            default="OPENAI_API_KEY",
            metavar="NAME",
            help="environment variable with the API key (default: %(default)s)",
        ),
    ),
    outputs=(shared("format", choices=FORMATS),),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Each judgement is stored at once, so an interrupted run can resume."""
    options = COMMAND.parse(argv)
    import_plugins(options.plugin)
    from tqdm import tqdm

    require_answers(options.folder)
    if options.file is not None:
        sys.stderr.write(f"{judge_from_file(options.file, options.folder)} judgements read from {options.file}\n")
    else:
        waiting = list(unjudged(options.folder))
        server = Endpoint(options.endpoint, os.environ.get(options.key_variable, ""))
        for line in tqdm(waiting, desc="judge", unit="answer", file=sys.stderr, disable=None):
            judge_by(server.ask, line, options.judge_model, options.folder)
    missing = sum(1 for _ in unjudged(options.folder))
    results = score(options.folder)
    table = write_table(options.folder)
    if options.format == "json":
        sys.stdout.write(json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    else:
        show(table, options.format)
    if missing:
        raise UserError(
            f"{missing} answers have no judgement yet; the scores are computed from the other answers",
            code="judge-incomplete",
            exit_code=1,
            hint="run the same command again to judge the others",
        )
    next_step("milora_eval", "view", options.folder)
    return 0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A chat-completions server: `url` up to and including /v1; `key` goes into the Authorization header."""

    url: str
    key: str = ""
    timeout: float = 120.0

    def ask(self, model: str, system: str, prompt: str) -> str:
        """Return the answer at temperature 0. Raises UserError (exit code 1) if the server does not answer."""
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
            raise UserError(
                f"the judge at {address} did not answer: {error}",
                code="judge-no-answer",
                hint="the judgements so far are saved; run the same command again to continue",
                exit_code=1,
            ) from None
        return str(answer)


def unjudged(folder: Path) -> Iterator[Line]:
    """Yield the answers that need a judge and have no judgement yet."""
    reviews = judgements(folder)
    for line in each_line(folder / PREDICTIONS):
        if stored_benchmark(line["benchmark"]).judge and review_of(line, reviews) is None:
            yield line


def judge_by(ask: Ask, line: Line, model: str | None, folder: Path) -> None:
    """Ask the judge about one answer and store the judgement."""
    benchmark = stored_benchmark(line["benchmark"])
    prompt = benchmark.judge_prompt(to_item(line), line["prediction"])
    judgement = ask(model or benchmark.judge, benchmark.judge_system, prompt)
    _store(line, judgement, model or benchmark.judge, folder)


def judge_from_file(path: Path, folder: Path) -> int:
    """Read judgements from a file and store them; return how many were new.

    The file is JSONL with {question_id or id, judgement | content | text}, like LLaVA's review files, or one JSON
    object that maps ids to texts. Raises UserError for an id that belongs to no question.
    """
    content: Any = read_json(path) if path.suffix == ".json" else list(read_jsonl(path))
    if not isinstance(content, dict | list):
        raise UserError(
            f"expected a list of judgements or a mapping of ids to texts, got {type(content).__name__}",
            code="judge-file-format",
            where=str(path),
        )
    rows = content.items() if isinstance(content, dict) else [_review(row, path) for row in content]
    waiting = {line["id"]: line for line in unjudged(folder)}
    known = {line["id"] for line in each_line(folder / PREDICTIONS) if stored_benchmark(line["benchmark"]).judge}
    count = 0
    for name, judgement in rows:
        if str(name) not in known:
            raise UserError(
                f'a judgement for the id "{name}", but {folder} has no such question',
                code="judge-unknown-id",
                where=str(path),
                hint="use the judgements of these answers, or remove the line",
            )
        line = waiting.get(str(name))
        if line is not None:
            _store(line, str(judgement), str(path), folder)
            count += 1
    return count


def _review(row: Any, path: Path) -> tuple[str, str]:
    if isinstance(row, dict):
        name = row.get("id") if row.get("question_id") is None else row["question_id"]
        judgement = next((row[key] for key in ("judgement", "content", "text") if key in row), None)
        if name is not None and judgement is not None:
            return str(name), str(judgement)
    raise UserError(
        f'expected {{"question_id": ..., "content": ...}}, got {row!r:.80}', code="judge-file-format", where=str(path)
    )


def _store(line: Line, judgement: str, judge: str, folder: Path) -> None:
    entry = {name: line[name] for name in ("benchmark", "id", "prediction")}
    entry |= {"judgement": judgement, "judge": judge, "key": digest([entry, judge])}
    with (folder / JUDGEMENTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
