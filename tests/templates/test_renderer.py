"""The child process: one for all renderings, ended at its limits, leaving nothing behind."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from qlorachat.errors import DialogError, EngineError
from qlorachat.templates.renderer import Renderer

DIALOG = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": " 日本 <b>\ud83d"},
    {"role": "assistant", "content": "x"},
]


def test_one_process_renders_again_and_again_and_ends_with_its_renderer() -> None:
    renderer = Renderer("{{ messages[0].content }}", {})
    for _ in range(3):
        renderer.render([DIALOG], add_generation_prompt=True)
        process = renderer._child._process if renderer._child else None
    assert process is not None
    assert renderer._child is not None
    assert renderer._child._process is process
    assert process.poll() is None
    del renderer
    gc.collect()
    assert process.poll() is not None


def test_a_process_that_died_between_two_renderings_is_started_again() -> None:
    renderer = Renderer("{{ messages[0].content }}", {})
    renderer.render([DIALOG], add_generation_prompt=True)
    assert renderer._child is not None
    renderer._child._process.kill()
    renderer._child._process.wait()
    assert renderer.render([DIALOG], add_generation_prompt=True) == [{"text": "s"}]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where tests were started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_waiting_leaves_no_stale_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    renderer = Renderer("{{ messages[0].content }}", {})
    renderer.render([DIALOG], add_generation_prompt=True)
    child = renderer._child
    assert child is not None
    with monkeypatch.context() as patch:
        patch.setattr(child, "_exchange", lambda line: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            renderer.render([DIALOG], add_generation_prompt=True)
    assert not child.alive
    assert renderer.render([DIALOG[1:]], add_generation_prompt=True) == [
        {"text": DIALOG[1]["content"]}
    ]


@pytest.mark.skipif(os.name == "nt", reason="Windows stops no process")
def test_a_machine_that_stalls_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer("{{ messages[0].content }}", {})
    renderer.render([DIALOG], add_generation_prompt=True)
    assert renderer._child is not None
    monkeypatch.setattr("qlorachat.templates.renderer.TIME_LIMIT", 0.5)
    process = renderer._child._process
    process.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(renderer.render, [DIALOG], add_generation_prompt=True)
        with pytest.raises(TimeoutError):
            answer.result(1)
        process.send_signal(signal.SIGCONT)
        assert answer.result(30) == [{"text": "s"}]


@pytest.mark.skipif(os.name == "nt", reason="Windows stops no process")
def test_a_process_that_never_answers_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer("{{ messages[0].content }}", {})
    renderer.render([DIALOG], add_generation_prompt=True)
    assert renderer._child is not None
    renderer._child._process.send_signal(signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr("qlorachat.templates.renderer.WAIT_LIMIT", 0.1)
        with pytest.raises(DialogError, match="took over 2 s"):
            renderer.render([DIALOG], add_generation_prompt=True)
    assert renderer.render([DIALOG], add_generation_prompt=True) == [{"text": "s"}]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit of address space")
def test_memory_is_limited_for_slow_growth_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlorachat.templates.renderer.TIME_LIMIT", 60.0)  # memory ends it
    source = (
        "{% set ns = namespace(a='ab') %}{% for i in range(40) %}{% set ns.a = ns.a ~ ns.a %}"
        "{% endfor %}{{ ns.a }}"
    )
    renderer = Renderer(source, {})
    (rendering,) = renderer.render([DIALOG], add_generation_prompt=True)
    assert rendering == {"failed": "MemoryError"}


def test_a_process_that_ends_itself_is_a_clear_error() -> None:
    renderer = Renderer("x", {})
    renderer.render([DIALOG], add_generation_prompt=True)
    assert renderer._child is not None
    stdin = renderer._child._process.stdin
    assert stdin is not None
    stdin.write(b"no JSON\n")  # it dies of this, while it gets the next request
    with pytest.raises(DialogError, match="ended its process"):
        renderer.render([DIALOG], add_generation_prompt=True)
    assert renderer.render([DIALOG], add_generation_prompt=True) == [{"text": "x"}]


def test_a_python_that_cannot_start_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "no-such-python")
    with pytest.raises(EngineError, match=r"could not start .*no-such-python"):
        Renderer("x", {}).render([DIALOG], add_generation_prompt=True)
