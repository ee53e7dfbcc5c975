"""Ask a model on a server the questions that the local run asks a loaded model; the server writes them in its template.

The server has OpenAI's interface (vLLM, SGLang, llama.cpp, `transformers serve`). The package `openai` sends a request
again, after growing pauses, where the connection fails or the server is busy. A picture travels inside the request, as
a data URL: the bytes of the file if it is an upright JPEG or PNG in RGB or grey, which all servers decode alike;
otherwise its pixels as PNG, as the local run reads them.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from milora_data.batches.processor_collator import with_video_marks
from milora_data.encode.chat_template_mask import parts_of
from milora_data.encode.templates import no_videos
from milora_data.keys import digest
from milora_data.pictures.load import ORIENTATION, content_of, load_image, opened_picture
from milora_eval.answers.questions import EvaluationPlan, Items, Question, group_order, questions_of
from milora_eval.answers.runner import Keep, prompt_of
from milora_vl.common.errors import MALFORMED, Problem, UserError, did_you_mean, first_line, suggest, with_context
from milora_vl.common.secrets import HIDDEN
from milora_vl.models.generate import Prompt, Reply

RETRIES = 6
SECONDS = 600.0  # for one answer
PROBES = 4
CONTINUE = "the answers so far are stored; run the same command again to continue"


class ChatServer:
    """A server by its address, up to and including /v1; no message contains the `key`.

    A server that has never answered gets one try: its address is wrong, or it is still starting.
    """

    def __init__(self, url: str, key: str = "") -> None:
        """Raises UserError for a text that is not an http or https address, and without the package `openai`."""
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            hint = "for example  --server http://localhost:8000/v1"
            raise UserError(f"expected an address, got {url!r}", where="--server", hint=hint)
        try:
            from openai import OpenAI
        except ImportError:
            message, hint = "--server needs the package openai", "install it: pip install -e '.[eval]'"
            raise UserError(message, code="package-missing", hint=hint) from None
        self.url, self.key = url.rstrip("/"), key
        self.client = OpenAI(base_url=self.url, api_key=key or "none", timeout=SECONDS, max_retries=RETRIES)

    def listed(self, model: str | None) -> str:
        """Return the name of a model that the server lists. Raises UserError for another name, or if none answers."""
        with self._errors("models"):
            listing = self.client.with_options(timeout=30.0, max_retries=0).models.list()
            names = [str(entry.id) for entry in listing.data]
        if model is None or model not in names:
            hint = did_you_mean(suggest(model or "", names)[:1])
            raise UserError(
                f"the server has no model {model!r}" if model else "required: the name of the model on the server",
                where="--served_model",
                hint="\n".join(filter(None, [hint, f"it lists: {', '.join(names) or 'no model'}"])),
            )
        return model

    def chat(self, model: str, messages: list[Any], max_tokens: int) -> Reply:
        """Return the greedy answer to a conversation. Raises UserError (exit code 1) without one."""
        with self._errors("chat/completions"):
            answer = self.client.chat.completions.create(
                model=model, messages=messages, max_tokens=max_tokens, **GREEDY
            )
            [choice] = answer.choices
            # The content is missing if a model was stopped while it reasoned.
            return Reply((choice.message.content or "").strip(), choice.finish_reason == "length")

    def complete(self, model: str, prompt: str, max_tokens: int) -> Reply:
        with self._errors("completions"):
            answer = self.client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, **GREEDY)
            [choice] = answer.choices
            return Reply(choice.text.strip(), choice.finish_reason == "length")

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Raise the errors of a request as a UserError without the key; its exit code is 1 if it ends a run."""
        import openai

        code, hint = "server-no-answer", ""
        try:
            yield
            return
        except openai.APIStatusError as error:
            message = f"the server answers {error.status_code}: {first_line(error)}"
            code = "server-refuses" if error.status_code < 500 and error.status_code != 429 else code
            hints = {404: "the address ends with /v1 at most servers", 401: "the key comes from OPENAI_API_KEY"}
            hint = hints.get(error.status_code, "")
        except openai.APITimeoutError:
            message = "the server gives no answer in time; ask fewer questions at once"
        except openai.APIConnectionError as error:
            message = f"no server answers: {first_line(error.__cause__ or error)}"
        except (openai.OpenAIError, *MALFORMED) as error:
            code, message = "server-format", f"this is no answer of OpenAI's interface: {first_line(error)}"
        is_running = path != "models"
        raise UserError(
            message.replace(self.key, HIDDEN) if self.key else message,
            code=code,
            where=f"{self.url}/{path}",
            hint="\n".join(filter(None, [hint, CONTINUE if is_running else ""])),
            exit_code=1 if is_running else 2,
        )


# transformers serve applies the repetition penalty of the model, unless a request has this one.
GREEDY: dict[str, Any] = {"temperature": 0, "frequency_penalty": 0}


def served_name(model: str) -> str:
    """Return the name of the results of a model on a server: it names a folder.

    >>> served_name("Qwen/Qwen3-VL-2B-Instruct"), served_name("/models/merged")
    ('served-Qwen-Qwen3-VL-2B-Instruct', 'served-merged')
    """
    name = Path(model).name if Path(model).is_absolute() else model
    return "served-" + re.sub(r"[^\w.-]+", "-", name)[-100:]


def served_settings(server: ChatServer, plan: EvaluationPlan, items: Items) -> dict[str, Any]:
    """Return what an answer depends on besides the question: the model's name, its probe, and the decoding.

    Other weights can be served under a name. The answers to the first questions in the order of `group_order`, which
    are part of every --limit, identify the weights.
    """
    probes = sorted(questions_of(plan, items), key=lambda each: (group_order(each.item.group), each.key))[:PROBES]
    answers: dict[str, str] = {}

    def keep(asked: Sequence[Question], replies: Sequence[Reply]) -> None:
        answers[asked[0].key] = replies[0].text

    ask_server(server, replace(plan, batch_size=1), probes, keep)
    decoding = {"decoding": "temperature 0", "milora_vl": version("milora-vl")}
    return {"served_model": plan.model_name, "probe": digest(answers), **decoding}


def require_servable(plan: EvaluationPlan, items: Items) -> None:
    """Raise UserError for benchmarks that cannot be asked through OpenAI's interface, before anything is asked."""
    for shown in (item for asked in items.values() for item in asked if item.videos):
        raise with_context(no_videos("OpenAI's interface"), shown.source)
    problems = []
    for benchmark in plan.benchmarks:
        why = f"asks with {benchmark.num_beams} beams" if benchmark.num_beams > 1 else ""
        if benchmark.form == "raw" and any(item.images for item in items[benchmark.name]):
            why = "shows pictures without a chat template"
        if any(item.asks_boxes for item in items[benchmark.name]):
            why = "asks for boxes, in the numbers of a family of models"
        if why:
            message = f"benchmark {benchmark.name} {why}, which OpenAI's interface does not offer"
            hint = "leave it out, or load the model:  --model MODEL"
            problems.append(Problem(message, where="--server", hint=hint))
    if problems:
        raise UserError(problems=problems)


def ask_server(server: ChatServer, plan: EvaluationPlan, todo: Sequence[Question], keep: Keep) -> None:
    """Ask questions, at most `plan.batch_size` at once, and pass each answer to `keep` when it comes.

    The first error ends the run, after the answers that are on their way are kept. Raises UserError.
    """
    with ThreadPoolExecutor(plan.batch_size) as pool:
        waiting = {pool.submit(_reply, server, plan.model_name, question): question for question in todo}
        try:
            for future in as_completed(waiting):
                keep([waiting[future]], [future.result()])
                del waiting[future]
        except BaseException:  # also Ctrl-C
            pool.shutdown(cancel_futures=True)
            for future, question in waiting.items():
                if not future.cancelled() and future.exception() is None:
                    keep([question], [future.result()])
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
