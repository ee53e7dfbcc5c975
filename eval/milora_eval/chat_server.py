"""A server with OpenAI's interface (vLLM, SGLang, llama.cpp, `transformers serve`): requests, retries, clear errors.

After connection errors, 429 and 5xx, a request is sent again after growing pauses, or after the time that the server
asks for. A server that has never answered gets one try: its address is wrong, or it is still starting.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from milora_data.records.record import Reply
from milora_vl.common.cli.command_line import suggest
from milora_vl.common.errors import MALFORMED, UserError, first_line
from milora_vl.common.secrets import HIDDEN

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before each further try
LONGEST_PAUSE = 600.0  # of those that a server asks for
LISTING, LISTING_SECONDS = "models", 30.0
KEY_VARIABLE = "OPENAI_API_KEY"
CONTINUE = "the answers so far are stored; run the same command again to continue"
_CONNECTION = (OSError, HTTPException)  # URLError and HTTPError are OSErrors


def api_key(variable: str) -> str:
    """Return the key in an environment variable; empty without OPENAI_API_KEY, because many servers need no key."""
    key = os.environ.get(variable, "").strip()
    if (variable != KEY_VARIABLE and not key) or not (key.isascii() and key.isprintable()):
        message = f"the environment variable {variable} {'has no key of ASCII characters' if key else 'is not set'}"
        raise UserError(message, code="flag-value", where="--key_variable")
    return key


@dataclass(frozen=True, slots=True)
class ChatServer:
    """A server by its address, up to and including /v1; `key` goes into the Authorization header and nowhere else.

    `flag` names the address in errors. The first answer sets `reached`. After `stopped` is set, no thread waits for
    another try.
    """

    url: str
    key: str = field(default="", repr=False)
    flag: str = "--server"
    seconds: float = 600.0  # for one answer
    reached: threading.Event = field(default_factory=threading.Event, repr=False)
    stopped: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self) -> None:
        """Raises UserError for a text that is not an http or https address."""
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).netloc:
            raise UserError(
                f"expected an address, got {self.url!r}",
                code="flag-value",
                where=self.flag,
                hint=f"for example  {self.flag} http://localhost:8000/v1",
            )

    def listed(self, model: str | None) -> str:
        """Return the name of a model that the server lists. Raises UserError for another name, or if none answers."""
        listing = self._request(LISTING)
        try:
            names = [str(entry["id"]) for entry in listing["data"]]
        except MALFORMED:
            raise self._error(f"this is no list of models: {listing!r:.200}", "server-format", LISTING) from None
        if model is None or model not in names:
            near = suggest(model or "", names)
            raise UserError(
                f"the server has no model {model!r}" if model else "required: the name of the model on the server",
                code="flag-value" if model else "flag-required",
                where="--served_model",
                hint=(f"did you mean {near[0]}?\n" if near else "") + f"it lists: {', '.join(names) or 'no model'}",
            )
        return model

    def chat(self, model: str, messages: Sequence[dict[str, Any]], max_tokens: int | None = None) -> Reply:
        """Return the greedy answer to a conversation. Raises UserError (exit code 1) without one."""
        return self._answer("chat/completions", {"model": model, "messages": list(messages)}, max_tokens)

    def complete(self, model: str, prompt: str, max_tokens: int) -> Reply:
        """Return the greedy continuation of a text, without a chat template."""
        return self._answer("completions", {"model": model, "prompt": prompt}, max_tokens)

    def _answer(self, path: str, body: dict[str, Any], max_tokens: int | None) -> Reply:
        # transformers serve applies the repetition penalty of the model, unless a request has this one.
        body |= {"temperature": 0, "frequency_penalty": 0}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        answer = self._request(path, body)
        try:
            [choice] = answer["choices"]
            # The content is missing if a model was stopped while it reasoned.
            text = choice["text"] if "text" in choice else choice["message"].get("content") or ""
            return Reply(str(text).strip(), choice.get("finish_reason") == "length")
        except MALFORMED:
            raise self._error(f"this is no answer: {answer!r:.200}", "server-format", path) from None

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the JSON that answers a request: POST if it has a body."""
        for pause in (*PAUSES, None):
            request = Request(self._place(path), None if body is None else json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            if self.key:
                request.add_unredirected_header("Authorization", f"Bearer {self.key}")
            try:
                with urlopen(request, timeout=LISTING_SECONDS if body is None else self.seconds) as response:
                    self.reached.set()
                    return json.load(response)
            except _CONNECTION as error:
                if isinstance(error, HTTPError):
                    self.reached.set()
                wait = _pause(error, pause) if self.reached.is_set() else None
                if wait is None or self.stopped.wait(wait):
                    raise self._failed(error, path) from None
            except ValueError:
                raise self._error("the answer is not JSON", "server-format", path) from None
        raise AssertionError("the last try has no pause")

    def _failed(self, error: Exception, path: str) -> UserError:
        """Return the error of a request."""
        status = error.code if isinstance(error, HTTPError) else None
        if isinstance(error, HTTPError):
            message = f"the server answers {error.code} {error.reason}: {_said(error)}"
        elif isinstance(error, TimeoutError):
            message = "the server gives no answer in time; ask fewer questions at once"
        else:
            message = f"no server answers: {error.reason if isinstance(error, URLError) else first_line(error)}"
        code = "server-refuses" if status and _is_refusal(status) else "server-no-answer"
        hints = {404: "the address ends with /v1 at most servers", 401: "the key comes from --key_variable"}
        return self._error(message, code, path, hints.get(status or 0, ""))

    def _error(self, message: str, code: str, path: str, hint: str = "") -> UserError:
        """Return an error without the key; the exit code is 1 if it ends a run."""
        is_running = self.reached.is_set() and path != LISTING
        return UserError(
            message.replace(self.key, HIDDEN) if self.key else message,
            code=code,
            where=self._place(path),
            hint="\n".join(filter(None, [hint, CONTINUE if is_running else ""])),
            exit_code=1 if is_running else 2,
        )

    def _place(self, path: str) -> str:
        return f"{self.url.rstrip('/')}/{path}"


def _pause(error: Exception, pause: float | None) -> float | None:
    """Return how long to wait before the next try; None if this was the last one.

    A request that got no answer in time is not sent again: the server still computes its answer.
    """
    if pause is None or isinstance(error, TimeoutError):
        return None
    if not isinstance(error, HTTPError):
        return pause
    if _is_refusal(error.code):
        return None
    asked = _retry_after(error.headers)
    return pause if asked is None else asked if asked <= LONGEST_PAUSE else None


def _is_refusal(status: int) -> bool:
    return status < 500 and status != 429


def _retry_after(headers: Message) -> float | None:
    """Return the seconds of the header Retry-After, which has a number or a date; None without it."""
    value = headers.get("Retry-After", "")
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds())
    return None


def _said(error: HTTPError) -> str:
    """Return the message in the body of an error: {"error": {"message": ...}}, {"detail": ...}, or a text."""
    content = b""
    with suppress(*_CONNECTION):
        content = error.read(10_000)
    value: Any = content.decode("utf-8", "replace")
    with suppress(ValueError):
        value = json.loads(value)
    for key in ("error", "message", "detail"):
        value = value[key] if isinstance(value, dict) and key in value else value
    return str(value).strip()[:500] or "no message"
