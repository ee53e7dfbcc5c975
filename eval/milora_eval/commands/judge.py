"""`python -m milora_eval judge FOLDER`: have free answers graded by a model, then score again."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from milora_data.command import next_step, parser
from milora_data.errors import UserError
from milora_data.flags import shared
from milora_eval.evaluate import write_table
from milora_eval.judge import Endpoint, judge_by, judge_from_file, unjudged
from milora_eval.scores.results import require_answers, score
from milora_eval.scores.table import FORMATS, show

EXAMPLES = """\
examples:
  python -m milora_eval judge runs/one/eval/mm-vet/final --endpoint https://api.openai.com/v1
  python -m milora_eval judge runs/one/eval/mm-vet/final --file judgements.jsonl
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; judgements are kept one by one, so that an interrupted one goes on where it was."""
    parse = parser("python -m milora_eval judge", "Have free answers graded by a model, then score again.", EXAMPLES)
    given = parse.add_argument_group("input")
    given.add_argument("folder", type=Path, metavar="FOLDER", help="a results folder with MM-Vet or LLaVA-Bench")
    what = given.add_mutually_exclusive_group(required=True)
    what.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server, up to and including /v1")
    what.add_argument("--file", type=Path, help="judgements that are there already (JSONL, or JSON)")
    settings = parse.add_argument_group("settings")
    settings.add_argument("--judge_model", metavar="NAME", help="(default: the one that the benchmark names)")
    settings.add_argument(
        "--key_variable", default="OPENAI_API_KEY", metavar="NAME", help="environment variable (default: %(default)s)"
    )
    shared(parse.add_argument_group("output"), "format", choices=FORMATS)
    options = parse.parse_args(argv)
    from tqdm import tqdm

    require_answers(options.folder)
    if options.file is not None:
        sys.stderr.write(f"{judge_from_file(options.file, options.folder)} judgements taken from {options.file}\n")
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
        raise UserError(f"{missing} answers have no judgement yet; the numbers are over the others", exit_code=1)
    next_step("milora_eval", "view", options.folder)
    return 0
