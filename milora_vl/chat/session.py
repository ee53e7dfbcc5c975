"""`Chat`, a conversation with a model: load it, keep the turns, `/` commands, stream the words to the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TextStreamer

from milora_data.batches.processor_inputs import ProcessorInputs
from milora_data.pictures.pixels import AspectRatio
from milora_data.pictures.videos import Frames
from milora_data.records.record import IMAGE, VIDEO, Reply, Turn, Video
from milora_vl.chat.picture import open_picture, open_video
from milora_vl.common.cli.command_line import report
from milora_vl.common.errors import UserError, at_flag
from milora_vl.core.adapter.folders import base_of, holds_adapter
from milora_vl.forgetting.measure import can_recover_base
from milora_vl.interop.load_model import load_by_flags, update_since
from milora_vl.interop.scale import Update
from milora_vl.models.base import find_base
from milora_vl.models.generate import Prompt, generate, require_prompts, require_shown
from milora_vl.models.image_tokens import uses_processor
from milora_vl.models.loading import split_processor
from milora_vl.models.prompts import prompts_of

if TYPE_CHECKING:
    from PIL import Image

COMMANDS = {
    "/image FILE": "ask about another picture alone (starts a new conversation)",
    "/video FILE": "ask about a video alone, or the frames in a folder (starts a new conversation)",
    "/add FILE": "show one more picture with the next question",
    "/help": "show these commands",
    "/reset": "start again with the same pictures and videos",
    "/quit": "quit",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """The model that answers, and how: names, folders and sizes as in the flags of the command."""

    model: str
    adapter: Path | None = None
    base: str | None = None  # of a fully trained model
    scale: float = 1.0  # of the update
    template: str | None = None
    max_new_tokens: int = 256
    compare: bool = False
    device: str | None = None
    dtype: str | None = None


def require_askable(
    settings: ChatSettings,
    question: str | None,
    pictures: Sequence[Image.Image],
    videos: Sequence[Frames | Video],
) -> None:
    """Raise UserError, before weights load, for a question, pictures or videos that the model does not take."""
    with at_flag("--model"):
        name = settings.model
        if settings.adapter is None and holds_adapter(Path(name)):
            name = base_of(Path(name))
        base = find_base(name)
    prompts = prompts_of(settings.model, settings.adapter, settings.template)
    if base.own_pictures:
        prompts.limit(base.processor)
    if question is None and not pictures and not videos:
        return
    # Without a question here, the first question of the conversation will show them.
    asked = _about(question or "What?", pictures, videos, "--video" if videos else "--image")
    require_prompts(base, [asked])
    if base.own_pictures:
        require_shown(base.processor, asked)


def _about(question: str, pictures: Sequence[Image.Image], videos: Sequence[Frames | Video], source: str) -> Prompt:
    """Return the first question of a conversation, which errors name by `source`."""
    turn = Chat.user_turn(question, pictures, [], videos)
    return Prompt((turn,), tuple(pictures), videos=tuple(videos), source=source)


@dataclass
class Chat:
    """A conversation with one model. Answers are streamed to stdout.

    `update` is the update of a model without an adapter, and `scale` its size. The next question is about `pictures`
    and `videos`.
    """

    model: Any
    processor: Any
    template: str
    max_new_tokens: int
    compare: bool
    image_aspect_ratio: AspectRatio = "pad"
    update: Update | None = None
    scale: float = 1.0
    pictures: tuple[Image.Image, ...] = ()
    videos: tuple[Frames, ...] = ()
    turns: list[Turn] = field(default_factory=list)

    @classmethod
    def load(cls, settings: ChatSettings) -> Chat:
        """Load the model and adapter of the settings.

        Raises UserError if `--compare` is set and the adapter cannot be switched off, and for another kind of base.
        """
        prompts = prompts_of(settings.model, settings.adapter, settings.template)
        update = None
        size = 1.0 if settings.base else settings.scale  # the update of a fully trained model gets its size below
        with at_flag("--model"):
            model, processor = load_by_flags(settings.model, settings.adapter, settings.dtype, settings.device, size)
        prompts.limit(processor)
        if settings.base:
            with at_flag("--base"):
                update = update_since(settings.base, model)
            update.set(settings.scale)
        if settings.compare and update is None and not can_recover_base(model):
            raise UserError(
                f"{settings.adapter} cannot be switched off: it trained biases, or only a projector",
                code="compare-no-base",
                where="--compare",
                hint="ask the base model without --adapter",
            )
        return cls(
            model,
            processor,
            template=prompts.template,
            image_aspect_ratio=prompts.image_aspect_ratio,
            max_new_tokens=settings.max_new_tokens,
            compare=settings.compare,
            update=update,
            scale=settings.scale,
        )

    def start(self, pictures: Sequence[Image.Image], videos: Sequence[Frames | Video] = ()) -> None:
        """Clear the conversation; the next question is about `pictures` and `videos`. Files are read here, once."""
        inputs = ProcessorInputs(self.processor) if videos else None
        frames = () if inputs is None else tuple(inputs.frames(video) for video in videos)
        self.pictures, self.videos, self.turns = tuple(pictures), frames, []

    def require_shown(
        self, source: str, pictures: Sequence[Image.Image], videos: Sequence[Frames | Video] = ()
    ) -> None:
        """Raise UserError, at `source`, for pictures or videos that the processor of the model refuses."""
        if uses_processor(self.model.config):
            require_shown(self.processor, _about("What?", pictures, videos, source))

    def add(self, picture: Image.Image) -> None:
        """Show one more picture with the next question."""
        self.pictures = (*self.pictures, picture)

    def ask(self, question: str) -> str:
        """Ask a question, write the answer and return it. With `compare`, write the base model's answer first.

        Only the answer of the tuned model stays in the conversation.
        """
        self.turns.append(self.user_turn(question, self.pictures, self.turns, self.videos))
        if self.compare:
            self._write_reply("base   ", base=True)
        answer = self._write_reply("tuned  " if self.compare else "", base=False)
        self.turns.append(self.answer_turn(answer))
        return answer

    def answers(
        self, question: str, pictures: Sequence[Image.Image], videos: Sequence[Frames | Video] = ()
    ) -> dict[str, Any]:
        """Return the question, its answer, and with `compare` the base model's answer; `truncated` marks cut ones."""
        self.start(pictures, videos)
        turns = [self.user_turn(question, pictures, [], videos)]
        base = {"base": self.reply(turns, pictures, None, base=True)} if self.compare else {}
        replies = base | {"answer": self.reply(turns, pictures, None, base=False)}
        return {"question": question, **replies, "truncated": any(reply.truncated for reply in replies.values())}

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
        """Return an answer as a turn. A mark in it is a text, not the place of a picture or a video."""
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
        """Make the model the base model while the context lasts."""
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
        tokenizer = split_processor(self.processor)[0]
        streamer = WordStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        reply = self.reply(self.turns, self.pictures, streamer, base=base)
        if reply.truncated:
            sys.stderr.write(f"(truncated at {self.max_new_tokens} tokens: use a larger --max_new_tokens)\n")
        return reply


def _missing_marks(mark: str, question: str, num_shown: int, turns: Sequence[Turn]) -> str:
    """Return the marks to write before a question, so that the conversation has one per picture (or video)."""
    found = sum(turn.text.count(mark) for turn in turns) + question.count(mark)
    if found <= num_shown:
        return f"{mark}\n" * (num_shown - found)
    thing = "picture" if mark == IMAGE else "video"
    more = "--image FILE, /add FILE, or on the page" if mark == IMAGE else "--video FILE"
    raise UserError(
        f"{found} {mark} in the conversation, but {num_shown} {thing}{'s' * (num_shown != 1)} shown",
        code="prompt-image-count",
        where=_named(question),
        hint=f"write {mark} at most once for each {thing}; show one more {thing}:  {more}",
    )


def _named(question: str) -> str:
    return f"question {question.strip()[:60]!r}"


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
        try:
            if word == "/quit":
                break
            if word == "/help":
                _show_commands()
            elif word == "/reset":
                chat.start(chat.pictures, chat.videos)
            elif word == "/image":
                _show_instead(chat, line, [open_picture(Path(argument.strip()))], ())
            elif word == "/video":
                _show_instead(chat, line, (), [open_video(Path(argument.strip()), *sampling)])
            elif word == "/add":
                picture = open_picture(Path(argument.strip()))
                chat.require_shown(line, [*chat.pictures, picture], chat.videos)
                chat.add(picture)
            elif line.startswith("/"):
                known = f"known commands: {', '.join(COMMANDS)}"
                raise UserError(f"unknown command {word}", code="chat-unknown-command", hint=known)
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


class WordStreamer(TextStreamer):
    """Write words to stdout as they come, without spaces around the answer: a space waits for the next word."""

    waiting, is_first = "", True

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write the text without trailing spaces."""
        text = (self.waiting + text).lstrip() if self.is_first else self.waiting + text
        words = text.rstrip()
        self.waiting, self.is_first = text[len(words) :], self.is_first and not words
        sys.stdout.write(words + "\n" if stream_end else words)
        sys.stdout.flush()
