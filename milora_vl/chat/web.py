"""`python -m milora_vl.chat --web`: the same conversation on a page in the browser (gradio); its address and port.

With `--compare` the base model answers too. Both models see the conversation with the tuned model.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from typing import TYPE_CHECKING, Any

from milora_data.pictures.files import to_rgb
from milora_data.records.record import Reply, Turn
from milora_vl.chat.session import Chat
from milora_vl.common.errors import UserError
from milora_vl.models.loading import split_processor

if TYPE_CHECKING:
    from PIL import Image

HOST = "127.0.0.1"
HEIGHT = "60vh"
Messages = list[dict[str, str]]


def serve(chat: Chat, pictures: Sequence[Image.Image], about: str, port: int) -> None:
    """Serve the page to this machine only, until Ctrl-C. Raises UserError if the port is taken."""
    import gradio as gr

    port = free_port(port)
    site = page(chat, pictures, about)
    site.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # no fonts from the network
        footer_links=[],
    )
    sys.stderr.write(f"open {site.local_url}     (Ctrl-C stops the server)\n")
    site.block_thread()


def free_port(port: int) -> int:
    """Return `port` if it is free, or any free port for 0. gradio itself does not choose one or explain its error.

    Raises UserError if it cannot be used.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a server that has just stopped blocks it
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot use {port}: {error}",
                code="port-taken",
                where="--port",
                hint="choose another port, or 0 for any free one",
            ) from None
        return int(probe.getsockname()[1])


def page(chat: Chat, pictures: Sequence[Image.Image], about: str) -> Any:
    """Return the gradio page: model, pictures, conversation (two of them with `compare`) and question."""
    import gradio as gr

    labels = ["base model", "fine-tuned"] if chat.compare else ["answers"]
    with gr.Blocks(title=f"{about} · milora-vl", analytics_enabled=False) as site:
        turns = gr.State([])
        gr.HTML(f"<strong>{escape(about)}</strong>")
        with gr.Row():
            seen = gr.Gallery(
                list(pictures), type="pil", label="pictures", height=HEIGHT, min_width=300, columns=2, interactive=True,
                file_types=["image"], buttons=[],
            )  # fmt: skip
            style = {"height": HEIGHT, "min_width": 300, "scale": 2, "render_markdown": False, "buttons": []}
            logs = [gr.Chatbot(label=label, **style) for label in labels]
        with gr.Row():
            question = gr.Textbox(placeholder="What is this?", show_label=False, scale=8)
            ask = gr.Button("Ask", variant="primary", scale=1, min_width=100)
            restart = gr.Button("Start again", scale=1, min_width=100)

        def respond(
            asked: str, gallery: Sequence[tuple[Image.Image, str]] | None, history: list[Turn], *shown: Messages
        ) -> Iterator[tuple[Any, ...]]:
            if not asked.strip():
                gr.Info("Type a question first.")
                return
            box: Any = ""  # cleared once: the user may type the next question during the answer
            try:
                images = [to_rgb(image) for image, _ in gallery or ()]
                for new_turns, messages in answers(chat, asked.strip(), images, history, list(shown)):
                    yield (box, new_turns, *messages)
                    box = gr.skip()
            except UserError as error:
                gr.Warning(str(error))

        inputs, outputs = [question, seen, turns, *logs], [question, turns, *logs]
        streaming = [
            event(respond, inputs, outputs, concurrency_limit=1, concurrency_id="model", api_name=False)
            for event in (ask.click, question.submit)
        ]
        for event in (restart.click, seen.change, *(log.clear for log in logs)):
            # An answer that is still streaming would restore the old conversation, so cancel it first.
            event(None, cancels=streaming, api_name=False).then(
                lambda: ([], *([] for _ in logs)), None, [turns, *logs], api_name=False
            )
    return site


def answers(
    chat: Chat, question: str, pictures: Sequence[Image.Image], turns: list[Turn], logs: list[Messages]
) -> Iterator[tuple[list[Turn], list[Messages]]]:
    """Yield the turns and the messages of each log again for every new piece of an answer.

    The question is about all pictures; those that no turn before it contains come first in it.

    gradio shows messages as HTML even without Markdown, so the texts of user and model are escaped.
    """
    asked = [*turns, chat.user_turn(question, pictures, turns)]
    message = {"role": "user", "content": escape(question)}
    logs = [[*log, message, {"role": "assistant", "content": ""}] for log in logs]
    for log in logs:
        base = len(logs) == 2 and log is logs[0]
        for text in _partial_answers(chat, asked, pictures, base=base):
            log[-1] = {"role": "assistant", "content": escape(text)}
            yield turns, logs
        if isinstance(text, Reply) and text.truncated:
            log[-1]["content"] += f" (truncated at {chat.max_new_tokens} tokens)"
    yield [*asked, chat.answer_turn(text)], logs


def _partial_answers(chat: Chat, turns: list[Turn], pictures: Sequence[Image.Image], *, base: bool) -> Iterator[str]:
    """Yield growing prefixes of an answer; the last one is complete. Raises the errors of the model."""
    from transformers import TextIteratorStreamer

    tokenizer: Any = split_processor(chat.processor)[0]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[no-untyped-call]
    with ThreadPoolExecutor(max_workers=1) as pool:
        answer = pool.submit(chat.reply, turns, pictures, streamer, base=base)
        answer.add_done_callback(lambda _: streamer.end())  # type: ignore[no-untyped-call]  # also after an error
        text = ""
        for piece in streamer:
            text += piece
            yield text.lstrip()
        yield answer.result()
