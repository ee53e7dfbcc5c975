"""`python -m milora_vl.chat`: ask a model about a picture, or talk with it in the terminal or (`--web`) in a browser.

Prompt as in training (`milora_data.templates`), answer greedy: what is said here is what an evaluation gets.
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

from milora_data.command import count, next_step, parser, positive, report, suggest
from milora_data.errors import UserError
from milora_data.flags import shared
from milora_data.images import load_image
from milora_data.records import Turn
from milora_data.templates import template_name
from milora_vl.adapters.folders import holds_adapter, holds_projector_alone
from milora_vl.recipe.yaml_file import trained_prompts

if TYPE_CHECKING:
    from PIL import Image
    from transformers import TextStreamer

    from milora_data.pixels import AspectRatio

COMMANDS = {
    "/image FILE": "talk about another picture (starts a new conversation)",
    "/reset": "start again with the same picture",
    "/quit": "leave",
}
_EXAMPLES = """\
examples:
  python -m milora_vl.chat --model smol-llava --adapter runs/demo --image cat.png "What is this?"
  python -m milora_vl.chat --model smol-llava --adapter runs/demo --image cat.png --compare "What is this?"
  python -m milora_vl.chat --model smol-llava --adapter runs/demo        # a conversation; /quit to leave
  python -m milora_vl.chat --model smol-llava --adapter runs/demo --web --compare
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the question on stdout, or hold a conversation when there is none. Returns the exit code."""
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
    """A conversation with one model. Answers are written to stdout as they come."""

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
        """Load what the command line names. UserError where that cannot be had or cannot be compared."""
        from milora_vl.forgetting.measure import hides_its_base
        from milora_vl.load import load_model
        from milora_vl.models.devices import device_named, dtype_named

        device = device_named(options.device)
        dtype = dtype_named(options.dtype, device)
        template, image_aspect_ratio = trained_prompts(Path(options.adapter or options.model))
        model, processor = load_model(options.model, adapter=options.adapter, dtype=dtype, device=device)
        if options.compare and not hides_its_base(model):
            raise UserError(
                f"--compare: {options.adapter} cannot be switched off: it trained biases, or a projector alone\n"
                "ask the base without --adapter"
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
        """Forget what was said; the next question is about `picture`."""
        self.picture = picture
        self.turns: list[Turn] = []

    def ask(self, question: str) -> str:
        """Put a question and write the answer, with `compare` the base's first; only the tuned one is remembered."""
        self.turns.append(self.user_turn(question, self.picture, self.turns))
        if self.compare:
            self._say("base   ", base=True)
        answer = self._say("tuned  " if self.compare else "", base=False)
        self.turns.append(Turn("assistant", answer))
        return answer

    def answers(self, question: str, picture: Image.Image | None) -> dict[str, str]:
        """The question with the answer to it, and with `compare` the base model's."""
        turns = [self.user_turn(question, picture, [])]
        base = {"base": self.reply(turns, picture, None, base=True)} if self.compare else {}
        return {"question": question, **base, "answer": self.reply(turns, picture, None, base=False)}

    @staticmethod
    def user_turn(question: str, picture: Image.Image | None, turns: Sequence[Turn]) -> Turn:
        """The question as a turn; the picture stands in the first one."""
        return Turn("user", f"<image>\n{question}" if picture is not None and not turns else question)

    def reply(self, turns: Sequence[Turn], picture: Image.Image | None, streamer: Any, *, base: bool) -> str:
        """The answer to the last turn, of the base model if `base`; `streamer` gets its tokens as they come."""
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

    def _say(self, label: str, *, base: bool) -> str:
        from milora_vl.models.loading import split_processor

        sys.stdout.write(label)
        return self.reply(self.turns, self.picture, _words(split_processor(self.processor)[0]), base=base)


def converse(chat: Chat, picture: Image.Image | None = None) -> int:
    """Read questions and /commands until /quit or the end of the input. A mistake does not end it."""
    chat.start(picture)
    width = max(map(len, COMMANDS))
    sys.stderr.write("".join(f"{name:<{width}}  {what}\n" for name, what in COMMANDS.items()))
    for line in _lines():
        word, _, rest = line.partition(" ")
        try:
            if word == "/quit":
                break
            if word == "/reset":
                chat.start(chat.picture)
            elif word == "/image":
                chat.start(_open(Path(rest.strip())))
            elif line.startswith("/"):
                raise UserError(_unknown(word))
            else:
                _ask_unless_stopped(chat, line)
        except UserError as error:
            report(error)
    return 0


def _ask_unless_stopped(chat: Chat, question: str) -> None:
    """Ask; Ctrl-C stops the answer, not the conversation, and the question is forgotten."""
    before = list(chat.turns)
    try:
        chat.ask(question)
    except (KeyboardInterrupt, UserError) as error:
        chat.turns = before
        if isinstance(error, UserError):
            raise
        sys.stderr.write("\n(stopped)\n")


def _lines() -> Iterator[str]:
    """Lines of stdin that hold something; on a terminal with a prompt, editing and history."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (input() uses it once it is imported)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _words(tokenizer: Any) -> TextStreamer:
    """Make what writes words to stdout as they come."""
    from transformers import TextStreamer

    class Stripped(TextStreamer):
        """Without the blanks around an answer: a blank waits until a word follows it."""

        waiting, is_first = "", True

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Write what is certain by now."""
            text = (self.waiting + text).lstrip() if self.is_first else self.waiting + text
            words = text.rstrip()
            self.waiting, self.is_first = text[len(words) :], self.is_first and not words
            sys.stdout.write(words + "\n" if stream_end else words)
            sys.stdout.flush()

    return Stripped(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser("python -m milora_vl.chat", "Ask a model about a picture, or talk with it.", _EXAMPLES)
    given = options.add_argument_group("input")
    given.add_argument("question", nargs="?", help="asked once; without it a conversation starts")
    shared(given, "model", required=True)
    shared(given, "adapter")
    given.add_argument("--image", type=Path, help="the picture that the question is about")
    settings = options.add_argument_group("settings")
    settings.add_argument("--compare", action="store_true", help="show the base model's answer beside the tuned one's")
    settings.add_argument("--max_new_tokens", type=positive, default=256, help="of an answer (default: %(default)s)")
    shared(settings, "template")
    shared(settings, "device")
    shared(settings, "dtype")
    out = options.add_argument_group("output")
    out.add_argument("--web", action="store_true", help="talk in a browser: pip install 'milora-vl[web]'")
    out.add_argument("--port", type=count, default=7860, help="of --web; 0 is any free one (default: %(default)s)")
    shared(out, "format", about="of the answer to a question (default: %(default)s)")
    return options.parse_args(argv)


def _check(options: argparse.Namespace) -> None:
    """Find out before the model loads what would go wrong after."""

    if options.template:
        template_name(options.template)
    if options.web and options.question is not None:
        raise UserError("--web takes no question: type it on the page\nwithout --web the question is answered here")
    if options.web and find_spec("gradio") is None:
        raise UserError("--web needs gradio, which is not installed\npip install 'milora-vl[web]'")
    if options.format == "json" and options.question is None:
        raise UserError("--format json is for the answer to a question\nadd the question, or leave the flag out")
    adapter = options.adapter
    if adapter and not (holds_adapter(adapter) or holds_projector_alone(adapter)):
        raise UserError(
            f"--adapter {adapter}: {'no such folder' if not adapter.is_dir() else 'holds no adapter'}\n"
            "expected: a folder with adapter_config.json, such as the output_dir of a training\n"
            "make one: python -m milora_vl.train --recipe smol-llava-demo --output_dir runs/demo"
        )
    if options.compare and not holds_adapter(adapter or Path(options.model)):
        raise UserError(
            "--compare needs an adapter: it shows the same model with and without one\nadd:  --adapter FOLDER"
        )


def _open(path: Path) -> Image.Image:

    if path.is_file():
        return load_image(path)
    if path.is_dir():
        raise UserError(f"{path}: this is a folder; expected a picture")
    near = suggest(path.name, (file.name for file in path.parent.iterdir())) if path.parent.is_dir() else []
    hint = f"\ndid you mean {' or '.join(str(path.parent / name) for name in near)} ?" if near else ""
    raise UserError(f"{path}: no such picture{hint}")


def _unknown(word: str) -> str:
    known = [name.split()[0] for name in COMMANDS]
    near = suggest(word, known)
    return f"unknown command {word}; " + (f"did you mean {near[0]} ?" if near else f"there are {', '.join(known)}")
