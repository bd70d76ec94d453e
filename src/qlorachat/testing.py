"""For a plugin's own tests: a backend without a model, a byte tokenizer, contract checks."""

import threading
from collections.abc import Callable, Sequence
from time import sleep
from typing import TYPE_CHECKING, Any, Unpack

from pydantic import BaseModel

from qlorachat.chat import ChatEngine
from qlorachat.config import EngineConfig
from qlorachat.errors import EngineError, QueueFull
from qlorachat.hookspecs import hookimpl
from qlorachat.options import EngineOptions
from qlorachat.plugins import PluginHost, create_manager
from qlorachat.protocols import Backend, Frontend, ModelInfo
from qlorachat.tokens import FinishReason, SamplingParams, TokenEvent, TokenRequest

if TYPE_CHECKING:
    from qlorachat.adapters import Adapter

Answer = Callable[[TokenRequest, str], str]  # the request and its prompt's text -> the answer


class ByteTokenizer:
    """UTF-8 bytes as ids 0-255, then ChatML's control tokens."""

    bos_token: str | None = None
    eos_token: str | None = "<|im_end|>"  # noqa: S105  no password
    pad_token: str | None = None
    unk_token: str | None = None
    adds_bos = False
    control_tokens = {"<|im_start|>": 256, "<|im_end|>": 257}  # noqa: RUF012  never changed

    def encode(
        self, text: str, *, after: str | None = None, before: str | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """One id a byte; each byte covers the character that it belongs to."""
        pairs = [
            (byte, (index, index + 1))
            for index, character in enumerate(text)
            for byte in character.encode()
        ]
        return [byte for byte, _ in pairs], [span for _, span in pairs]

    def decode(self, ids: Sequence[int]) -> str:
        """The bytes as text, broken ones as U+FFFD, control tokens left out."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def echo(request: TokenRequest, prompt: str) -> str:
    """The last user turn of a ChatML prompt, as the byte tokenizer decodes it."""
    return prompt.rsplit("user\n", 1)[-1].removesuffix("\nassistant\n")


class FakeBackend:
    """A Backend whose answers come from a function; deterministic, and as fast as `delay` allows.

    `answer` gets the request and its prompt's text; `delay` is seconds a token.
    """

    def __init__(
        self,
        answer: Answer = echo,
        *,
        delay: float = 0.0,
        context_length: int = 4096,
        max_queue: int = 64,
        name: str = "fake",
    ) -> None:
        self.tokenizer = ByteTokenizer()
        self.info = ModelInfo(
            name=name,
            context_length=context_length,
            vocab_size=258,
            stop_ids=frozenset({257}),
            sampling=SamplingParams(temperature=0.0),
        )
        self._answer, self._delay, self._max_queue = answer, delay, max_queue
        self._lock = threading.Lock()
        self._running: dict[int, threading.Event] = {}
        self._failure: str | None = None
        self.loaded: set[str] = set()  # content hashes of the adapters

    @property
    def alive(self) -> bool:
        return self._failure is None

    @property
    def running(self) -> int:
        """How many requests have not ended."""
        with self._lock:
            return len(self._running)

    def submit(self, request: TokenRequest, sink: Callable[[TokenEvent], None]) -> None:
        stop = threading.Event()
        with self._lock:
            if self._failure:
                raise EngineError(self._failure)
            if len(self._running) >= self._max_queue:
                raise QueueFull(f"{self._max_queue} requests are waiting already; try again.")
            self._running[request.request_id] = stop
        threading.Thread(target=self._run, args=(request, sink, stop), daemon=True).start()

    def abort(self, request_id: int) -> None:
        with self._lock:
            if stop := self._running.get(request_id):
                stop.set()

    def load_adapter(self, adapter: "Adapter") -> None:
        self.loaded.add(adapter.sha256)

    def unload_adapter(self, sha256: str) -> None:
        self.loaded.discard(sha256)

    def close(self) -> None:
        self.fail("The engine is closed.")

    def fail(self, message: str) -> None:
        """Die as a real backend may: every request ends in an error, new ones are refused."""
        with self._lock:
            self._failure = message
            for stop in self._running.values():
                stop.set()

    def _run(
        self, request: TokenRequest, sink: Callable[[TokenEvent], None], stop: threading.Event
    ) -> None:
        try:
            text = self._answer(request, self.tokenizer.decode(request.prompt))
        except Exception as failure:  # a test's assertion, say: nobody may wait for more
            with self._lock:
                del self._running[request.request_id]
            wrong = EngineError(f"answer raised {failure!r}")
            self._send(sink, TokenEvent(request.request_id, error=wrong), stop)
            return
        ids = [*self.tokenizer.encode(text)[0], 257]
        last = min(len(ids), request.sampling.max_tokens) - 1
        for index, token_id in enumerate(ids[: last + 1]):
            if self._delay:
                sleep(self._delay)
            if stop.is_set():
                break
            finish = None
            if index == last:
                finish = FinishReason.STOP if token_id == 257 else FinishReason.LENGTH
            self._send(sink, _certain(request, index, token_id, finish), stop)
        with self._lock:
            del self._running[request.request_id]
        if stop.is_set():
            error = EngineError(self._failure) if self._failure else None
            finish = None if error else FinishReason.ABORTED
            self._send(sink, TokenEvent(request.request_id, finish=finish, error=error), stop)

    def _send(
        self, sink: Callable[[TokenEvent], None], event: TokenEvent, stop: threading.Event
    ) -> None:
        try:
            sink(event)
        except RuntimeError:  # its event loop is closed: nobody listens any more
            stop.set()


def _certain(
    request: TokenRequest, index: int, token_id: int, finish: FinishReason | None
) -> TokenEvent:
    """The event of one token, which was as good as certain to those who ask."""
    count, scored = request.sampling.logprobs, request.prompt_logprobs and index == 0
    return TokenEvent(
        request.request_id,
        token_id,
        finish,
        logprob=None if count is None else 0.0,
        top=((token_id, 0.0),) if count else (),
        prompt_logprobs=(0.0,) * (len(request.prompt) - 1) if scored else (),
    )


class FakePlugin:
    """Opens a given backend in place of a model; register it on a manager of your own."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @hookimpl
    def open_backend(self, config: EngineConfig) -> Backend:
        return self._backend


def fake_engine(
    backend: Backend | None = None,
    /,
    *,
    plugins: PluginHost | None = None,
    **options: Unpack[EngineOptions],
) -> ChatEngine:
    """A real ChatEngine on a FakeBackend, without any installed plugin unless a host is given."""
    host = plugins or create_manager(load=())
    host.register(FakePlugin(backend or FakeBackend()), "fake")
    options.setdefault("template", "chatml")
    return ChatEngine("fake", plugins=host, **options)


def check_frontend(
    frontend: Frontend[Any], options: BaseModel | None = None, *, seconds: float = 10.0
) -> None:
    """Assert that a frontend keeps the contract: named, prepared, served, and ended by `stop`."""
    assert frontend.name.isidentifier(), f"{frontend.name!r} is no word for --frontend"
    assert frontend.summary, "the frontend has no summary"
    assert issubclass(frontend.options, BaseModel), "options is not a pydantic model"
    chosen = options if options is not None else frontend.options()
    frontend.prepare(chosen)
    stop = threading.Event()
    failures: list[BaseException] = []

    def serve(engine: ChatEngine) -> None:
        try:
            frontend.serve(engine, chosen, stop)
        except BaseException as error:
            failures.append(error)

    with fake_engine() as engine:
        thread = threading.Thread(target=serve, args=(engine,), daemon=True)
        thread.start()
        thread.join(0.2)
        stop.set()
        thread.join(seconds)
        assert not thread.is_alive(), f"serve() did not end within {seconds} s of stop"
        assert not failures, f"serve() raised {failures[0]!r}"
        assert engine.alive, "serve() closed the engine, which belongs to the host"
