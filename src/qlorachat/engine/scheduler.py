"""What runs next, decided one step ahead of the device: first come, first served; nothing is lost.

Sequences that run are older than all that wait, and the oldest one is never preempted: so every
request ends.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any

from qlorachat.engine.batch import Batch, ScheduledRow
from qlorachat.engine.blocks import BlockPool
from qlorachat.engine.sequence import Sequence
from qlorachat.engine.slots import AdapterSlots
from qlorachat.errors import ContextOverflow, OutOfMemory, QlorachatError
from qlorachat.tokens import FinishReason, TokenEvent

# log-probability of the chosen token, and (token id, log-probability) of the likeliest ones
Logprobs = tuple[float, tuple[tuple[int, float], ...]]
NONE: Mapping[int, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one step may hold; a decoding sequence always finds its token in the budget."""

    max_sequences: int
    max_batch_tokens: int

    def __post_init__(self) -> None:
        assert 1 <= self.max_sequences <= self.max_batch_tokens


class Scheduler:
    """Plans batches and takes their tokens back; for the engine's thread only, `check` apart.

    At most one planned batch may be uncommitted when the next is planned: its tokens are then
    known to the device alone. Batches are committed in the order they were planned.
    """

    def __init__(self, limits: Limits, blocks: BlockPool, slots: AdapterSlots) -> None:
        self._limits = limits
        self._blocks = blocks
        self._slots = slots
        self._rows = list(range(limits.max_sequences - 1, -1, -1))  # free ones
        self._sequences: dict[int, Sequence] = {}  # request id -> one that has not ended
        self._waiting: deque[Sequence] = deque()  # oldest first, as below
        self._running: list[Sequence] = []
        self._uncommitted: list[Batch] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        """Whether every request has ended; else, with nothing uncommitted, there is a next step."""
        return not self._sequences

    def uses(self, sha256: str) -> bool:
        """Whether a request that has not ended names this adapter."""
        return any(each.request.adapter == sha256 for each in self._sequences.values())

    def check(self, sequence: Sequence) -> None:
        """ContextOverflow or OutOfMemory for a request that could never end by itself."""
        prompt, answer = len(sequence.request.prompt), sequence.request.sampling.max_tokens
        if prompt >= sequence.max_length:
            raise ContextOverflow(prompt, answer, sequence.max_length)
        last = sequence.max_length - 1  # the last token is never computed
        if self._blocks.blocks_for(last) > self._blocks.num_blocks:
            raise OutOfMemory(
                f"The prompt has {prompt} tokens and {answer} more were asked for, but the memory "
                f"holds {self._blocks.num_blocks * self._blocks.block_size}: shorten the messages, "
                "lower max_tokens, or give the engine more memory."
            )

    # What comes in

    def submit(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn; raises as `check`, and nothing is sent then."""
        self.check(sequence)
        assert sequence.request.request_id not in self._sequences
        assert sequence.request.adapter is None or self._slots.num_slots
        self._sequences[sequence.request.request_id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: int) -> None:
        """End a request now; unknown and ended ones are ignored."""
        if sequence := self._sequences.get(request_id):
            self._emit(sequence, TokenEvent(request_id, finish=FinishReason.ABORTED))

    def fail(self, batch: Batch, error: QlorachatError) -> None:
        """End the requests of an uncommitted batch that could not run; all others go on."""
        self._uncommitted.remove(batch)
        for row in batch.rows:
            self._fail(row.request.request_id, error)

    def fail_all(self, error: QlorachatError) -> None:
        """End every request; steps in flight may be committed or not."""
        for request_id in list(self._sequences):
            self._fail(request_id, error)

    # What runs

    def plan(self) -> Batch | None:
        """The next step to launch; None when nothing can run before the next commit."""
        assert len(self._uncommitted) <= 1
        decodes = tuple(self._decodes())
        prefills = tuple(self._prefills(self._limits.max_batch_tokens - len(decodes)))
        if not decodes and not prefills:
            return None
        batch = Batch(decodes, prefills)
        self._uncommitted.append(batch)
        return batch

    def _decodes(self) -> Iterator[ScheduledRow]:
        for sequence in self._running.copy():
            if sequence.can_decode and self._make_room(sequence):
                yield sequence.schedule(1)

    def _prefills(self, budget: int) -> Iterator[ScheduledRow]:
        started = [sequence for sequence in self._running if sequence.num_prefill_left]
        candidates = chain(started, self._admissions())
        while budget and (sequence := next(candidates, None)):
            row = sequence.schedule(min(budget, sequence.num_prefill_left))
            budget -= row.num_tokens
            yield row

    def _admissions(self) -> Iterator[Sequence]:
        while self._waiting and self._admit(self._waiting[0]):
            yield self._running[-1]

    def _admit(self, sequence: Sequence) -> bool:
        """Start the oldest waiting sequence, if there is a place for it."""
        # A preempted one waits for its token in flight; a twin for blocks that it can then share.
        waits = sequence.num_in_flight or self._blocks.is_coming(sequence)
        spare = len(self._running)  # blocks: whoever runs may need one soon
        if waits or not self._rows or not self._blocks.can_allocate(sequence, spare=spare):
            return False
        if (slot := self._slots.acquire(sequence.request.adapter)) is None:
            return False
        self._blocks.allocate(sequence)
        sequence.start(self._rows.pop(), slot)
        self._running.append(self._waiting.popleft())
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """A place for the next position, if need be the youngest's; False: it was the youngest."""
        while not self._blocks.can_append(sequence):
            if self._preempt() is sequence:
                return False
        self._blocks.append(sequence)
        return True

    def _preempt(self) -> Sequence:
        """Send the youngest running sequence back to wait; it will compute its tokens again."""
        youngest = self._running.pop()
        self._vacate(youngest)
        self._waiting.appendleft(youngest)
        return youngest

    def _vacate(self, sequence: Sequence) -> None:
        """Take back all that a running sequence holds."""
        self._blocks.deallocate(sequence)
        self._slots.release(sequence.request.adapter)
        self._rows.append(sequence.stop())

    # What comes back

    def commit(
        self,
        batch: Batch,
        tokens: Mapping[int, int],
        logprobs: Mapping[int, Logprobs] = NONE,
        prompt_logprobs: Mapping[int, Iterable[float]] = NONE,
    ) -> None:
        """Take the token of every sampling row, by row index, and hand it out."""
        assert batch is self._uncommitted[0]
        del self._uncommitted[0]
        for row in batch.rows:
            if sequence := self._sequences.get(row.request.request_id):  # else it ended meanwhile
                self._land(sequence, row)
                sequence.prompt_logprobs += prompt_logprobs.get(row.row, ())
                if row.sample:
                    self._take(sequence, tokens[row.row], logprobs.get(row.row))

    def _land(self, sequence: Sequence, row: ScheduledRow) -> None:
        """What was in flight is computed; if preempted meanwhile, its blocks are others' now."""
        sequence.land()
        if sequence.running:
            self._blocks.cache(sequence, row.start, row.end)

    def _take(self, sequence: Sequence, token: int, logprobs: Logprobs | None) -> None:
        finish = sequence.append(token)
        logprob, top = logprobs or (None, ())
        scores, sequence.prompt_logprobs = tuple(sequence.prompt_logprobs), []
        event = TokenEvent(
            sequence.request.request_id,
            token,
            finish,
            logprob=logprob,
            top=top,
            prompt_logprobs=scores,
        )
        self._emit(sequence, event)

    def _fail(self, request_id: int, error: QlorachatError) -> None:
        if sequence := self._sequences.get(request_id):
            self._emit(sequence, TokenEvent(request_id, error=error))

    def _emit(self, sequence: Sequence, event: TokenEvent) -> None:
        """Send an event; a sequence ends before its last one is out, or when nobody listens."""
        if event.finish is not None or event.error is not None:
            self._release(sequence)
        if not sequence.send(event):
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        if self._sequences.pop(sequence.request.request_id, None) is None:
            return
        if sequence.running:
            self._running.remove(sequence)
            self._vacate(sequence)
        else:
            self._waiting.remove(sequence)
