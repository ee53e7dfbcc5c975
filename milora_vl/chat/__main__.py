"""`python -m milora_vl.chat`: ask a model about a picture, or chat in the terminal.

Prompt format (`milora_data.encode.templates`) and greedy decoding are as in an evaluation, so the answers are the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from milora_data.encode.templates import template_name
from milora_vl.common.cli.console import run
from milora_vl.common.cli.parser import OR_ADAPTER, Command, above_zero, flag, option, positive, shared
from milora_vl.common.errors import UserError, at_flag
from milora_vl.core.adapter.folders import (
    holds_adapter,
    model_of,
    newest_of_unfinished,
    require_adapter,
    require_no_base,
)

COMMAND = Command(
    "milora_vl.chat",
    "Ask a model about a picture, or chat with it.",
    """\
examples:
  python -m milora_vl.chat --model smol-llava --adapter runs/demo --image cat.png "What is this?"
  python -m milora_vl.chat --model smol-llava --adapter runs/demo --image cat.png --compare "What is this?"
  python -m milora_vl.chat --model qwen2.5-vl-3b --video clip.mp4 --fps 2 "What happens?"
  python -m milora_vl.chat --model smol-llava --adapter runs/demo        # a conversation; /quit to quit
""",
    inputs=(
        option("question", nargs="?", help="question to answer; without one, a conversation starts"),
        shared("model", about=OR_ADAPTER),
        shared("adapter"),
        option("--image", type=Path, action="append", help="picture of the question; repeat it for several"),
        option(
            "--video",
            type=Path,
            action="append",
            help="video file, or folder with the frames of a video; repeat it for several",
        ),
        option("--fps", type=above_zero, help="frames per second of --video (default: as in the training, or 2)"),
        option("--num_frames", type=positive, help="frames to read of each file of --video, in place of --fps"),
    ),
    settings=(
        shared("base"),
        shared("scale"),
        flag("--compare", "show the base model's answer too"),
        option(
            "--max_new_tokens",
            type=positive,
            default=256,
            help="maximum length of an answer in tokens (default: %(default)s)",
        ),
        shared("template"),
        shared("device"),
        shared("dtype"),
    ),
    outputs=(shared("format", about="output format of the answer (default: %(default)s)"),),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the question on stdout, or start a conversation without one. Return the exit code."""
    options = COMMAND.parse(argv)
    options.model = model_of(options.model, options.adapter, "milora_vl.chat", "--adapter")
    _check(options)
    from milora_vl.chat import session

    pictures = [session.open_picture(path) for path in options.image or ()]
    videos = [session.open_video(path, options.fps, options.num_frames) for path in options.video or ()]
    session.require_askable(options, pictures, videos)
    chat = session.Chat.load(options)
    if options.question is None:
        session.converse(chat, pictures, videos, (options.fps, options.num_frames))
        return 0
    if options.format == "json":
        sys.stdout.write(json.dumps(chat.answers(options.question, pictures, videos), ensure_ascii=False) + "\n")
    else:
        chat.start(pictures, videos)
        chat.ask(options.question)
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.template:
        with at_flag("--template"):
            template_name(options.template)
    adapter = options.adapter
    question, has_update = options.question is not None, options.base or holds_adapter(adapter or Path(options.model))
    for is_wrong, code, where, message, hint in (
        (options.fps and not options.video, "flag-needs-another", "--fps", "needs --video", "add --video FILE"),
        (options.num_frames and not options.video, "flag-needs-another", "--num_frames", "needs --video", "add it"),
        (options.fps and options.num_frames, "flag-conflict", "--num_frames", "not beside --fps", "remove one of them"),
        (
            options.format == "json" and not question,
            *("flag-needs-another", "--format", "json needs a question to answer", "add a question"),
        ),
    ):
        if is_wrong:
            raise UserError(message, code=code, where=where, hint=hint)
    require_no_base(options.model, adapter, options.base)
    if adapter:
        require_adapter(adapter, "--adapter", "milora_vl.chat", "--model", options.model, "--adapter")
    if options.compare and not has_update:
        message = "needs an adapter, or a fully trained model and its base: it shows the answers of both"
        hint = newest_of_unfinished(Path(options.model), "--model") or "add:  --adapter FOLDER   or   --base MODEL"
        raise UserError(message, code="flag-needs-another", where="--compare", hint=hint)


if __name__ == "__main__":
    run(main)
