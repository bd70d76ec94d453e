"""The chat on a pseudo-terminal, as a person has it: a process, real keys, a real screen."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import pytest

if sys.platform == "win32":
    pytest.skip("pseudo-terminals of the standard library need POSIX", allow_module_level=True)

import fcntl
import pty
import select
import struct
import termios

SECONDS = 30.0
SCRIPT = """
import signal, sys, threading
from pathlib import Path
from qlorachat.testing import FakeBackend, fake_engine
from qlorachat_cli.plugin import CliFrontend, CliOptions

def answer(request, prompt):
    if "長い" in prompt.rsplit("user\\n", 1)[-1]:
        return "".join(f"{n}番目の**文**です。" for n in range(2000))  # for minutes
    return "はい、`クマ`です。\\n\\n- 一つ\\n- 二つ\\n\\nEND"

signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
options, frontend = CliOptions(folder=Path(sys.argv[1])), CliFrontend()
frontend.prepare(options)
backend = FakeBackend(answer, delay=0.003, context_length=2**16)
with fake_engine(backend, max_tokens=40_000) as engine:
    frontend.serve(engine, options, threading.Event())
print("the process went on")
"""
_COLOURS = re.compile(rb"\x1b\[(?:[\d;]*;)?[349][0-8](?:;[\d;]*)?m")
_CODES = re.compile(r"\x1b\[[?\d;]*[A-Za-z]")


class Person:
    """Types into a process and reads its screen, without the codes for colours and cursor."""

    def __init__(self, process: "subprocess.Popen[bytes]", terminal: int) -> None:
        self.process = process
        self._terminal = terminal
        self.raw = b""

    def looks_anew(self) -> None:
        self.raw = b""

    @property
    def screen(self) -> str:
        return _CODES.sub("", self.raw.decode(errors="ignore"))

    def types(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def sees(self, text: str) -> None:
        """Read until the text is shown; what was shown before `looks_anew` does not count."""
        deadline = monotonic() + SECONDS
        while text not in self.screen:
            assert monotonic() < deadline, f"{text!r} is not on the screen:\n{self.screen}"
            if select.select([self._terminal], [], [], 0.1)[0]:
                self.raw += os.read(self._terminal, 65536)


@contextmanager
def person(folder: Path, **environment: str) -> Iterator[Person]:
    """A chat of 24 rows and 80 columns whose files are in `folder`."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    variables = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, **variables, **environment},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Person(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_person_asks_stops_saves_and_leaves(tmp_path: Path) -> None:
    with person(tmp_path) as someone:
        someone.sees("/help lists the commands")
        someone.types("クマですか？\r")
        someone.sees("はい、クマです。")
        someone.sees(" • 二つ")
        someone.sees("tokens/s · stop")
        someone.types("長い話を\r")
        someone.sees("3番目の文です")
        someone.types("\x03")
        someone.sees("tokens/s · aborted")
        assert "1999番目" not in someone.screen
        someone.types("/save 会話\r")
        someone.sees("Saved as 会話.")
        someone.types("/exit\r")
        someone.sees("the process went on")
        assert someone.process.wait(SECONDS) == 0
    saved = (tmp_path / "chats" / "会話.json").read_text(encoding="utf-8")
    assert "3番目の**文**です" in saved
    assert "1999番目" not in saved
    assert "クマですか？" in (tmp_path / "history").read_text(encoding="utf-8")


def test_the_signal_of_ctrl_c_stops_an_answer_too(tmp_path: Path) -> None:
    with person(tmp_path) as someone:
        someone.sees("/help lists the commands")
        for _ in range(2):
            someone.looks_anew()
            someone.types("長い話を\r")
            someone.sees("3番目の文です")
            someone.process.send_signal(signal.SIGINT)
            someone.sees("tokens/s · aborted")
        someone.types("abandoned")
        someone.sees("abandoned")
        someone.looks_anew()
        someone.process.send_signal(signal.SIGINT)
        someone.sees(">")
        someone.types("/exit\r")
        someone.sees("the process went on")


def test_no_color_is_honoured_and_japanese_is_spoken(tmp_path: Path) -> None:
    with person(tmp_path, NO_COLOR="1", LC_ALL="ja_JP.UTF-8", LANG="ja_JP.UTF-8") as someone:
        someone.sees("/help でコマンド一覧")
        someone.types("/nothing\r")
        someone.sees("does not exist")
        someone.types("クマ\r")
        someone.sees("トークン/秒 · 完了")
        assert _COLOURS.findall(someone.raw) == []
        someone.types("\x04")
        someone.sees("the process went on")
