"""`Chat`, a conversation with a model about pictures, in the terminal with `/` commands."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import TextStreamer

from milora_data.batches.processor_inputs import ProcessorInputs
from milora_data.pictures.load import Picture, load_image
from milora_data.pictures.pixels import AspectRatio
from milora_data.pictures.videos import Frames, require_one_size, require_pyav
from milora_data.records.record import IMAGE, VIDEO, Turn, Video
from milora_vl.common.cli.console import report
from milora_vl.common.cli.web import web_address
from milora_vl.common.errors import UserError, at_flag, beside
from milora_vl.core.adapter.folders import base_of, holds_adapter
from milora_vl.forgetting.measure import can_recover_base
from milora_vl.interop.load_model import load_by_flags, update_since
from milora_vl.interop.scale import Update
from milora_vl.models.base import find_base, split_processor
from milora_vl.models.generate import Prompt, Reply, generate, require_prompts, require_shown
from milora_vl.models.llava import uses_processor
from milora_vl.models.prompts import prompts_of

FRAMES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")
COMMANDS = {
    "/image FILE": "ask about another picture alone (starts a new conversation)",
    "/video FILE": "ask about a video alone, or the frames in a folder (starts a new conversation)",
    "/add FILE": "show one more picture with the next question",
    "/help": "show these commands",
    "/reset": "start again with the same pictures and videos",
    "/quit": "quit",
}


def open_picture(path: Path) -> Image.Image:
    """Return the picture in `path`. Raises UserError with similar names if the file is missing."""
    if not path.is_file() and web_address(path) is None:  # load_image refuses an address
        hint = "for the frames of a video:  --video FOLDER" if path.is_dir() else beside(path)
        raise UserError("no such picture", where=str(path), hint=hint)
    return load_image(path)


def open_video(path: Path, fps: float | None = None, num_frames: int | None = None) -> Frames | Video:
    """Return a video file, or the pictures of a folder, in the order of their names, as the frames of a video.

    Numbers in names count as numbers: 2.jpg is before 10.jpg. `fps` and `num_frames` choose the frames of a file, which
    the processor of the model reads; `fps` says how many frames of a folder are one second.
    """
    if path.is_file():
        require_pyav()
        return Video((), fps, Picture(str(path), path), num_frames)
    if not path.is_dir():
        raise UserError("no such file or folder", where=str(path), hint=beside(path))
    if num_frames is not None:
        message, hint = "is for a video file; all frames of a folder are shown", "remove the flag, or name a file"
        raise UserError(message, code="flag-conflict", where="--num_frames", hint=hint)
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in FRAMES)
    files.sort(key=lambda file: [(int(n or 0), text) for text, n in re.findall("([^0-9]*)([0-9]*)", file.name)])
    if not files:
        message = "this folder has no pictures; expected the frames of a video"
        hint = f"write them to the folder:  ffmpeg -i VIDEO -vf fps=2 {path}/%04d.jpg"
        raise UserError(message, where=str(path), hint=hint)
    return Frames(require_one_size([load_image(file) for file in files], str(path)), fps)


def require_askable(options: Namespace, pictures: Sequence[Image.Image], videos: Sequence[Frames | Video]) -> None:
    """Raise UserError, before weights load, for a question, pictures or videos that the model does not take."""
    with at_flag("--model"):
        is_adapter = options.adapter is None and holds_adapter(Path(options.model))
        base = find_base(base_of(Path(options.model)) if is_adapter else options.model)
    prompts = prompts_of(options.model, options.adapter, options.template)
    if base.own_pictures:
        prompts.limit(base.processor)
    if options.question is None and not pictures and not videos:
        return
    # Without a question here, the first question of the conversation will show them.
    asked = _about(options.question or "What?", pictures, videos, "--video" if videos else "--image")
    require_prompts(base, [asked])
    if base.own_pictures:
        require_shown(base.processor, asked)


def _about(question: str, pictures: Sequence[Image.Image], videos: Sequence[Frames | Video], source: str) -> Prompt:
    """Return the first question of a conversation, which errors name by `source`."""
    turn = Chat.user_turn(question, pictures, [], videos)
    return Prompt((turn,), tuple(pictures), videos=tuple(videos), source=source)


@dataclass
class Chat:
    """A conversation with one model; the next question is about `pictures` and `videos`.

    `update` is the update of a model without an adapter, and `scale` its size.
    """

    model: Any
    processor: Any
    template: str
    max_new_tokens: int
    compare: bool = False
    image_aspect_ratio: AspectRatio = "pad"
    update: Update | None = None
    scale: float = 1.0
    pictures: tuple[Image.Image, ...] = ()
    videos: tuple[Frames, ...] = ()
    turns: list[Turn] = field(default_factory=list)

    @classmethod
    def load(cls, options: Namespace) -> Chat:
        prompts = prompts_of(options.model, options.adapter, options.template)
        size, update = 1.0 if options.base else options.scale, None
        with at_flag("--model"):  # the update of a fully trained model gets its size below
            model, processor = load_by_flags(options.model, options.adapter, options.dtype, options.device, size)
        prompts.limit(processor)
        if options.base:
            with at_flag("--base"):
                update = update_since(options.base, model)
            update.set(options.scale)
        elif options.compare and not can_recover_base(model):
            message = f"{options.adapter} cannot be switched off: it trained biases, or only a projector"
            raise UserError(message, where="--compare", hint="ask the base model without --adapter")
        return cls(
            model,
            processor,
            prompts.template,
            options.max_new_tokens,
            options.compare,
            prompts.image_aspect_ratio,
            update,
            options.scale,
        )

    def start(self, pictures: Sequence[Image.Image], videos: Sequence[Frames | Video] = ()) -> None:
        """Clear the conversation; the next question is about `pictures` and `videos`. Files are read here, once."""
        inputs = ProcessorInputs(self.processor) if videos else None
        frames = () if inputs is None else tuple(inputs.frames(video) for video in videos)
        self.pictures, self.videos, self.turns = tuple(pictures), frames, []

    def require_shown(
        self, source: str, pictures: Sequence[Image.Image], videos: Sequence[Frames | Video] = ()
    ) -> None:
        if uses_processor(self.model.config):
            require_shown(self.processor, _about("What?", pictures, videos, source))

    def ask(self, question: str) -> None:
        self.turns.append(self.user_turn(question, self.pictures, self.turns, self.videos))
        if self.compare:
            self._write_reply("base   ", base=True)
        answer = self._write_reply("tuned  " if self.compare else "", base=False)
        self.turns.append(self.answer_turn(answer))

    def answers(
        self, question: str, pictures: Sequence[Image.Image], videos: Sequence[Frames | Video] = ()
    ) -> dict[str, Any]:
        self.start(pictures, videos)
        turns = [self.user_turn(question, pictures, [], videos)]
        base = {"base": self.reply(turns, pictures, None, base=True)} if self.compare else {}
        replies = base | {"answer": self.reply(turns, pictures, None, base=False)}
        texts = {name: reply.text for name, reply in replies.items()}
        return {"question": question, **texts, "truncated": any(reply.truncated for reply in replies.values())}

    @staticmethod
    def user_turn(
        question: str, pictures: Sequence[Image.Image], turns: Sequence[Turn], videos: Sequence[Frames | Video] = ()
    ) -> Turn:
        """Return the question as a turn.

        Pictures and videos that no turn shows yet are shown where the question has `<image>` or `<video>`, and before
        it if it has too few. Raises UserError if the conversation has more marks than pictures or videos.
        """
        marks = _missing_marks(IMAGE, question, len(pictures), turns)
        if videos:  # otherwise <video> is a text
            marks += _missing_marks(VIDEO, question, len(videos), turns)
        return Turn("user", marks + question)

    @staticmethod
    def answer_turn(answer: str) -> Turn:
        return Turn("assistant", answer.replace(IMAGE, "[image]").replace(VIDEO, "[video]"))

    def reply(self, turns: Sequence[Turn], pictures: Sequence[Image.Image], streamer: Any, *, base: bool) -> Reply:
        """Return the answer to the last turn, from the base model if `base`. `streamer` gets each new token."""
        prompt = Prompt(tuple(turns), tuple(pictures), videos=self.videos)
        with self._base_model() if base else nullcontext():
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

    @contextmanager
    def _base_model(self) -> Iterator[None]:
        if self.update is None:
            with self.model.disable_adapter():
                yield
            return
        self.update.set(0)
        try:
            yield
        finally:
            self.update.set(self.scale)

    def _write_reply(self, label: str, *, base: bool) -> str:
        sys.stdout.write(label)
        streamer = WordStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        reply = self.reply(self.turns, self.pictures, streamer, base=base)
        if reply.truncated:
            sys.stderr.write(f"(truncated at {self.max_new_tokens} tokens: use a larger --max_new_tokens)\n")
        return reply.text

    @property
    def tokenizer(self) -> Any:
        return split_processor(self.processor)[0]


def _missing_marks(mark: str, question: str, num_shown: int, turns: Sequence[Turn]) -> str:
    """Return the marks to write before a question, so that the conversation has one per picture (or video)."""
    found = sum(turn.text.count(mark) for turn in turns) + question.count(mark)
    if found <= num_shown:
        return f"{mark}\n" * (num_shown - found)
    thing = "picture" if mark == IMAGE else "video"
    more = "--image FILE or /add FILE" if mark == IMAGE else "--video FILE"
    message = f"{found} {mark} in the conversation, but {num_shown} {thing}{'s' * (num_shown != 1)} shown"
    hint = f"write {mark} at most once for each {thing}; show one more {thing}:  {more}"
    raise UserError(message, where=f"question {question.strip()[:60]!r}", hint=hint)


def converse(
    chat: Chat,
    pictures: Sequence[Image.Image] = (),
    videos: Sequence[Frames | Video] = (),
    sampling: tuple[float | None, int | None] = (None, None),
) -> None:
    """Read questions and /commands until /quit or the end of the input. Errors are printed and do not end it.

    `sampling` is `fps` and `num_frames` of `open_video`, for the videos that are opened in the conversation.
    """
    chat.start(pictures, videos)
    _show_commands()
    for line in _lines():
        word, _, argument = line.partition(" ")
        path = Path(argument.strip())
        try:
            if word == "/quit":
                break
            if word == "/help":
                _show_commands()
            elif word == "/reset":
                chat.start(chat.pictures, chat.videos)
            elif word == "/image":
                _show_instead(chat, line, [open_picture(path)], ())
            elif word == "/video":
                _show_instead(chat, line, (), [open_video(path, *sampling)])
            elif word == "/add":
                pictures = (*chat.pictures, open_picture(path))
                chat.require_shown(line, pictures, chat.videos)
                chat.pictures = pictures
            elif line.startswith("/"):
                raise UserError(f"unknown command {word}", hint=f"known commands: {', '.join(COMMANDS)}")
            else:
                _ask_unless_stopped(chat, line)
        except UserError as error:
            report(error)


def _show_commands() -> None:
    width = max(map(len, COMMANDS))
    sys.stderr.write("".join(f"{name:<{width}}  {meaning}\n" for name, meaning in COMMANDS.items()))


def _show_instead(chat: Chat, line: str, pictures: Sequence[Image.Image], videos: Sequence[Frames | Video]) -> None:
    """Start a conversation about these. Raises UserError, at `line`, if the model does not take them."""
    chat.require_shown(line, pictures, videos)
    chat.start(pictures, videos)


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
    if sys.stdin.isatty():
        import readline  # noqa: F401  (input() uses it after the import)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


class WordStreamer(TextStreamer):
    """Write words to stdout as they come, without spaces around the answer: a space waits for the next word."""

    waiting, is_first = "", True

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = (self.waiting + text).lstrip() if self.is_first else self.waiting + text
        words = text.rstrip()
        self.waiting, self.is_first = text[len(words) :], self.is_first and not words
        sys.stdout.write(words + "\n" if stream_end else words)
        sys.stdout.flush()
