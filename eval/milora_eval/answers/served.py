"""Ask a model on a server the questions that the local run asks a loaded model; the server writes them in its template.

A picture travels inside the request, as a data URL: the bytes of the file if it is an upright JPEG or PNG in RGB or
grey, which all servers decode alike; otherwise its pixels as PNG, as the local run reads them.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from milora_data.batches.processor_collator import with_video_marks
from milora_data.encode.chat_template_mask import parts_of
from milora_data.encode.templates import no_videos
from milora_data.pictures.files import ORIENTATION, content_of, load_image, opened_picture
from milora_data.records.record import Reply
from milora_eval.answers.questions import EvaluationPlan, Items, Question
from milora_eval.answers.runner import Keep, prompt_of
from milora_eval.chat_server import ChatServer
from milora_vl.common.errors import Problem, UserError, with_context
from milora_vl.models.generate import Prompt


def served_name(model: str) -> str:
    """Return the name of the results of a model on a server: it names a folder.

    >>> served_name("Qwen/Qwen3-VL-2B-Instruct"), served_name("/models/merged")
    ('served-Qwen-Qwen3-VL-2B-Instruct', 'served-merged')
    """
    name = Path(model).name if Path(model).is_absolute() else model
    return "served-" + re.sub(r"[^\w.-]+", "-", name)[-100:]


def served_settings(model: str) -> dict[str, Any]:
    """Return what an answer depends on besides the question: the name on the server, not its address."""
    return {"served_model": model, "decoding": "temperature 0"}


def require_servable(plan: EvaluationPlan, items: Items) -> None:
    """Raise UserError for benchmarks that cannot be asked through OpenAI's interface, before anything is asked."""
    for shown in (item for asked in items.values() for item in asked if item.videos):
        raise with_context(no_videos("OpenAI's interface"), shown.source)
    reasons = {
        benchmark.name: f"asks with {benchmark.num_beams} beams, which OpenAI's interface does not offer"
        if benchmark.num_beams > 1
        else "shows pictures without a chat template, which OpenAI's interface does not offer"
        for benchmark in plan.benchmarks
        if benchmark.num_beams > 1 or (benchmark.form == "raw" and any(item.images for item in items[benchmark.name]))
    }
    if reasons:
        hint = "leave it out, or load the model:  --model MODEL"
        problems = [
            Problem(f"benchmark {name} {why}", "server-benchmark", "--server", hint) for name, why in reasons.items()
        ]
        raise UserError(problems=problems)


def ask_server(
    server: ChatServer, plan: EvaluationPlan, todo: Sequence[Question], keep: Keep, *, one_by_one: bool = False
) -> None:
    """Ask questions, at most `plan.batch_size` at once, and pass each answer to `keep` when it comes.

    The first error ends the run, after the answers that are on their way are kept. Raises UserError.
    """
    at_once = 1 if one_by_one else plan.batch_size
    waiting: dict[Future[Reply], Question] = {}

    def store(futures: Collection[Future[Reply]]) -> None:
        answered = [future for future in futures if not future.cancelled() and future.exception() is None]
        if answered:
            keep([waiting[future] for future in answered], [future.result() for future in answered])

    def store_next() -> None:
        done = wait(waiting, return_when=FIRST_COMPLETED).done
        store(done)
        for future in done:
            del waiting[future]
        for future in done:
            future.result()  # raises the error of a question

    with ThreadPoolExecutor(at_once) as pool:
        try:
            for question in todo:
                waiting[pool.submit(_reply, server, plan.model_name, question)] = question
                if len(waiting) == 2 * at_once:  # so that no thread waits while answers are stored
                    store_next()
            while waiting:
                store_next()
        except BaseException:  # also Ctrl-C
            server.stopped.set()
            pool.shutdown(cancel_futures=True)
            store(waiting)
            raise


def _reply(server: ChatServer, model: str, question: Question) -> Reply:
    prompt, limit = prompt_of(question.benchmark, question.item), question.benchmark.max_new_tokens
    try:
        if prompt.form == "raw":
            return server.complete(model, prompt.turns[-1].text, limit)
        return server.chat(model, messages_of(prompt), limit)
    except UserError as error:
        raise with_context(error, prompt.source) from None


def messages_of(prompt: Prompt) -> list[dict[str, Any]]:
    """Return a prompt as the messages of OpenAI's interface, with its pictures where the turns have `<image>`.

    Raises DataError for another number of `<image>` than of pictures, and ImageError for a picture that cannot be read.
    """
    turns, pictures = with_video_marks(prompt.turns, len(prompt.images), 0), iter(prompt.images)
    return [{"role": turn.role, "content": _content(turn.text, pictures)} for turn in turns]


def _content(text: str, pictures: Iterator[Any]) -> str | list[Any]:
    """Return the content of a message; a plain text without a picture, because servers of text models take no parts."""
    parts = parts_of(text)
    if all(part["type"] == "text" for part in parts):
        return text
    return [
        part if part["type"] == "text" else {"type": "image_url", "image_url": {"url": picture_url(next(pictures))}}
        for part in parts
    ]


@lru_cache(maxsize=64)  # many benchmarks ask several questions in a row about one picture
def picture_url(path: str) -> str:
    """Return a picture file as a data URL. Raises ImageError."""
    image = load_image(path)
    with opened_picture(path) as header:
        is_plain = header.mode in ("RGB", "L") and header.getexif().get(ORIENTATION, 1) == 1
        kind = header.format if is_plain else ""
    if kind in ("JPEG", "PNG"):
        content = content_of(path)
    else:
        kind, file = "PNG", BytesIO()
        image.save(file, "PNG")
        content = file.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"
