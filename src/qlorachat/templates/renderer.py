"""Renders a checkpoint's chat template in a child process, which is ended at its limits."""

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import psutil

from qlorachat.errors import DialogError, EngineError

Rendering = dict[str, str]  # {"text": ...}, or a reason: {"refused": ...} or {"failed": ...}

TIME_LIMIT = 2.0  # seconds of a processor for all renderings of one request
WAIT_LIMIT = 60.0  # seconds for any answer: a cold disk, a virus scanner, a machine that swaps
_POLL = 0.05  # seconds
ANSWER_LIMIT = 160 * 2**20  # bytes: three renderings at the child's own limit, escaped

_PROGRAM = Path(__file__).with_name("sandbox.py")


class Stopped(Exception):
    """The child process ended before it answered; says why."""


class Renderer:
    """One template and its child process, which is started when needed and ends with this object.

    Safe to call from any thread: requests wait for each other.
    """

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        self._source, self._variables = source, variables
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def render(
        self, dialogs: Sequence[Sequence[dict[str, str]]], *, add_generation_prompt: bool
    ) -> list[Rendering]:
        """One rendering for each dialog; DialogError when the template goes beyond its limits."""
        variables = self._variables | {
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        request = {"source": self._source, "variables": variables, "dialogs": dialogs}
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            if self._child is None or not self._child.alive:
                self._child = _Child()
            try:
                renderings: list[Rendering] = self._child.ask(line, TIME_LIMIT)
            except Stopped as stopped:
                raise DialogError(
                    f"The checkpoint's chat template {stopped}: choose another with --template "
                    "(in code, template=).",
                    param="template",
                ) from None
        return renderings


class _Child:
    """A running sandbox.py that has said it is ready."""

    def __init__(self) -> None:
        try:
            self._process = _start()
            self._end = weakref.finalize(self, _end, self._process)
            self.ask(b"", WAIT_LIMIT)
        except (OSError, Stopped) as error:
            raise EngineError(
                f"The process for chat templates could not start ({error}): check that "
                f"{sys.executable} can import jinja2."
            ) from error

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, line: bytes, limit: float) -> Any:
        """The child's next answer after `line`; Stopped when it computes for `limit` seconds, or
        says nothing for WAIT_LIMIT."""
        answered, expired = threading.Event(), threading.Event()
        watcher = threading.Thread(target=self._watch, args=[limit, answered, expired])
        watcher.start()
        try:
            answer = self._exchange(line)
        except BaseException:  # the answer to come would be taken for the next one's
            self._end()
            raise
        finally:
            answered.set()
            watcher.join()
        if answer.endswith(b"\n") and not expired.is_set():
            return json.loads(answer)
        self._end()
        raise Stopped(f"took over {limit:g} s" if expired.is_set() else "ended its process")

    def _exchange(self, line: bytes) -> bytes:
        """Write a line and read one; b"" when the process is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):  # its end of the pipe is closed
            self._process.stdin.write(line)
            self._process.stdin.flush()
        return self._process.stdout.readline(ANSWER_LIMIT)

    def _watch(self, limit: float, answered: threading.Event, expired: threading.Event) -> None:
        """Kill the process if it computes for too long, or has no answer at all."""
        if answered.wait(_POLL):  # as it nearly always is
            return
        end = monotonic() + WAIT_LIMIT
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            begin = _computed(process)
            while not answered.wait(_POLL):
                if _computed(process) - begin > limit or monotonic() > end:
                    expired.set()
                    self._process.kill()
                    return


def _computed(process: psutil.Process) -> float:
    """Seconds of a processor, of the process and of the system for it."""
    times = process.cpu_times()
    return float(times.user + times.system)


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603  our own program
        [sys.executable, "-P", str(_PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # away from the terminal: its Ctrl-C is meant for the chat
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and close its pipes; what was not written yet is lost."""
    with suppress(OSError), process:
        process.kill()
