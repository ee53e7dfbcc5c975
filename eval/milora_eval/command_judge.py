"""`python -m milora_eval judge FOLDER`: have free answers graded by a model, then score again."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from milora_data.errors import UserError
from milora_eval.evaluate import write_table
from milora_eval.judge import Endpoint, judge_by, judge_from_file, unjudged
from milora_eval.results import require_answers, score
from milora_eval.table import FORMATS, show


def add_arguments(options: argparse.ArgumentParser) -> None:
    """Declare the arguments of `judge`."""
    options.add_argument("folder", type=Path, metavar="FOLDER", help="a results folder with MM-Vet or LLaVA-Bench")
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server, up to and including /v1")
    what.add_argument("--file", type=Path, metavar="FILE", help="judgements that are there already (JSONL, or JSON)")
    options.add_argument("--judge_model", metavar="NAME", help="(default: the one that the benchmark names)")
    options.add_argument(
        "--key_variable", default="OPENAI_API_KEY", metavar="NAME", help="environment variable (default: %(default)s)"
    )
    options.add_argument("--format", choices=FORMATS[:-1], default="human", help="of what is printed")


def main(options: argparse.Namespace) -> int:
    """Run the command; judgements are kept one by one, so that an interrupted one goes on where it was."""
    from tqdm import tqdm

    require_answers(options.folder)
    if options.file is not None:
        sys.stderr.write(f"{judge_from_file(options.file, options.folder)} judgements taken from {options.file}\n")
    else:
        waiting = list(unjudged(options.folder))
        server = Endpoint(options.endpoint, os.environ.get(options.key_variable, ""))
        for line in tqdm(waiting, desc="judge", unit="answer", file=sys.stderr):
            judge_by(server.ask, line, options.judge_model, options.folder)
    missing = sum(1 for _ in unjudged(options.folder))
    score(options.folder)
    show(write_table(options.folder), options.format)
    if missing:
        raise UserError(f"{missing} answers have no judgement yet; the numbers are over the others", exit_code=1)
    return 0
