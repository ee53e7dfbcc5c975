"""Start programs from a test, without waiting for imports: `run(["milora_vl.train", "--rank", "4"])`.

The words are Python's command line: a module (without `-m`), the file of a script, or `-c` and code. Each is a
fork of a process that has imported the libraries (`fork_server.py`). It has files, a folder and an environment of its
own and ends as any program does. A test of the start itself (imports, options of Python, variables that a library reads
when it is imported) starts a new interpreter with `subprocess` instead.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import IO, Any

ADDRESS = "MILORA_FORK_SERVER"  # the environment variable that names its socket
ENVIRONMENT = os.environ | {"DS_ACCELERATOR": "cpu"}  # before any test has changed it
seconds_of_ended = 0.0  # CPU time of all programs that have ended


def listen() -> None:
    """Make one server for this process and its workers. It starts when somebody connects."""
    folder = tempfile.mkdtemp(dir="/tmp")  # the path of a socket has at most 107 characters
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[ADDRESS] = ENVIRONMENT[ADDRESS] = f"{folder}/programs"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(os.environ[ADDRESS])
    listener.listen()
    threading.Thread(target=_start, args=(listener,), daemon=True).start()


def _start(listener: socket.socket) -> None:
    select.select([listener], [], [])
    number, nowhere = listener.fileno(), subprocess.DEVNULL
    words = [sys.executable, str(Path(__file__).with_name("fork_server.py")), str(number)]
    files = {"stdin": subprocess.PIPE, "stdout": nowhere}
    subprocess.Popen(words, pass_fds=[number], env=ENVIRONMENT, **files).wait()  # its pipe closes at our end


class _Server:
    def __init__(self) -> None:
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.connect(os.environ[ADDRESS])
        self.one_at_a_time = threading.Lock()

    def ask(self, request: dict[str, Any], files: Sequence[int] = ()) -> Any:
        with self.one_at_a_time:
            socket.send_fds(self.channel, [json.dumps(request).encode()], files)
            return json.loads(self.channel.recv(100))


@cache
def _server() -> _Server:
    return _Server()


class Program:
    """A started program, with the part of `subprocess.Popen` that tests use. Ends with -SIGNAL if a signal ended it."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
        new_session: bool = False,
    ) -> None:
        self.server = _server()
        self.returncode: int | None = None
        request = {
            "words": list(words),
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
            "new_session": new_session,
        }
        with Path(os.devnull).open("r+b") as nothing:
            files = [nothing.fileno(), (stdout or nothing).fileno(), (stderr or nothing).fileno()]
            self.pid: int = self.server.ask(request, files)

    def poll(self) -> int | None:
        """Return the exit code, None while the program runs."""
        return self._ended(os.WNOHANG)

    def wait(self, timeout: float = 600.0) -> int:
        """Return the exit code when the program has ended. Kills it and raises TimeoutExpired after `timeout` s."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill_if_running()
                raise subprocess.TimeoutExpired("program", timeout)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def kill_if_running(self) -> None:
        if self.poll() is None:
            self.kill()
            self._ended(0)

    def _ended(self, flags: int) -> int | None:
        global seconds_of_ended
        if self.returncode is None:
            self.returncode, used = self.server.ask({"wait": self.pid, "flags": flags})
            seconds_of_ended += used
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkedSubprocess:
    """Takes the place of the module `subprocess` where our code starts `python -m milora_...` by its `run`."""

    PIPE, STDOUT = subprocess.PIPE, subprocess.STDOUT

    @staticmethod
    def run(
        command: Sequence[str],
        *,
        stdout: Any = None,
        stderr: Any = None,
        capture_output: bool = False,
        text: bool = False,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Run the command as `subprocess.run` does; the program does not inherit `pass_fds`."""
        python, option, *words = command
        assert python == sys.executable
        words = words if option == "-m" else [option, *words]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, ExitStack() as inherited:

            def file(given: Any, captured: IO[Any], number: int) -> IO[Any]:
                if capture_output or given is subprocess.PIPE:
                    return captured
                return inherited.enter_context(os.fdopen(os.dup(number), "wb")) if given is None else given

            first = file(stdout, out, 1)
            second = first if stderr is subprocess.STDOUT else file(stderr, err, 2)
            code = Program(words, env=env, stdout=first, stderr=second).wait()
            for captured in (out, err):
                captured.seek(0)
            return subprocess.CompletedProcess(command, code, out.read(), err.read())


def run(
    words: Sequence[str],
    *,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    together: bool = False,
    timeout: float = 600.0,
) -> subprocess.CompletedProcess[str]:
    """Run Python with these words and return what it printed: with `together`, stderr is in stdout as well."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        program = Program(words, cwd=cwd, env=env, stdout=out, stderr=out if together else err)
        code = program.wait(timeout)
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(list(words), code, out.read(), err.read())


# Loads base, adapter and inputs of each folder without this package, and writes the logits, also of the merged model.
STOCK_PEFT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "milora_vl":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
import json, pathlib, torch, transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

for folder in map(pathlib.Path, sys.argv[1:]):
    config = transformers.AutoConfig.from_pretrained(folder / "base")
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    inputs = load_file(folder / "inputs.safetensors")
    out = {"adapted": model(**inputs).logits, "merged": model.merge_and_unload()(**inputs).logits}
    save_file({name: t.detach().contiguous() for name, t in out.items()}, folder / "stock.safetensors")
"""
