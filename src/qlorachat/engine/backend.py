"""PagedBackend: many requests and many adapters at once on one model; one thread owns them all."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue

import torch

from qlorachat.adapters import Adapter
from qlorachat.config import CacheChoice
from qlorachat.engine.batch import Batch
from qlorachat.engine.blocks import BlockPool
from qlorachat.engine.memory import MemoryPlan, plan_memory
from qlorachat.engine.runner import Launched, Runner
from qlorachat.engine.scheduler import Limits, Scheduler
from qlorachat.engine.sequence import Sequence, Sink
from qlorachat.engine.slots import AdapterSlots
from qlorachat.errors import AdapterError, EngineError, OutOfMemory, QueueFull
from qlorachat.kernels.eight_bits import INT8
from qlorachat.model import KVCache, PagedLlama
from qlorachat.model.lora import AdapterStacks
from qlorachat.opening import OpenedModel
from qlorachat.tokens import TokenRequest

log = logging.getLogger(__name__)

BLOCK_SIZE = 16  # tokens
BATCH_TOKENS = {"cpu": 256, "cuda": 8192}  # of one step: decode rows and chunks of prompts
CONTEXTS = {"cpu": 8, "cuda": 256}  # whole contexts that the cache holds, if memory allows

Command = Callable[[], None]


class PagedBackend:
    """The Backend for Llama-style models; see protocols.Backend for its methods."""

    def __init__(
        self,
        opened: OpenedModel,
        *,
        max_queue: int = 64,
        max_sequences: int = 64,
        max_adapters: int = 8,
        adapter_rank: int = 16,
        adapters_expected: int = 0,
        memory: str | None = None,
        kv_cache: CacheChoice = "auto",
        prefix_caching: bool = True,
    ) -> None:
        """Serve an opened model; its weights are taken over.

        At most `max_sequences` requests run at once and `max_queue` wait. The memory beside the
        weights and `adapters_expected` adapters of `adapter_rank` becomes KV cache; `memory` (such
        as 12GiB or 0.8) bounds the whole. `kv_cache`: int8 for keys and values in 8 bits.
        """
        self.tokenizer, self.info = opened.tokenizer, opened.info
        device, config = opened.model.device, opened.model.config
        adapters = AdapterStacks(
            config.num_hidden_layers, self.info.shapes, dtype=opened.model.dtype, device=device
        )
        reserved = adapters.bytes_of(max(1, adapters_expected), adapter_rank)
        model = PagedLlama(opened.model, adapters, INT8 if kv_cache == "int8" else None)
        self.plan = _plan(model, self.info.context_length, reserved, self.info.memory_bytes, memory)
        log.info("%s", self.plan)
        cache = KVCache(
            layers=config.num_hidden_layers,
            blocks=self.plan.blocks,
            block_size=BLOCK_SIZE,
            kv_heads=config.num_key_value_heads,
            head_dim=model.head_dim,
            dtype=model.cached,
            device=device,
        )
        self._slots = AdapterSlots(max_adapters)
        blocks = BlockPool(
            self.plan.blocks,
            BLOCK_SIZE,
            base=f"{self.info.name} {self.info.quantization}",
            prefix_caching=prefix_caching,
        )
        limits = Limits(max_sequences, max(max_sequences, BATCH_TOKENS[device.type]))
        self._scheduler = Scheduler(limits, blocks, self._slots)
        self._runner = Runner(
            model,
            cache,
            rows=max_sequences,
            blocks_per_sequence=-(-self.info.context_length // BLOCK_SIZE),
        )
        self._overlap = device.type == "cuda"  # a CPU has nothing to run meanwhile
        self._pending: Launched | None = None
        self._unloading: list[tuple[str, Future[None]]] = []
        self._max_sequences, self._max_queue = max_sequences, max_queue
        self._received = 0  # of the arriving ones, those that the next plan sees
        self._inbox: SimpleQueue[Command] = SimpleQueue()
        self._lock = threading.Lock()  # guards the five below
        self._loaded: set[str] = set()
        self._arriving = 0  # submitted, and not yet planned with
        self._left_waiting = 0  # after the last plan
        self._places = max_sequences  # that it left to those who arrive
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="qlorachat-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._failure is None

    def submit(self, request: TokenRequest, sink: Sink) -> None:
        sequence = Sequence(request, sink, self.info.context_length)
        self._scheduler.check(sequence)
        with self._lock:
            self._refuse_if_dead()
            if request.adapter is not None and request.adapter not in self._loaded:
                raise EngineError(f"The adapter {request.adapter[:12]} is not loaded.")
            if self._left_waiting + max(0, self._arriving - self._places) >= self._max_queue:
                raise QueueFull(f"{self._max_queue} requests are waiting already; try again later.")
            self._arriving += 1
            self._inbox.put(lambda: self._receive(sequence))

    def abort(self, request_id: int) -> None:
        self._inbox.put(lambda: self._scheduler.abort(request_id))

    def load_adapter(self, adapter: Adapter) -> None:
        if reason := unservable(adapter):
            raise AdapterError(
                f"{adapter.path}: {reason}, which the fast engine can't serve; start with "
                "--backend transformers (in code, backend='transformers')."
            )
        done: Future[None] = Future()
        self._command(lambda: self._load(adapter, done))
        done.result()

    def unload_adapter(self, sha256: str) -> None:
        done: Future[None] = Future()
        with self._lock:
            self._loaded.discard(sha256)  # what comes from now on is refused
        self._command(lambda: self._unloading.append((sha256, done)))
        done.result()

    def close(self) -> None:
        self._die("The engine is closed.")
        self._inbox.put(lambda: None)  # wake the thread
        self._thread.join()
        self._pending = None
        vars(self).pop("_runner", None)  # with it go the model and the cache
        torch.cuda.empty_cache()

    def _command(self, command: Command) -> None:
        with self._lock:
            self._refuse_if_dead()
            self._inbox.put(command)

    def _refuse_if_dead(self) -> None:
        if self._failure is not None:
            raise EngineError(self._failure)

    def _die(self, failure: str) -> None:
        with self._lock:
            self._failure = self._failure or failure

    # On the engine's thread

    def _run(self) -> None:
        try:
            self._runner.use_device()
            while self._failure is None:
                self._read_inbox(wait=self._pending is None and self._scheduler.idle)
                self.step()
        except BaseException as error:
            log.exception("the engine's thread died")
            self._die(f"The engine died of {type(error).__name__}: {error}. Start it again.")
        self._tell_everyone()

    def step(self) -> None:
        """Plan and launch one step, then hand out the tokens of the one before it."""
        batch = self._scheduler.plan()
        self._count()
        launched = self._launch(batch) if batch else None
        if not self._overlap:
            self._pending, launched = launched, None
        if (done := self._pending) is not None:
            reports = done.logprobs(), done.prompt_logprobs()
            self._scheduler.commit(done.batch, done.tokens(), *reports)
        self._pending = launched
        self._unload_unused()

    def _launch(self, batch: Batch) -> Launched | None:
        try:
            return self._runner.launch(batch)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self._scheduler.fail(
                batch,
                OutOfMemory(
                    f"Out of memory on {self.info.device}: shorten the dialog, or start with less "
                    "--memory for the cache."
                ),
            )
            return None

    def _read_inbox(self, *, wait: bool) -> None:
        """Do what callers asked for; with nothing else to do, wait for the first of them."""
        if wait:
            self._inbox.get()()
        while True:
            try:
                self._inbox.get_nowait()()
            except Empty:
                return

    def _receive(self, sequence: Sequence) -> None:
        self._received += 1
        self._scheduler.submit(sequence)

    def _count(self) -> None:
        """What a plan has left, for those who ask for a place."""
        waiting, running = self._scheduler.num_waiting, self._scheduler.num_running
        with self._lock:
            self._arriving -= self._received
            self._left_waiting = waiting
            self._places = 0 if waiting else self._max_sequences - running
        self._received = 0

    def _load(self, adapter: Adapter, done: "Future[None]") -> None:
        self._runner.adapters[adapter.sha256] = adapter
        with self._lock:
            self._loaded.add(adapter.sha256)
        done.set_result(None)

    def _unload_unused(self) -> None:
        """Let adapters go that are to be unloaded and that no request needs any more."""
        for sha256, done in self._unloading.copy():
            if not self._scheduler.uses(sha256):
                if sha256 not in self._loaded:  # else it was loaded again meanwhile
                    self._slots.forget(sha256)
                    self._runner.forget(sha256)
                self._unloading.remove((sha256, done))
                done.set_result(None)

    def _tell_everyone(self) -> None:
        """The end: every request and every caller that waits gets the reason."""
        error = EngineError(self._failure)
        while not self._inbox.empty():
            self._inbox.get()()
        self._scheduler.fail_all(error)
        for _, done in self._unloading:
            done.set_exception(error)


def _plan(
    model: PagedLlama, context_length: int, adapters: int, weights: int, memory: str | None
) -> MemoryPlan:
    per_token = KVCache.bytes_per_token(
        layers=model.config.num_hidden_layers,
        kv_heads=model.config.num_key_value_heads,
        head_dim=model.head_dim,
        dtype=model.cached,
    )
    return plan_memory(
        device=model.device,
        weights=weights,
        adapters=adapters,
        block_bytes=per_token * BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        wanted_tokens=CONTEXTS[model.device.type] * context_length,
        memory=memory,
    )


def unservable(adapter: Adapter) -> str | None:
    """Why this backend can't serve an adapter, in a few words; None when it can."""
    if adapter.settings.use_dora:
        return "it uses DoRA"
    if adapter.settings.modules_to_save:
        return "it replaces whole modules (modules_to_save)"
    if others := [m for m in adapter.settings.target_modules if not m.startswith("model.layers.")]:
        return f"it changes {others[0]}"
    return None
