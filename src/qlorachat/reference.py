"""TransformersBackend: transformers, bitsandbytes and PEFT as they are, one generation at a time.

One thread owns the model: every forward pass and every change of adapters happens on it, since
PEFT's active adapter is state of the shared model. It serves any causal architecture, and is the
yardstick for faster engines.
"""

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from qlorachat.adapted import AdaptedModel
from qlorachat.adapters import Adapter
from qlorachat.errors import EngineError, OutOfMemory, QlorachatError, QueueFull
from qlorachat.opening import OpenedModel
from qlorachat.sampling import Sampler, likeliest, prompt_logprobs
from qlorachat.tokens import FinishReason, TokenEvent, TokenRequest

log = logging.getLogger(__name__)

PREFILL_CHUNK = 512  # tokens; between two chunks a request can be aborted

Sink = Callable[[TokenEvent], None]


@dataclass(slots=True, eq=False)
class _Job:
    """A request, waiting or under way."""

    request: TokenRequest
    sink: Sink
    aborted: bool = False  # set by abort()

    def send(self, event: TokenEvent) -> None:
        try:
            self.sink(event)
        except Exception:  # its receiver is gone; nobody else may suffer from that
            log.warning("request %d has no receiver any more", self.request.request_id)
            self.aborted = True

    def fail(self, error: QlorachatError) -> None:
        self.send(TokenEvent(self.request.request_id, error=error))


@dataclass(slots=True, eq=False)
class _Command:
    """A change of the model's adapters."""

    call: Callable[[], None]
    done: "Future[None]" = field(default_factory=Future)

    def run(self) -> None:
        try:
            self.call()
        except Exception as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)

    def fail(self, error: QlorachatError) -> None:
        self.done.set_exception(error)


class TransformersBackend:
    """The Backend over a transformers model; see protocols.Backend for its methods."""

    def __init__(self, opened: OpenedModel, *, max_queue: int = 64) -> None:
        """Serve an opened model; `max_queue` requests may wait."""
        self.tokenizer = opened.tokenizer
        self.info = opened.info
        self._model = AdaptedModel(opened.model)
        self._max_queue = max_queue
        self._wake = threading.Condition()  # guards the five below
        self._queue: deque[_Job | _Command] = deque()
        self._jobs: dict[int, _Job] = {}  # waiting or under way
        self._current: _Job | None = None
        self._wanted: set[str] = set()  # adapters, by content hash
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="qlorachat-model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._failure is None

    def submit(self, request: TokenRequest, sink: Sink) -> None:
        job = _Job(request, sink)
        with self._wake:
            self._refuse_if_dead()
            if len(self._jobs) - (self._current is not None) >= self._max_queue:
                raise QueueFull(f"{self._max_queue} requests are waiting already; try again later.")
            self._jobs[request.request_id] = job
            self._queue.append(job)
            self._wake.notify()

    def abort(self, request_id: int) -> None:
        with self._wake:
            if (job := self._jobs.get(request_id)) is None:
                return
            if job is self._current:
                job.aborted = True
                return
            self._queue.remove(job)  # its place is another's
            del self._jobs[request_id]
        job.send(self._aborted(job.request))

    def load_adapter(self, adapter: Adapter) -> None:
        command = _Command(lambda: self._model.attach(adapter))
        with self._wake:
            self._wanted.add(adapter.sha256)
            self._enqueue(command, self._queue.appendleft)  # before what waits, after what runs
        command.done.result()

    def unload_adapter(self, sha256: str) -> None:
        command = _Command(lambda: self._detach_unwanted(sha256))
        with self._wake:
            self._wanted.discard(sha256)
            self._enqueue(command, self._queue.append)  # after every request that may use it
        command.done.result()

    def close(self) -> None:
        self._die("The engine is closed.")
        self._thread.join()
        vars(self).pop("_model", None)
        torch.cuda.empty_cache()

    def _enqueue(self, command: _Command, put: Callable[[_Command], None]) -> None:
        """By who holds `_wake`."""
        self._refuse_if_dead()
        put(command)
        self._wake.notify()

    def _refuse_if_dead(self) -> None:
        if self._failure is not None:
            raise EngineError(self._failure)

    def _die(self, failure: str) -> None:
        """End all that waits with an error; the generation under way ends at its next token."""
        with self._wake:
            self._failure = self._failure or failure
            waiting, self._queue = self._queue, deque()
            for work in waiting:
                if isinstance(work, _Job):
                    del self._jobs[work.request.request_id]
                work.fail(EngineError(self._failure))
            self._wake.notify()

    # On the model's thread

    def _run(self) -> None:
        try:
            while (work := self._next()) is not None:
                if isinstance(work, _Command):
                    work.run()
                else:
                    self._generate(work)
        except BaseException as error:
            log.exception("the model's thread died")
            self._die(f"The engine died of {type(error).__name__}: {error}. Start it again.")
            if self._current is not None:
                self._current.fail(EngineError(self._failure))

    def _next(self) -> _Job | _Command | None:
        """The next piece of work, once there is one; None once the backend is closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._queue or self._failure)
            if self._failure:
                return None
            work = self._queue.popleft()
            self._current = work if isinstance(work, _Job) else None
            return work

    def _generate(self, job: _Job) -> None:
        request = job.request
        try:
            with torch.inference_mode():
                self._model.activate(request.adapter, request.adapter_scale)
                for event in self._events(job):
                    job.send(event)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            job.fail(
                OutOfMemory(
                    f"Out of memory on {self.info.device} after a prompt of "
                    f"{len(request.prompt)} tokens: shorten the dialog or lower max_tokens."
                )
            )
        except EngineError as error:
            job.fail(error)
        with self._wake:
            del self._jobs[request.request_id]
            self._current = None

    def _events(self, job: _Job) -> Iterator[TokenEvent]:
        """Every event of a generation, one forward pass before each but the first."""
        request = job.request
        prompt = torch.tensor([request.prompt], device=self._model.device)
        sampler = Sampler(request.sampling, prompt)
        cache = DynamicCache(config=self._model.config)
        scores: list[float] = []
        every = request.prompt_logprobs
        for chunk in prompt.split(PREFILL_CHUNK, dim=1):
            if self._stopping(job):
                yield self._aborted(request)
                return
            logits = self._model.logits(chunk, cache, every=every)
            following = prompt[0, cache.get_seq_length() - chunk.shape[1] + 1 :][: chunk.shape[1]]
            if every and len(following):
                scores += prompt_logprobs(logits[: len(following)], following)
            logits = logits[-1:]
        for count in itertools.count(1):
            token = sampler(logits)
            event = _event(request, token, count, logits, scores if count == 1 else ())
            yield event
            if event.finish is not None:
                return
            if self._stopping(job):
                yield self._aborted(request)
                return
            logits = self._model.logits(prompt.new_tensor([[token]]), cache)

    def _detach_unwanted(self, sha256: str) -> None:
        if sha256 not in self._wanted:  # else it was loaded again meanwhile
            self._model.detach(sha256)

    def _stopping(self, job: _Job) -> bool:
        return job.aborted or self._failure is not None

    def _aborted(self, request: TokenRequest) -> TokenEvent:
        if self._failure is not None:
            return TokenEvent(request.request_id, error=EngineError(self._failure))
        return TokenEvent(request.request_id, finish=FinishReason.ABORTED)


def _event(
    request: TokenRequest, token: int, count: int, logits: torch.Tensor, scores: Sequence[float]
) -> TokenEvent:
    """The event of the `count`-th token of an answer; an end-of-turn token beats max_tokens."""
    finish = None
    if token in request.stop_ids:
        finish = FinishReason.STOP
    elif count == request.sampling.max_tokens:
        finish = FinishReason.LENGTH
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    if request.sampling.logprobs is not None:
        logprob, top = likeliest(logits, token, request.sampling.logprobs)
    return TokenEvent(
        request.request_id, token, finish, logprob=logprob, top=top, prompt_logprobs=tuple(scores)
    )
