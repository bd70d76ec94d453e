"""The command line: precedence of options, one line for a mistake, the answer alone on stdout."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread, Timer
from time import sleep
from typing import Any

import pytest
import torch
from pydantic import BaseModel, Field

from qlorachat import ChatEngine, EngineConfig, Frontend, hookimpl
from qlorachat.cli import chat as chat_command
from qlorachat.cli import look
from qlorachat.cli import serve as serve_command
from qlorachat.cli.main import COMMANDS, main
from qlorachat.cli.settings import EngineSettings, parse
from qlorachat.errors import ConfigError, UnknownName
from qlorachat.listening import listen
from qlorachat.plugins import PluginHost, create_manager
from qlorachat.testing import FakeBackend, FakePlugin
from tests.tiny import write_folder

Capture = pytest.CaptureFixture[str]


class PortOptions(BaseModel):
    """What the test frontend takes."""

    port: int = Field(7, description="the port to use")
    greeting: str = Field("hi", description="what to say")


class PortFrontend:
    """A frontend that records what it was served with, and leaves."""

    summary = "a frontend for tests"
    options = PortOptions

    def __init__(self, name: str = "alpha") -> None:
        self.name = name
        self.served: list[PortOptions] = []

    def prepare(self, options: PortOptions) -> None:
        if options.port > 1023:
            listen("127.0.0.1", options.port, protected=False, frontend=self.name).close()

    def serve(self, engine: ChatEngine, options: PortOptions, stop: Event) -> None:
        self.served.append(options)


class Plugin:
    """Registers the frontends given to it."""

    def __init__(self, *frontends: Frontend[Any]) -> None:
        self._frontends = frontends

    @hookimpl
    def register_frontends(self, register: Callable[[Frontend[Any]], None]) -> None:
        for frontend in self._frontends:
            register(frontend)


@pytest.fixture
def frontends() -> list[PortFrontend]:
    return [PortFrontend("alpha"), PortFrontend("beta")]


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, frontends: list[PortFrontend]) -> PluginHost:
    host = create_manager(load=())
    host.register(Plugin(*frontends), "test")
    host.register(FakePlugin(FakeBackend()), "fake")
    for module in (chat_command, serve_command, look):
        monkeypatch.setattr(module, "plugin_host", lambda: host)
    for variable in [name for name in os.environ if name.startswith("QLORACHAT_")]:
        if variable != "QLORACHAT_CACHE":
            monkeypatch.delenv(variable)
    return host


def piped(text: str, encoding: str = "utf-8") -> io.TextIOWrapper:
    """A stdin that holds the text in an encoding, and believes it is ASCII."""
    return io.TextIOWrapper(io.BytesIO(text.encode(encoding)), "ascii")


def settings(*arguments: str) -> EngineSettings:
    return parse(EngineSettings, arguments, command="test")


def test_flags_beat_the_environment_beats_the_file_beats_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "qlorachat.toml"
    file.write_text('device = "file"\nsystem = "file"\ntemplate = "file"\n')
    monkeypatch.setenv("QLORACHAT_DEVICE", "environment")
    monkeypatch.setenv("QLORACHAT_SYSTEM", "environment")
    chosen = settings("--config", str(file), "--device", "flag")
    assert (chosen.device, chosen.system, chosen.template) == ("flag", "environment", "file")
    assert chosen.max_queue == 64


def test_adapters_have_names_or_take_their_folders(tmp_path: Path) -> None:
    chosen = settings("--adapter", "a=some/path", "--adapter", "other/qlora-model/")
    adapters = chosen.engine_config().adapters
    assert adapters == {"a": "some/path", "qlora-model": "other/qlora-model/"}


@pytest.mark.parametrize(
    ("arguments", "adapters"),
    [
        ([""], {}),
        (["a=one,,b=two"], {"a": "one", "b": "two"}),
        (["/data/run=3/mine"], {"mine": "/data/run=3/mine"}),
        (["a=/data/run=3/mine"], {"a": "/data/run=3/mine"}),
    ],
)
def test_adapters_as_people_write_them(arguments: list[str], adapters: dict[str, str]) -> None:
    flags = [part for argument in arguments for part in ("--adapter", argument)]
    assert settings(*flags).engine_config().adapters == adapters


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs/a/out", "runs/b/out"], "`out`, runs/a/out and runs/b/out"),
        (["x=one", "x=two"], "`x`, one and two"),
        (["x="], "`x=` has no path"),
    ],
)
def test_no_adapter_takes_anothers_name(arguments: list[str], said: str) -> None:
    flags = [part for argument in arguments for part in ("--adapter", argument)]
    with pytest.raises(ConfigError) as caught:
        settings(*flags).engine_config()
    assert said in str(caught.value)


def test_adapters_of_the_file_come_before_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "qlorachat.toml"
    file.write_text('[adapters]\none = "first"\n')
    chosen = settings("--config", str(file), "--adapter", "two=second")
    assert list(chosen.engine_config().adapters) == ["one", "two"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devise", "cpu"], "did you mean `--device`"),
        (["--max-queue", "many"], "`max_queue`"),
        (["--tags", "maybe"], "`tags`"),
        (["--device"], "--device"),
        (["--config", "no-such-file.toml"], "no-such-file.toml"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(*arguments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("devise = 1\n", "did you mean `device`"),
        ("[[", "no TOML"),
        ("[alpa]\nport = 1\n", "`alpha`"),
    ],
)
def test_a_wrong_file_is_one_line(text: str, said: str, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "qlorachat.toml"
    file.write_text(text)
    assert main(["serve", "--frontend", "alpha", "--config", str(file)]) == 2
    assert said in capsys.readouterr().err


def test_an_unknown_environment_variable_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("QLORACHAT_DEVISE", "cpu")
    settings()
    assert "did you mean `QLORACHAT_DEVICE`" in capsys.readouterr().err


def test_a_frontends_variable_carries_its_name(
    frontends: list[PortFrontend], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("QLORACHAT_PORT", "8")
    assert main(["serve", "--frontend", "alpha"]) == 0
    assert frontends[0].served[0].port == 7
    said = "QLORACHAT_PORT means nothing here; did you mean `QLORACHAT_ALPHA_PORT`?"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "port"),
    [([], 7), (["--port", "8"], 8), (["--alpha-port", "9"], 9), (["--alpha-port=10"], 10)],
)
def test_one_frontends_options_are_plain_flags(
    flags: list[str], port: int, frontends: list[PortFrontend]
) -> None:
    assert main(["serve", "--frontend", "alpha", *flags]) == 0
    assert frontends[0].served[0].port == port


def test_several_frontends_carry_their_names(
    frontends: list[PortFrontend], monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    file = tmp_path / "qlorachat.toml"
    file.write_text('[alpha]\ngreeting = "file"\n[beta]\ngreeting = "file"\n')
    monkeypatch.setenv("QLORACHAT_BETA_GREETING", "environment")
    both = ["serve", "--frontend", "alpha", "--frontend", "beta", "--config", str(file)]
    assert main([*both, "--alpha-port", "1", "--beta-port", "2"]) == 0
    assert [(f.served[0].port, f.served[0].greeting) for f in frontends] == [
        (1, "file"),
        (2, "environment"),
    ]
    assert main([*both, "--port", "1"]) == 2
    assert "no option `--port`; did you mean `--beta-port`?\n" in capsys.readouterr().err


def test_the_file_may_hold_tables_of_frontends_that_are_not_served(
    frontends: list[PortFrontend], tmp_path: Path
) -> None:
    file = tmp_path / "qlorachat.toml"
    file.write_text("[beta]\nport = 1\n")
    assert main(["serve", "--frontend", "alpha", "--config", str(file)]) == 0


@pytest.mark.parametrize("where", ["file", "text", "environment", "flag"])
def test_the_file_and_the_environment_may_name_the_frontends(
    where: str, frontends: list[PortFrontend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {"file": '["alpha"]', "text": '"alpha"'}.get(where, '["beta"]')
    file = tmp_path / "qlorachat.toml"
    file.write_text(f"frontend = {named}\n[alpha]\nport = 1\n")
    if where == "environment":
        monkeypatch.setenv("QLORACHAT_FRONTEND", "alpha")
    flags = ["--frontend", "alpha"] if where == "flag" else []
    assert main(["serve", "--config", str(file), *flags]) == 0
    assert [len(frontend.served) for frontend in frontends] == [1, 0]
    assert frontends[0].served[0].port == 1


def test_a_file_that_names_no_frontend_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "qlorachat.toml"
    file.write_text("frontend = 3\n")
    assert main(["serve", "--config", str(file)]) == 2
    assert "`frontend` is 3" in capsys.readouterr().err


def test_a_frontends_help_comes_from_its_declaration(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as left:
        main(["serve", "--frontend", "alpha", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "--port" in text
    assert "the port to use" in text
    assert "alpha.port" not in text


def test_a_busy_port_is_found_before_the_model_loads(capsys: Capture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code = main(["serve", "--frontend", "alpha", "--model", "no/such", "--port", port])
    assert code == 4
    assert f"127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["chta"], 2, "did you mean `chat`"),
        (["serve"], 2, "--frontend alpha | beta"),
        (["serve", "--frontend"], 2, "--frontend: expected one argument"),
        (["serve", "--frontend", "alpha", "--config"], 2, "--config: expected one argument"),
        (["render", "--config"], 2, "--config: expected one argument"),
        (["serve", "--frontend", "gama"], 2, "pip install qlorachat-gama"),
        (["serve", "--frontend", "alpha", "--frontend", "alpha"], 2, "once"),
        (["chat", "hi", "--adapter", "no-such-folder"], 2, "no-such-folder"),
        (["chat", "hi", "--template", "lama2"], 2, "did you mean `llama2`"),
        (["check", "no-such-folder"], 2, "no-such-folder"),
        (["cache", "burn"], 2, "action"),
    ],
)
def test_mistakes_have_one_line_and_their_exit_code(
    arguments: list[str], code: int, said: str, capsys: Capture
) -> None:
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert captured.err.count("\n") == 1


def test_a_question_prints_the_answer_alone(capsys: Capture) -> None:
    assert main(["chat", "--template", "chatml", "クマ"]) == 0
    assert capsys.readouterr().out == "クマ\n"


def test_piped_input_prints_the_answer_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("sys.stdin", piped("line one\r\nline two\n"))
    assert main(["chat", "--template", "chatml"]) == 0
    assert capsys.readouterr().out == "line one\nline two\n"


def test_piped_input_is_utf8(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("sys.stdin", piped("クマ"))
    assert main(["chat", "--template", "chatml"]) == 0
    assert capsys.readouterr().out == "クマ\n"


@pytest.mark.parametrize("command", ["chat", "render"])
def test_input_in_no_known_encoding_is_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("sys.stdin", piped("クマ", "shift-jis"))
    assert main([command]) == 2
    assert capsys.readouterr().err == "qlorachat: stdin is no text in UTF-8: convert it first.\n"


def test_letters_that_stdout_lacks_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr("sys.stdout", stdout)
    assert main(["chat", "--template", "chatml", "é クマ"]) == 0
    assert stdout.buffer.getvalue() == "é ??\n".encode("latin-1")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        run = [sys.executable, "-m", "qlorachat", "--version"]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
        done = subprocess.run(
            run, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment
        )
    assert done.returncode == 1
    assert done.stderr == "qlorachat: [Errno 28] No space left on device\n"


def test_empty_input_is_a_mistake(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("sys.stdin", piped("\n"))
    assert main(["chat"]) == 2
    assert "no question" in capsys.readouterr().err


def test_sampling_flags_reach_the_engine(capsys: Capture) -> None:
    assert main(["chat", "--template", "chatml", "--max-tokens", "3", "abcdef"]) == 0
    assert capsys.readouterr().out == "abc\n"
    assert main(["chat", "--template", "chatml", "--temperature", "3", "hi"]) == 2


def test_plugins_lists_offers_and_json(capsys: Capture) -> None:
    assert main(["plugins"]) == 0
    assert "frontend alpha" in capsys.readouterr().out
    assert main(["plugins", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == {"builtin", "test", "fake"}


def test_help_and_version_answer_without_anything_heavy() -> None:
    script = (
        "import sys; from qlorachat.cli.main import main\n"
        f"main([{'%r'!s}])\n"
        "heavy = {'torch', 'gradio', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    for word in ("--help", "--version"):
        run = [sys.executable, "-c", script % word]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "qlorachat" in done.stdout


def test_the_help_names_every_command(capsys: Capture) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_a_broken_frontend_ends_the_others_and_is_said(
    frontends: list[PortFrontend], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(engine: ChatEngine, options: PortOptions, stop: Event) -> None:
        raise RuntimeError("out of luck")

    def wait(engine: ChatEngine, options: PortOptions, stop: Event) -> None:
        assert stop.wait(10)

    monkeypatch.setattr(frontends[0], "serve", wait)
    monkeypatch.setattr(frontends[1], "serve", fail)
    assert main(["serve", "--frontend", "alpha", "--frontend", "beta"]) == 1
    assert "out of luck" in capsys.readouterr().err


def test_what_the_system_refuses_a_frontend_is_one_line(
    frontends: list[PortFrontend], monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    def prepare(options: PortOptions) -> None:
        (tmp_path / "missing" / "file").touch()

    monkeypatch.setattr(frontends[0], "prepare", prepare)
    assert main(["serve", "--frontend", "alpha"]) == 1
    said = capsys.readouterr().err
    assert "No such file" in said
    assert said.count("\n") == 1


def test_what_a_frontend_finds_wrong_is_one_line(
    frontends: list[PortFrontend], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def refuse(engine: ChatEngine, options: PortOptions, stop: Event) -> None:
        raise UnknownName("adapter", "zundamon", engine.adapters)

    monkeypatch.setattr(frontends[0], "serve", refuse)
    assert main(["serve", "--frontend", "alpha"]) == 2
    said = capsys.readouterr().err
    assert said == "qlorachat: The adapter `zundamon` does not exist; none is known.\n"


def test_an_interrupt_while_the_model_loads_leaves_at_once(
    host: PluginHost, frontends: list[PortFrontend]
) -> None:
    class Loading:
        @hookimpl
        def open_backend(self, config: EngineConfig) -> None:
            signal.raise_signal(signal.SIGINT)

    host.register(Loading(), "loading")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # an earlier test's serve had its own
    assert main(["serve", "--frontend", "alpha"]) == 130
    assert not frontends[0].served


@pytest.mark.skipif(sys.platform == "win32", reason="a signal to this process is POSIX only")
def test_one_signal_ends_every_frontend(
    frontends: list[PortFrontend], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    def wait(engine: ChatEngine, options: PortOptions, stop: Event) -> None:
        assert stop.wait(10)
        ended.append(options.greeting)

    for frontend in frontends:
        monkeypatch.setattr(frontend, "serve", wait)
    before = signal.getsignal(signal.SIGTERM)
    timer = Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        assert main(["serve", "--frontend", "alpha", "--frontend", "beta"]) == 0
    finally:
        timer.join()
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert ended == ["hi", "hi"]


def test_a_frontend_may_take_its_time_to_end(
    frontends: list[PortFrontend], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    join = Thread.join

    def linger(engine: ChatEngine, options: PortOptions, stop: Event) -> None:
        assert stop.wait(10)
        sleep(0.2)
        ended.append(options.greeting)

    def join_briefly(thread: Thread, timeout: float | None = None) -> None:
        join(thread, timeout and 0.01)

    monkeypatch.setattr(frontends[1], "serve", linger)
    monkeypatch.setattr(Thread, "join", join_briefly)
    assert main(["serve", "--frontend", "alpha", "--frontend", "beta"]) == 0
    assert ended == ["hi"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "gpu"])
def test_tune_without_a_card_says_so(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--device", device]) in (2, 3)
    err = capsys.readouterr().err
    assert device in err or "CUDA" in err
    assert len(err.splitlines()) == 1


def test_tune_on_a_cpu_says_why_not_and_needs_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (write_folder(tmp_path, layers=1) / "model.safetensors").unlink()
    assert main(["tune", "--device", "cpu", "--model", str(tmp_path)]) == 2
    assert "nothing to tune on cpu: it is no NVIDIA card" in capsys.readouterr().err
