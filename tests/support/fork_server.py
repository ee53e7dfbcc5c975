"""Runs programs as Python does, each in a fork of this process, which has imported the libraries.

A new interpreter takes four to six seconds of CPU time for imports; a fork takes a hundredth of one. Our own modules
are not imported here, so a program can still show what works without them. Started by `tests/support/programs.py` with
the number of a socket that listens; each message is a JSON object.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

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


def serve(listener: socket.socket) -> None:
    """Answer all who connect, until standard input, a pipe from the test session, is closed."""
    ended, clients = sys.stdin, list[socket.socket]()
    while True:
        ready = select.select([ended, listener, *clients], [], [])[0]
        if ended in ready:
            return
        if listener in ready:
            clients.append(listener.accept()[0])
        for client in [client for client in clients if client in ready]:
            message, given, _, _ = socket.recv_fds(client, 1 << 20, 3)
            if message:
                with suppress(OSError):  # who asked may have ended
                    client.send(json.dumps(answer(json.loads(message), given, [listener, *clients])).encode())
            else:
                clients.remove(client)
                client.close()


def answer(request: dict[str, Any], given: list[int], sockets: Sequence[socket.socket]) -> Any:
    """Start a program and return its process ID, or return its exit code and CPU seconds if it has ended."""
    if "wait" in request:
        pid, status, used = os.wait4(request["wait"], request["flags"])
        return [os.waitstatus_to_exitcode(status) if pid else None, used.ru_utime + used.ru_stime]
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        for each in sockets:
            each.close()
        code = run(request, given)
        if "WORLD_SIZE" not in request["env"]:  # the threads of a process group need Python's own end
            end(code)
        atexit.register(gc.unfreeze)  # else extension modules report the frozen objects as leaks
        sys.exit(code)
    for number in given:
        os.close(number)
    return child


def run(request: dict[str, Any], given: list[int]) -> int:
    """Be the program, and return its exit code as Python does."""
    try:
        become(request, given)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        return -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def end(code: int) -> NoReturn:
    """End as Python does, without the release of all modules and objects, which takes more than a second."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # a closed pipe
            code = code or 120
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def become(request: dict[str, Any], given: list[int]) -> None:
    """Take the place of the program: its files, folder, environment and arguments, then its code."""
    for target, number in enumerate(given):
        os.dup2(number, target)
        os.close(number)
    if request["new_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
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


def preload() -> None:
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    preload()
    serve(socket.socket(fileno=int(sys.argv[1])))
