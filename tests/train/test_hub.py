"""`--push_to_hub`: what cannot work is an error before the model loads, and a push that fails costs no training."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from milora_vl.common.errors import UserError
from milora_vl.train.__main__ import main
from support.fake_hub import FakeHub, running
from support.programs import run as run_program
from support.train_runs import read_json, training

TESTS = Path(__file__).parents[1]
TOKEN = "hf_not_a_real_one"


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """HF_TOKEN is the only login, and is unchanged after the test."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
    return monkeypatch


def command(data: Path, run: Path, *flags: str) -> list[str]:
    return training(data, run, "--rank", "4", "--push_to_hub", *flags)


def refused(data: Path, run: Path, *flags: str) -> str:
    """The error of a run that is refused, in a few lines, without a folder."""
    with pytest.raises(UserError) as error:
        main(command(data, run, *flags))
    assert error.value.exit_code == 2
    assert len(str(error.value).splitlines()) <= 3
    assert not run.exists()
    return str(error.value)


REFUSED: dict[str, tuple[FakeHub, str]] = {
    "a token that the hub does not know": (FakeHub(refuses={"repos/create": 401}), "cannot open the repository run"),
    "a repository that it does not open": (FakeHub(refuses={"repos/create": 403}), "cannot open the repository run"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_hub_will_not_take_is_told_before_the_model_loads(
    reason: str, tiny_data: Path, tmp_path: Path, known: pytest.MonkeyPatch, capfd: Any
) -> None:
    hub, said = REFUSED[reason]
    with running(hub):
        known.setattr(constants, "ENDPOINT", hub.url)
        assert said in refused(tiny_data, tmp_path / "run")
    assert "loading" not in capfd.readouterr().err


# The hub's client reads the address when it is imported, and this program is a fork that has imported it.
PROGRAM = f"""
import os, runpy, sys
sys.path.insert(0, {str(TESTS)!r})
from support import quick_plots
quick_plots.replace()
from huggingface_hub import constants, hf_api
constants.ENDPOINT = hf_api.api.endpoint = os.environ["HF_ENDPOINT"]
constants.HF_TOKEN_PATH = constants.HF_STORED_TOKENS_PATH = os.environ["HF_HOME"]
runpy.run_module("milora_vl.train", run_name="__main__", alter_sys=True)
"""


def trained(data: Path, run: Path, hub: FakeHub, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A whole run in its own process: the Trainer's client keeps the first address it was given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(data.parent / "hf"), **environment}
    return run_program(["-c", PROGRAM, *command(data, run, *flags)], env=inherited | own)


def test_the_files_go_up_when_all_of_them_are_there_and_the_token_stays_here(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running(FakeHub()) as hub:
        done = trained(tiny_data, run, hub, "--hub_token", TOKEN)
    assert done.returncode == 0, done.stderr
    assert f"pushed   {hub.url}/me/run" in done.stderr
    assert TOKEN in hub.tokens
    assert hub.commits[-1] == "Model save"
    assert any("in progress" in summary for summary in hub.commits)
    assert hub.files.keys() >= {"README.md", "report.html", "recipe.yaml", "milora.json", "adapter_model.safetensors"}
    assert list((run / "_start").iterdir())
    assert not [name for name in hub.files if name.startswith(("checkpoint-", "_start"))]
    assert hub.files["README.md"] == (run / "README.md").read_bytes()
    assert b"library_name: peft" in hub.files["README.md"]
    everything = [*hub.files.values(), *(file.read_bytes() for file in run.rglob("*") if file.is_file())]
    assert not any(TOKEN.encode() in text for text in everything)
    assert read_json(run, "environment.json")["command"][-2:] == ["--hub_token", "***"]


def test_a_push_that_fails_costs_no_training(tiny_data: Path, tmp_path: Path) -> None:
    """No error while it trains or at the end; the message has the command that pushes it later."""
    run = tmp_path / "run"
    with running(FakeHub(refuses={"/commit/": 403})) as hub:
        done = trained(tiny_data, run, hub, HF_TOKEN=TOKEN)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"the training is saved in {run}" in done.stderr
    assert f"hf upload me/run {run}" in done.stderr
    assert read_json(run, "environment.json")["finished"]
    assert {path.name for path in run.iterdir()} >= {"adapter_model.safetensors", "README.md", "report.html"}
