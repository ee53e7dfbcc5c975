"""Planted secrets never appear in what people share: files of a run, error messages, logs, tracebacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milora_eval.answers import served
from milora_eval.answers.served import ChatServer
from milora_vl.common.errors import DataError, UserError, with_context
from milora_vl.common.secrets import HIDDEN, without_secrets
from milora_vl.train.__main__ import main
from support.train_runs import training

NAMES = ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MY_PASSWORD",
         "GOOGLE_CREDENTIALS", "github_token", "SSH_PRIVATE_KEY")  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+."
secrets = st.text(LETTERS, min_size=8, max_size=60).filter(
    lambda text: not text.startswith(("/", "./", "~")) and not text.isalpha()
)
texts = st.text("ab c:/=?&'\"\n", max_size=20)
FORMS = (
    "{0}", "--hub_token={0}", "https://me:{0}@example.org/a.git", "http://{0}@proxy:3128", "Authorization: Bearer {0}",
    "https://example.org/a?X-Amz-Signature={0}&b=1", "https://example.org/a?token={0}", "{{'key': '{0}'}}",
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(secret=secrets, name=st.sampled_from(NAMES), form=st.sampled_from(FORMS), before=texts, after=texts)
def test_a_secret_of_the_environment_is_hidden_wherever_it_stands(
    secret: str, name: str, form: str, before: str, after: str
) -> None:
    text = f"{before} {form.format(secret)} {after}"
    with patch.dict(os.environ, {name: secret}):
        assert secret not in without_secrets(text).replace(HIDDEN, "")
        error = with_context(DataError(text, where=text, hint=text), where=text, hint=text)
        assert secret not in str(error)
        assert all(secret not in str(vars_of) for vars_of in (error.problems, error.args))


@settings(max_examples=60, deadline=None)
@given(secret=secrets, before=texts)
def test_passwords_and_tokens_in_urls_are_hidden_without_the_environment(secret: str, before: str) -> None:
    for form in FORMS[2:7]:
        hidden = without_secrets(f"{before} {form.format(secret)}")
        assert secret not in hidden
        assert HIDDEN in hidden


@given(text=st.text("abc /:=?&.,_-", max_size=80))
def test_other_texts_are_not_changed(text: str) -> None:
    with patch.dict(os.environ, {"HF_TOKEN": "hf_planted_secret_of_test"}):
        assert without_secrets(text) == text


def test_no_file_and_no_line_of_a_run_has_a_secret(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    planted = {name: f"planted-{number}-secret" for number, name in enumerate(NAMES)}
    for name, secret in planted.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("https_proxy", "http://me:planted-proxy-secret@127.0.0.1:9")
    run = tmp_path / "run"
    words = ["--rank", "4", "--max_steps", "2", "--save_steps", "1", "--hub_token", "planted-flag-secret",
             "--run_name", f"a-{planted['WANDB_API_KEY']}"]  # fmt: skip
    assert main(training(tiny_data, run, *words)) == 0
    printed = "".join(capfd.readouterr())
    assert "planted-flag" not in printed
    for file in run.rglob("*"):
        is_read_back = file.name == "recipe.yaml"  # a resumed run repeats it word for word
        if file.is_file() and file.suffix in (".json", ".yaml", ".md", ".html", ".csv", ".txt") and not is_read_back:
            assert "planted-" not in file.read_text(errors="replace").replace(f"a-{HIDDEN}", ""), file


def test_a_server_that_refuses_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "RETRIES", 0)  # the waits between them take fifteen seconds
    with pytest.raises(UserError) as raised:
        ChatServer("http://me:planted-secret@127.0.0.1:9/v1?api_key=planted-too", "planted-key").chat("m", [], 1)
    assert "planted" not in str(raised.value)
    assert "127.0.0.1:9" in str(raised.value)


BROKEN = """
import os
from milora_vl.common.cli.console import run
def main(argv):
    raise RuntimeError("401 for token " + os.environ["HF_TOKEN"])
run(main)
"""


def test_a_traceback_has_no_secret() -> None:
    environment = {**os.environ, "HF_TOKEN": "planted-traceback-secret"}
    done = subprocess.run([sys.executable, "-c", BROKEN], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "RuntimeError: 401 for token ***" in done.stderr
    assert "planted" not in done.stderr + done.stdout
