"""Runs programs as Python does, each in a fork of this process, which has imported the libraries.

A new interpreter takes four to six seconds of CPU time for imports; a fork takes a hundredth of one. Our own modules
are not imported here, so a program can still show what works without them. Started by `tests/support/programs.py` with
the number of a socket; each message is a JSON object, answered by a process ID, or by an exit code and CPU seconds.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
# What a training imports; modules that a machine lacks, or that a program does not need, are no error.
PRELOADED = (
    "torch",
    "peft",
    "transformers",
    "transformers.trainer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.image_processing_llava",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
    "transformers.tokenization_mistral_common",  # every processor asks for it
    "datasets",
    "deepspeed",
    "torchdata.stateful_dataloader",
    "jinja2",
    "rich.progress",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)
# What transformers imports in its turn, for programs that must be the first to import transformers.
WITHOUT_TRANSFORMERS = (
    "torch",
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch.onnx",
    "torchvision",
    "scipy.stats",
    "sympy",
    "huggingface_hub.hf_api",
    "torch.distributed.fsdp",
    "filelock",
    "tokenizers",
    "safetensors.torch",
    "PIL.Image",
    "jinja2",
    "yaml",
    "regex",
    "pydantic",
)


def serve(channel: socket.socket) -> None:
    """Answer until the other end is closed. Returns in the process of a program, too: it ends as Python ends."""
    answer: Any
    while True:
        message, given, _, _ = socket.recv_fds(channel, 1 << 20, 3)
        if not message:
            return
        request: dict[str, Any] = json.loads(message)
        if "wait" in request:
            pid, status, used = os.wait4(request["wait"], request["flags"])
            answer = [os.waitstatus_to_exitcode(status) if pid else None, used.ru_utime + used.ru_stime]
        else:
            sys.stdout.flush()
            answer = os.fork()
            if answer == 0:
                channel.close()
                become(request, given)
                return
            for number in given:
                os.close(number)
        channel.send(json.dumps(answer).encode())


def become(request: dict[str, Any], given: list[int]) -> None:
    """Be the program: its files, folder, environment and arguments, then its code."""
    for target, number in enumerate(given):
        os.dup2(number, target)
        os.close(number)
    if request["new_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    atexit.register(gc.unfreeze)  # else extension modules report the frozen objects as leaks when Python ends
    first, *rest = request["words"]
    sys.path[0] = str(TESTS)
    if first.startswith("milora_") or first.endswith(".py"):
        importlib.import_module("support.quick_plots").replace()
    if first == "-c":
        sys.path[0], sys.argv = request["cwd"], ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first.endswith(".py"):
        sys.path[0], sys.argv = str(Path(first).parent), [first, *rest]
        runpy.run_path(first, run_name="__main__")
    else:
        sys.path[0], sys.argv = request["cwd"], [first, *rest]
        runpy.run_module(first, run_name="__main__", alter_sys=True)


def preload(names: Sequence[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    preload(WITHOUT_TRANSFORMERS if sys.argv[2] == "torch" else PRELOADED)
    serve(socket.socket(fileno=int(sys.argv[1])))
