"""`python -m milora_eval judge FOLDER`: grade free-form answers (MM-Vet, LLaVA-Bench) with a judge model, then score.

The judgements come from a file or an OpenAI-compatible server. They are stored one per line in judgements.jsonl, in the
folder of the answers. No answer is judged twice.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import read_json
from milora_eval.answers.identity import digest
from milora_eval.answers.store import JUDGEMENTS, PREDICTIONS, Line, each_line, to_item
from milora_eval.chat_server import ChatServer, api_key
from milora_eval.commands.flags import KEY, PLUGIN
from milora_eval.data_files import read_jsonl
from milora_eval.scores.results import judgements, require_answers, review_of, score
from milora_eval.scores.table import write_table
from milora_eval.suites import import_plugins, stored_benchmark
from milora_vl.common.cli.command_line import next_step
from milora_vl.common.cli.flags import Command, option, shared
from milora_vl.common.cli.table import FORMATS, show
from milora_vl.common.errors import UserError

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
        PLUGIN,
        option("--judge_model", metavar="NAME", help="judge model (default: set by the benchmark)"),
        KEY,
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
        server = ChatServer(options.endpoint, api_key(options.key_variable), flag="--endpoint")
        for line in tqdm(waiting, desc="judge", unit="answer", file=sys.stderr, disable=None):
            judge_by(server, line, options.judge_model, options.folder)
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


def unjudged(folder: Path) -> Iterator[Line]:
    """Yield the answers that need a judge and have no judgement yet."""
    reviews = judgements(folder)
    for line in each_line(folder / PREDICTIONS):
        if stored_benchmark(line["benchmark"]).judge and review_of(line, reviews) is None:
            yield line


def judge_by(server: ChatServer, line: Line, model: str | None, folder: Path) -> None:
    """Ask the judge about one answer and store the judgement."""
    benchmark = stored_benchmark(line["benchmark"])
    prompt = benchmark.judge_prompt(to_item(line), line["prediction"])
    system = [{"role": "system", "content": benchmark.judge_system}] if benchmark.judge_system else []
    judgement = server.chat(model or benchmark.judge, [*system, {"role": "user", "content": prompt}])
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
