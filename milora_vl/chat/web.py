"""`python -m milora_vl.chat --web`: the same conversation on a page in the browser (gradio).

With `--compare` the base model answers beside the tuned one; the conversation that both see is the tuned one's.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html import escape
from typing import TYPE_CHECKING, Any

from milora_data.errors import UserError
from milora_data.records import Turn
from milora_vl.models.loading import split_processor

if TYPE_CHECKING:
    from PIL import Image

    from milora_vl.chat.command import Chat

HOST = "127.0.0.1"
HEIGHT = "60vh"
Messages = list[dict[str, str]]


def serve(chat: Chat, picture: Image.Image | None, about: str, port: int) -> None:
    """Show the page on this machine alone until Ctrl-C. UserError if the port is taken."""
    import gradio as gr

    port = free_port(port)
    site = page(chat, picture, about)
    site.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # nothing from a font server
        footer_links=[],
    )
    sys.stderr.write(f"open {site.local_url}     (Ctrl-C ends it)\n")
    site.block_thread()


def free_port(port: int) -> int:
    """Return `port` if a page can be served there, any free one for 0; gradio itself can neither choose nor say.

    Raises UserError for a port that is taken, and for a number that is none.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a page that has just ended does not block it
        try:
            probe.bind((HOST, port))
        except OverflowError:
            raise UserError(f"--port {port}: expected a number from 0 (any free port) to 65535") from None
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}\nname another one, or 0 for any free one") from None
        return int(probe.getsockname()[1])


def page(chat: Chat, picture: Image.Image | None, about: str) -> Any:
    """Return the gradio page: who answers, picture, conversation (two beside each other with `compare`), question."""
    import gradio as gr

    labels = ["base model", "fine-tuned"] if chat.compare else ["answers"]
    with gr.Blocks(title=f"{about} · milora-vl", analytics_enabled=False) as site:
        turns = gr.State([])
        gr.HTML(f"<strong>{escape(about)}</strong>")
        with gr.Row():
            image = gr.Image(picture, type="pil", label="picture", height=HEIGHT, min_width=300, buttons=[])
            look = {"height": HEIGHT, "min_width": 300, "scale": 2, "render_markdown": False, "buttons": []}
            logs = [gr.Chatbot(label=label, **look) for label in labels]
        with gr.Row():
            question = gr.Textbox(placeholder="What is this?", show_label=False, scale=8)
            ask = gr.Button("Ask", variant="primary", scale=1, min_width=100)
            afresh = gr.Button("Start again", scale=1, min_width=100)

        def respond(
            asked: str, seen: Image.Image | None, said: list[Turn], *shown: Messages
        ) -> Iterator[tuple[Any, ...]]:
            if not asked.strip():
                gr.Info("Type a question first.")
                return
            box: Any = ""  # emptied once: the next question may be typed while the answer grows
            try:
                for told, now in answers(chat, asked.strip(), seen, said, list(shown)):
                    yield (box, told, *now)
                    box = gr.skip()
            except UserError as error:
                gr.Warning(str(error))

        inputs, outputs = [question, image, turns, *logs], [question, turns, *logs]
        growing = [
            event(respond, inputs, outputs, concurrency_limit=1, concurrency_id="model", api_name=False)
            for event in (ask.click, question.submit)
        ]
        for event in (afresh.click, image.change, *(log.clear for log in logs)):
            # What still grows would put the old conversation back: it ends first.
            event(None, cancels=growing, api_name=False).then(
                lambda: ([], *([] for _ in logs)), None, [turns, *logs], api_name=False
            )
    return site


def answers(
    chat: Chat, question: str, picture: Image.Image | None, turns: list[Turn], logs: list[Messages]
) -> Iterator[tuple[list[Turn], list[Messages]]]:
    """Yield the turns and what each log shows, again and again while the answers grow.

    The logs are HTML to gradio, also without Markdown: what user and model say is escaped for them.
    """
    asked = [*turns, chat.user_turn(question, picture, turns)]
    said = {"role": "user", "content": escape(question)}
    logs = [[*log, said, {"role": "assistant", "content": ""}] for log in logs]
    for log in logs:
        base = len(logs) == 2 and log is logs[0]
        for text in _growing(chat, asked, picture, base=base):
            log[-1] = {"role": "assistant", "content": escape(text)}
            yield turns, logs
    yield [*asked, Turn("assistant", text)], logs


def _growing(chat: Chat, turns: list[Turn], picture: Image.Image | None, *, base: bool) -> Iterator[str]:
    """Yield an answer as far as it is known; the last one is whole. Errors of the model come out here."""
    from transformers import TextIteratorStreamer

    tokenizer: Any = split_processor(chat.processor)[0]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[no-untyped-call]
    with ThreadPoolExecutor(max_workers=1) as pool:
        answer = pool.submit(chat.reply, turns, picture, streamer, base=base)
        answer.add_done_callback(lambda _: streamer.end())  # type: ignore[no-untyped-call]  # an error ends it too
        text = ""
        for piece in streamer:
            text += piece
            yield text.lstrip()
        yield answer.result()
