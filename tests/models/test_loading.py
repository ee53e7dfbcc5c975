"""What a user reads when a model cannot be loaded: a mistyped id, a tokenizer without the packages that read it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.fake_hub import FakeHub, running

ASKED = """
import sys
from milora_vl.common.errors import UserError
from milora_vl.models import loading

for call in sys.argv[2:]:
    try:
        getattr(loading, call)(sys.argv[1])
    except UserError as error:
        print(error)
"""


def test_a_mistyped_id_is_not_a_hub_that_does_not_answer() -> None:
    calls = ["config_of", "load_weights", "weights_folder"]
    with running(FakeHub()) as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}  # read when the client is imported
        words = [sys.executable, "-c", ASKED, "llava-hf/llava-1.5-7c-hf", *calls]
        done = subprocess.run(words, env=env, capture_output=True, text=True)
    said = "the model hub has no llava-hf/llava-1.5-7c-hf, or you may not read it\ncheck the name; a private or gated "
    assert done.stdout.count(said) == len(calls), done.stdout + done.stderr


# Packages that are not installed.
HIDDEN = """
import importlib.util, sys

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "sentencepiece" else find(name, package)
sys.modules["sentencepiece"] = None
"""


def test_a_tokenizer_model_alone_names_the_packages_that_read_it(tiny_llama, tmp_path: Path) -> None:
    """A Vicuna folder, whose tokenizer has no other file."""
    common = pytest.importorskip("mistral_common")
    tiny_llama()[0].save_pretrained(tmp_path)
    shutil.copy(Path(common.__file__).parent / "data" / "tokenizer.model.v1", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    words = [sys.executable, "-c", HIDDEN + ASKED, str(tmp_path), "load_processor"]
    said = subprocess.run(words, stdout=subprocess.PIPE, text=True).stdout
    assert "tokenizer.json needs:  pip install sentencepiece protobuf" in said
