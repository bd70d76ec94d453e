"""The whole chat on a real engine with a fake model: keys in, answers and the next prompt out."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from time import monotonic, sleep

import pytest
from prompt_toolkit.input import PipeInput
from rich.console import Console

from qlorachat import ChatEngine
from qlorachat.testing import FakeBackend, fake_engine
from qlorachat.tokens import TokenRequest
from qlorachat_cli.plugin import CliFrontend, CliOptions
from qlorachat_cli.terminal import Terminal

CLEAR_LINE = "\x15"
SECONDS = 20.0


def said(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


class Model:
    """Answers with what `reply` says, and remembers every prompt."""

    def __init__(self, reply: Callable[[str], str] = lambda question: f"re: {question}") -> None:
        self.prompts: list[str] = []
        self._reply = reply

    def __call__(self, request: TokenRequest, prompt: str) -> str:
        self.prompts.append(prompt)
        return self._reply(prompt.rsplit("user\n", 1)[-1].removesuffix("\nassistant\n"))


class Chat:
    """A chat that runs on a thread while the test types and looks."""

    def __init__(self, engine: ChatEngine, terminal: Terminal, options: CliOptions) -> None:
        self.terminal = terminal
        self.stop = threading.Event()
        self._failures: list[BaseException] = []
        self._thread = threading.Thread(target=self._serve, args=(engine, options), daemon=True)

    def __enter__(self) -> "Chat":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.join()

    def join(self) -> None:
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        assert self._failures == []

    def sees(self, text: str, console: Console) -> None:
        """Wait until a console shows the text."""
        deadline = monotonic() + SECONDS
        while text not in said(console):
            assert monotonic() < deadline, f"{text!r} is not in {said(console)!r}"
            assert self._failures == []
            sleep(0.01)

    def _serve(self, engine: ChatEngine, options: CliOptions) -> None:
        frontend = CliFrontend(self.terminal)
        try:
            frontend.prepare(options)
            frontend.serve(engine, options, self.stop)
        except BaseException as error:
            self._failures.append(error)


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def engine(model: Model) -> Iterator[ChatEngine]:
    with fake_engine(FakeBackend(model)) as engine:
        yield engine


def talk(engine: ChatEngine, terminal: Terminal, options: CliOptions, *lines: str) -> None:
    """Type all the lines ahead, leave, and wait for the end."""
    keyboard = terminal.input
    assert isinstance(keyboard, PipeInput)
    keyboard.send_text("".join(f"{line}\r" for line in (*lines, "/exit")))
    frontend = CliFrontend(terminal)
    frontend.prepare(options)
    frontend.serve(engine, options, threading.Event())


def chatml(*turns: str) -> str:
    """The prompt of a dialog whose turns alternate, as the byte tokenizer shows ChatML."""
    roles = ("user\n", "assistant\n")
    lines = (f"{roles[index % 2]}{turn}\n" for index, turn in enumerate(turns))
    return "".join(lines) + "assistant\n"


def test_a_dialog(
    engine: ChatEngine, model: Model, terminal: Terminal, options: CliOptions
) -> None:
    talk(engine, terminal, options, "クマ", "", "  ", "//slash")
    assert said(terminal.answers) == "re: クマ\nre: /slash\n"
    assert model.prompts == [chatml("クマ"), chatml("クマ", "re: クマ", "/slash")]
    notices = said(terminal.notices)
    assert notices.startswith("qlorachat · fake · cpu\n/help lists the commands.")
    assert "tokens/s · stop" in notices
    assert said(terminal.errors) == ""


def test_commands_act_on_the_dialog(
    engine: ChatEngine, model: Model, terminal: Terminal, options: CliOptions
) -> None:
    talk(engine, terminal, options, "a", "/retry", "b", "/undo", "/edit", "x", "/svae", "c")
    a = chatml("a")
    assert model.prompts == [
        a,
        a,
        chatml("a", "re: a", "b"),
        chatml("ax"),
        chatml("ax", "re: ax", "c"),
    ]
    assert said(terminal.errors) == "The command `/svae` does not exist; did you mean `/save`?\n"


def test_settings_and_system_reach_the_model(
    engine: ChatEngine, model: Model, terminal: Terminal, options: CliOptions
) -> None:
    talk(engine, terminal, options, "/set max_tokens=5", "/system Be brief.", "long question")
    assert model.prompts == ["system\nBe brief.\n" + chatml("long question")]
    assert said(terminal.answers) == "re: l\n"
    assert "cut at max_tokens=5: /set max_tokens=10 and /retry" in said(terminal.notices)


def test_a_chat_goes_on_after_a_new_start(
    engine: ChatEngine, model: Model, terminal: Terminal, options: CliOptions
) -> None:
    talk(engine, terminal, options, "a", "/save 会話")
    talk(engine, terminal, options, "/load 会話", "b")
    assert model.prompts[-1] == chatml("a", "re: a", "b")


def test_many_lines(
    engine: ChatEngine, model: Model, terminal: Terminal, options: CliOptions
) -> None:
    talk(engine, terminal, options, "/multi", "a\rb\x1b", "/multi\x1b", "c\x1b\rd")
    assert model.prompts == [chatml("a\nb"), chatml("a\nb", "re: a\nb", "c\nd")]


def test_ctrl_c_stops_the_model_and_keeps_the_partial_answer(
    terminal: Terminal, options: CliOptions, keyboard: PipeInput
) -> None:
    model = Model(lambda question: "word " * 500 if question == "long" else "short")
    backend = FakeBackend(model, delay=0.01)
    with fake_engine(backend) as engine, Chat(engine, terminal, options) as chat:
        keyboard.send_text("long\r")
        chat.sees("word word", terminal.answers)
        keyboard.send_text("\x03")
        chat.sees("aborted", terminal.notices)
        partial = said(terminal.answers).rstrip("\n")
        keyboard.send_text("next\r")
        chat.sees("tokens/s · stop", terminal.notices)
        keyboard.send_text("\x03")
        chat.join()
    assert len(partial) < 500
    assert model.prompts[1] == chatml("long", partial, "next")
    assert backend.running == 0


def test_ctrl_c_before_the_first_word_gives_the_question_back(
    terminal: Terminal, options: CliOptions, keyboard: PipeInput
) -> None:
    release = threading.Event()
    model = Model(lambda question: "late" if release.wait(SECONDS) else "")
    with fake_engine(FakeBackend(model)) as engine, Chat(engine, terminal, options) as chat:
        keyboard.send_text("question\r")
        while not model.prompts:
            sleep(0.01)
        keyboard.send_text("\x03")
        chat.sees("Stopped before the first word", terminal.notices)
        release.set()
        keyboard.send_text(" again\r")
        chat.sees("late", terminal.answers)
    assert model.prompts == [chatml("question"), chatml("question again")]


def test_keys_typed_during_an_answer_wait_for_the_next_entry(
    terminal: Terminal, options: CliOptions, keyboard: PipeInput
) -> None:
    model = Model(lambda question: "word " * 20)
    engine = fake_engine(FakeBackend(model, delay=0.005))
    with engine, Chat(engine, terminal, options) as chat:
        keyboard.send_text("one\r")
        chat.sees("word", terminal.answers)
        keyboard.send_text("two\r/exit\r")
        chat.join()
    answer = "word " * 20
    assert model.prompts == [chatml("one"), chatml("one", answer, "two")]


def test_a_refused_question_leaves_the_dialog_and_comes_back(
    terminal: Terminal, options: CliOptions, keyboard: PipeInput, model: Model
) -> None:
    with fake_engine(FakeBackend(model, context_length=120)) as engine:
        talk(engine, terminal, options, "a", "x" * 200, f"{CLEAR_LINE}b")
    assert model.prompts == [chatml("a"), chatml("a", "re: a", "b")]
    errors = said(terminal.errors)
    assert "the context holds 120" in errors.replace("\n", " ")
    assert errors.count("\n") == 1


def test_a_failed_edit_is_edited_again(
    terminal: Terminal, options: CliOptions, keyboard: PipeInput, model: Model
) -> None:
    with fake_engine(FakeBackend(model, context_length=120)) as engine:
        talk(engine, terminal, options, "a", "/edit", "y" * 200, f"{CLEAR_LINE}c")
    assert model.prompts == [chatml("a"), chatml("c")]


def test_a_dying_engine_is_one_line_and_the_chat_goes_on(
    terminal: Terminal, options: CliOptions, keyboard: PipeInput
) -> None:
    backend = FakeBackend(Model(lambda question: "word " * 500), delay=0.01)
    with fake_engine(backend) as engine, Chat(engine, terminal, options) as chat:
        keyboard.send_text("a\r")
        chat.sees("word", terminal.answers)
        backend.fail("The graphics card fell out.")
        chat.sees("The graphics card fell out.\n", terminal.errors)
        keyboard.send_text(f"{CLEAR_LINE}/stats\r")
        chat.sees("model: fake", terminal.notices)


@pytest.mark.parametrize("keys", ["", "half a line", "question\r"])
def test_stop_ends_it_at_any_time(
    terminal: Terminal, options: CliOptions, keyboard: PipeInput, keys: str
) -> None:
    backend = FakeBackend(Model(lambda question: "word " * 500), delay=0.01)
    with fake_engine(backend) as engine:
        with Chat(engine, terminal, options) as chat:
            chat.sees("/help", terminal.notices)
            keyboard.send_text(keys)
            if keys.endswith("\r"):
                chat.sees("word", terminal.answers)
        assert engine.alive


def test_the_first_adapter_answers_until_another_choice(
    terminal: Terminal, options: CliOptions, adapter_folder: Path, model: Model
) -> None:
    backend = FakeBackend(model)
    shapes = {"model.layers.0.self_attn.q_proj": (8, 8)}
    backend.info = replace(backend.info, shapes=shapes)
    requests: list[str | None] = []

    def answer(request: TokenRequest, prompt: str) -> str:
        requests.append(request.adapter)
        return "ok"

    backend._answer = answer
    with fake_engine(backend, adapters={"zundamon": adapter_folder}) as engine:
        sha256 = engine.adapters["zundamon"].adapter.sha256
        talk(engine, terminal, options, "a", "/adapter", "b", "/adapter zundamon", "c")
    assert requests == [sha256, None, sha256]
    assert "adapters: zundamon" in said(terminal.notices)


def test_with_stdout_redirected_markdown_stays_as_it_is(
    terminal: Terminal, options: CliOptions
) -> None:
    terminal = replace(terminal, is_terminal=False)
    with fake_engine(FakeBackend(Model(lambda question: "**bold** `code`"))) as engine:
        talk(engine, terminal, options, "a")
    assert said(terminal.answers) == "**bold** `code`\n"


@pytest.mark.model
def test_a_real_model_answers(terminal: Terminal, options: CliOptions) -> None:
    with ChatEngine("smollm2") as engine:
        talk(engine, terminal, options, "What is the capital of France?")
    assert "Paris" in said(terminal.answers)
