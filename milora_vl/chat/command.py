"""`python -m milora_vl.chat`: ask a model about a picture, or chat in the terminal or (`--web`) a browser.

Prompt format (`milora_data.templates`) and greedy decoding are as in an evaluation, so the answers are the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora_data.command.cli import count, next_step, parser, positive, report, suggest
from milora_data.command.flags import shared
from milora_data.command.web import web_address
from milora_data.errors import UserError
from milora_data.images.files import load_image
from milora_data.records import Turn
from milora_data.templates import template_name
from milora_vl.adapter_folders import holds_adapter, holds_projector_alone, newest_of_unfinished
from milora_vl.recipe.yaml_file import trained_prompts

if TYPE_CHECKING:
    from PIL import Image
    from transformers import TextStreamer

    from milora_data.images.pixels import AspectRatio

COMMANDS = {
    "/image FILE": "ask about another picture (starts a new conversation)",
    "/reset": "start again with the same picture",
    "/quit": "quit",
}
_EXAMPLES = """\
examples:
  python -m milora_vl.chat --model smol-llava --adapter runs/demo --image cat.png "What is this?"
  python -m milora_vl.chat --model smol-llava --adapter runs/demo --image cat.png --compare "What is this?"
  python -m milora_vl.chat --model smol-llava --adapter runs/demo        # a conversation; /quit to quit
  python -m milora_vl.chat --model smol-llava --adapter runs/demo --web --compare
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the question on stdout, or start a conversation without one. Return the exit code."""
    options = _options(argv)
    _check(options)
    picture = _open(options.image) if options.image else None
    chat = Chat.load(options)
    if options.web:
        from milora_vl.chat.web import serve

        serve(chat, picture, " + ".join(str(part) for part in (options.model, options.adapter) if part), options.port)
        return 0
    if options.question is None:
        return converse(chat, picture)
    if options.format == "json":
        sys.stdout.write(json.dumps(chat.answers(options.question, picture), ensure_ascii=False) + "\n")
    else:
        chat.start(picture)
        chat.ask(options.question)
    tuned = ("--adapter", options.adapter) if options.adapter else ()
    words = ("--suite", "quick", "--data", "FOLDER", "--output_dir", options.adapter or "FOLDER")
    next_step("milora_eval", "run", "--model", options.model, *tuned, *words)
    return 0


class Chat:
    """A conversation with one model. Answers are streamed to stdout."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        template: str,
        max_new_tokens: int,
        compare: bool,
        image_aspect_ratio: AspectRatio = "pad",
    ) -> None:
        self.model = model
        self.processor = processor
        self.template = template
        self.image_aspect_ratio = image_aspect_ratio
        self.max_new_tokens = max_new_tokens
        self.compare = compare
        self.start(None)

    @classmethod
    def load(cls, options: argparse.Namespace) -> Chat:
        """Load the model and adapter of the command line.

        Raises UserError if `--compare` is set and the adapter cannot be switched off.
        """
        from milora_vl.forgetting.measure import can_recover_base
        from milora_vl.load import load_model
        from milora_vl.models.devices import device_named, dtype_named

        device = device_named(options.device)
        dtype = dtype_named(options.dtype, device)
        template, image_aspect_ratio = trained_prompts(Path(options.adapter or options.model))
        model, processor = load_model(options.model, adapter=options.adapter, dtype=dtype, device=device)
        if options.compare and not can_recover_base(model):
            raise UserError(
                f"{options.adapter} cannot be switched off: it trained biases, or only a projector",
                code="compare-no-base",
                where="--compare",
                hint="ask the base model without --adapter",
            )
        return cls(
            model,
            processor,
            template=options.template or template,
            image_aspect_ratio=image_aspect_ratio,
            max_new_tokens=options.max_new_tokens,
            compare=options.compare,
        )

    def start(self, picture: Image.Image | None) -> None:
        """Clear the conversation; the next question is about `picture`."""
        self.picture = picture
        self.turns: list[Turn] = []

    def ask(self, question: str) -> str:
        """Ask a question, write the answer and return it. With `compare`, write the base model's answer first.

        Only the answer of the tuned model stays in the conversation.
        """
        self.turns.append(self.user_turn(question, self.picture, self.turns))
        if self.compare:
            self._write_reply("base   ", base=True)
        answer = self._write_reply("tuned  " if self.compare else "", base=False)
        self.turns.append(Turn("assistant", answer))
        return answer

    def answers(self, question: str, picture: Image.Image | None) -> dict[str, str]:
        """Return the question and its answer, and with `compare` the base model's answer."""
        turns = [self.user_turn(question, picture, [])]
        base = {"base": self.reply(turns, picture, None, base=True)} if self.compare else {}
        return {"question": question, **base, "answer": self.reply(turns, picture, None, base=False)}

    @staticmethod
    def user_turn(question: str, picture: Image.Image | None, turns: Sequence[Turn]) -> Turn:
        """Return the question as a turn. The first turn contains the picture."""
        return Turn("user", f"<image>\n{question}" if picture is not None and not turns else question)

    def reply(self, turns: Sequence[Turn], picture: Image.Image | None, streamer: Any, *, base: bool) -> str:
        """Return the answer to the last turn, from the base model if `base`. `streamer` gets each new token."""
        from milora_vl.generate import Prompt, generate

        prompt = Prompt(tuple(turns), () if picture is None else (picture,))
        with self.model.disable_adapter() if base else nullcontext():
            (answer,) = generate(
                self.model,
                self.processor,
                [prompt],
                template=self.template,
                max_new_tokens=self.max_new_tokens,
                image_aspect_ratio=self.image_aspect_ratio,
                streamer=streamer,
            )
        return answer

    def _write_reply(self, label: str, *, base: bool) -> str:
        from milora_vl.models.loading import split_processor

        sys.stdout.write(label)
        return self.reply(self.turns, self.picture, _word_streamer(split_processor(self.processor)[0]), base=base)


def converse(chat: Chat, picture: Image.Image | None = None) -> int:
    """Read questions and /commands until /quit or the end of the input. Errors are printed and do not end it."""
    chat.start(picture)
    width = max(map(len, COMMANDS))
    sys.stderr.write("".join(f"{name:<{width}}  {meaning}\n" for name, meaning in COMMANDS.items()))
    for line in _lines():
        word, _, argument = line.partition(" ")
        try:
            if word == "/quit":
                break
            if word == "/reset":
                chat.start(chat.picture)
            elif word == "/image":
                chat.start(_open(Path(argument.strip())))
            elif line.startswith("/"):
                raise _unknown_command(word)
            else:
                _ask_unless_stopped(chat, line)
        except UserError as error:
            report(error)
    return 0


def _ask_unless_stopped(chat: Chat, question: str) -> None:
    """Ask a question. Ctrl-C stops the answer and removes the question; the conversation continues."""
    before = list(chat.turns)
    try:
        chat.ask(question)
    except (KeyboardInterrupt, UserError) as error:
        chat.turns = before
        if isinstance(error, UserError):
            raise
        sys.stderr.write("\n(stopped)\n")


def _lines() -> Iterator[str]:
    """Yield the non-empty lines of stdin; a terminal gets a prompt, editing and history."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (input() uses it after the import)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _word_streamer(tokenizer: Any) -> TextStreamer:
    """Return a streamer that writes words to stdout."""
    from transformers import TextStreamer

    class Stripped(TextStreamer):
        """Strip the answer: a space is written only when a word follows it."""

        waiting, is_first = "", True

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Write the text without trailing spaces."""
            text = (self.waiting + text).lstrip() if self.is_first else self.waiting + text
            words = text.rstrip()
            self.waiting, self.is_first = text[len(words) :], self.is_first and not words
            sys.stdout.write(words + "\n" if stream_end else words)
            sys.stdout.flush()

    return Stripped(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser("python -m milora_vl.chat", "Ask a model about a picture, or chat with it.", _EXAMPLES)
    inputs = options.add_argument_group("input")
    inputs.add_argument("question", nargs="?", help="question to answer; without one, a conversation starts")
    shared(inputs, "model", required=True)
    shared(inputs, "adapter")
    inputs.add_argument("--image", type=Path, help="picture that the question is about")
    settings = options.add_argument_group("settings")
    settings.add_argument("--compare", action="store_true", help="show the base model's answer too")
    settings.add_argument(
        "--max_new_tokens",
        type=positive,
        default=256,
        help="maximum length of an answer in tokens (default: %(default)s)",
    )
    shared(settings, "template")
    shared(settings, "device")
    shared(settings, "dtype")
    out = options.add_argument_group("output")
    out.add_argument(
        "--web", action="store_true", help="open a chat page in a browser; needs pip install 'milora-vl[web]'"
    )
    out.add_argument(
        "--port", type=count, default=7860, help="port of --web; 0 for any free port (default: %(default)s)"
    )
    shared(out, "format", about="output format of the answer (default: %(default)s)")
    return options.parse_args(argv)


def _check(options: argparse.Namespace) -> None:
    """Check the options before the model loads. Raises UserError for options that do not fit together."""
    if options.template:
        template_name(options.template)
    if options.web and options.question is not None:
        raise UserError(
            "takes no question on the command line",
            code="flag-conflict",
            where="--web",
            hint="type the question on the page, or remove --web to get the answer here",
        )
    if options.web and find_spec("gradio") is None:
        hint = "pip install 'milora-vl[web]'"
        raise UserError("needs gradio, which is not installed", code="package-missing", where="--web", hint=hint)
    if options.format == "json" and options.question is None:
        hint = "add a question, or remove the flag"
        raise UserError("json needs a question to answer", code="flag-needs-another", where="--format", hint=hint)
    adapter = options.adapter
    if adapter and not (holds_adapter(adapter) or holds_projector_alone(adapter)):
        newest = newest_of_unfinished(adapter, "milora_vl.chat", "--model", options.model, "--adapter")
        raise UserError(
            f"{adapter}: {'no such folder' if not adapter.is_dir() else 'contains no adapter'}",
            code="adapter-missing",
            where="--adapter",
            hint=newest.removeprefix("\n")
            or "expected a folder with adapter_config.json, for example the output_dir of a run\n"
            "make one: python -m milora_vl.train --recipe smol-llava-demo --output_dir runs/demo",
        )
    if options.compare and not holds_adapter(adapter or Path(options.model)):
        raise UserError(
            "needs an adapter: it shows the answers with and without it",
            code="flag-needs-another",
            where="--compare",
            hint=newest_of_unfinished(Path(options.model), "--model").removeprefix("\n") or "add:  --adapter FOLDER",
        )


def _open(path: Path) -> Image.Image:
    if path.is_file() or web_address(path):
        return load_image(path)
    if path.is_dir():
        raise UserError("this is a folder; expected a picture", code="image-missing", where=str(path))
    near = suggest(path.name, (file.name for file in path.parent.iterdir())) if path.parent.is_dir() else []
    hint = f"did you mean {' or '.join(str(path.parent / name) for name in near)} ?" if near else ""
    raise UserError("no such picture", code="image-missing", where=str(path), hint=hint)


def _unknown_command(word: str) -> UserError:
    known = [name.split()[0] for name in COMMANDS]
    near = suggest(word, known)
    hint = f"did you mean {near[0]} ?" if near else f"known commands: {', '.join(known)}"
    return UserError(f"unknown command {word}", code="chat-unknown-command", hint=hint)
