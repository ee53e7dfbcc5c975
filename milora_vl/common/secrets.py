"""Hide secrets in texts that people share: tokens of environment variables and URLs, and tokens known by their form."""

from __future__ import annotations

import os
import re
from functools import lru_cache

HIDDEN = "***"
_LEAST = 8  # characters of a secret; a shorter value may be a word of any text
_NAMED = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIALS?|AUTH)$", re.IGNORECASE
)
_USER = re.compile(r"(?P<start>[a-z][a-z0-9+.-]{1,20}://)[^\s/@'\"<>]+@", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]{1,20}://[^\s'\"<>]+", re.IGNORECASE)
_QUERY = re.compile(
    r"(?P<start>[?&;][\w.-]*(?:token|secret|password|passwd|key|credential|signature|sig|auth)=)[^&\s'\"<>#]+",
    re.IGNORECASE,
)
# Hugging Face, OpenAI and others, GitHub, AWS, and a bearer token in a header.
_KNOWN = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|(?<![/.-])sk-(?=[\w-]*\d)[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b"
)
_BEARER = re.compile(r"(?P<start>\bAuthorization: *Bearer |\bBearer (?=\S*\d))[\w.~+/=-]{8,}", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """Return `text` with secrets replaced by `***`.

    Secrets are the values of environment variables whose names end with TOKEN, SECRET, API_KEY and the like, users and
    passwords in URLs, their queries that are named so, and tokens of known form. A value of letters alone is taken for
    a word (`WANDB_API_KEY=disabled`).

    >>> without_secrets("https://me:pass@example.org/a?x=1&token=abc")
    'https://***@example.org/a?x=1&token=***'
    """
    for secret in _secrets(tuple(os.environ.items())):
        text = text.replace(secret, HIDDEN)
    if "://" in text:
        text = _USER.sub(rf"\g<start>{HIDDEN}@", text)
        text = _URL.sub(lambda url: _QUERY.sub(rf"\g<start>{HIDDEN}", url[0]), text)
    return _BEARER.sub(rf"\g<start>{HIDDEN}", _KNOWN.sub(HIDDEN, text))


@lru_cache(maxsize=8)
def _secrets(environment: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Return the secret values of an environment, long ones first. A path is not a secret."""
    found: set[str] = set()
    for name, value in environment:
        if _NAMED.search(name) and len(value) >= _LEAST and not value.startswith(("/", "./", "~")):
            found.add(value)
        user = re.match(r"[a-z][a-z0-9+.-]*://([^/@\s]+)@", value, re.IGNORECASE)
        if user is not None:
            found |= {part for part in (user[1], user[1].partition(":")[2]) if len(part) >= _LEAST}
    found = {secret for secret in found if not secret.isalpha()}
    return tuple(sorted(found, key=len, reverse=True))
