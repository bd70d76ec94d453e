"""A request under way: its tokens, and how far they are computed; knows nothing of its peers."""

import logging
from collections.abc import Callable

from qlorachat.engine.batch import ScheduledRow
from qlorachat.tokens import FinishReason, TokenEvent, TokenRequest

log = logging.getLogger(__name__)

Sink = Callable[[TokenEvent], None]


class Sequence:
    """The state of one request; it has a row while it runs, and none while it waits."""

    def __init__(self, request: TokenRequest, sink: Sink, context_length: int) -> None:
        """`context_length` is the most tokens that prompt and answer may have together."""
        assert request.prompt, "a prompt has at least one token"
        self.request = request
        self.sink = sink
        self.max_length = min(len(request.prompt) + request.sampling.max_tokens, context_length)
        self.tokens = list(request.prompt)  # append() adds the answer's
        self.block_keys: list[bytes] = []  # of full blocks of tokens; BlockPool writes
        self.block_table: list[int] = []  # BlockPool writes
        self.num_cached_tokens = 0  # found in the prefix cache by the last BlockPool.allocate
        self.prompt_logprobs: list[float] = []  # of the prompt's tokens computed so far
        self.row: int | None = None  # start() and stop() write
        self.slot = 0  # start() writes this and the two below
        self.num_prefill = 0  # tokens known at the start: later ones come from the device
        self.num_scheduled = 0  # positions computed or in flight; schedule() adds
        self.num_in_flight = 0  # steps not committed; schedule() adds, land() takes off

    @property
    def running(self) -> bool:
        return self.row is not None

    @property
    def num_prefill_left(self) -> int:
        return max(0, self.num_prefill - self.num_scheduled)

    @property
    def can_decode(self) -> bool:
        """Whether it runs, its prompt is scheduled, and the token in flight isn't its last."""
        prefilled = self.running and self.num_scheduled >= self.num_prefill
        return prefilled and self.num_scheduled + 1 < self.max_length

    def start(self, row: int, slot: int) -> None:
        """Begin after what the prefix cache holds."""
        self.row, self.slot = row, slot
        self.num_prefill, self.num_scheduled = len(self.tokens), self.num_cached_tokens
        self.prompt_logprobs = []

    def stop(self) -> int:
        """Give the row back; the tokens stay."""
        assert self.row is not None
        row, self.row = self.row, None
        return row

    def schedule(self, num_tokens: int) -> ScheduledRow:
        """The next positions of a running sequence, from now on in flight."""
        assert self.row is not None
        start, end = self.num_scheduled, self.num_scheduled + num_tokens
        self.num_scheduled = end
        self.num_in_flight += 1
        return ScheduledRow(
            request=self.request,
            row=self.row,
            slot=self.slot,
            start=start,
            tokens=tuple(self.tokens[start:end]) if start < self.num_prefill else None,
            block_table=tuple(self.block_table),
            sample=end >= self.num_prefill,
            history=tuple(self.tokens) if start == self.num_cached_tokens else (),
        )

    def land(self) -> None:
        """One step less in flight."""
        self.num_in_flight -= 1

    def append(self, token: int) -> FinishReason | None:
        """Take the answer's next token; why the answer ends with it, if it does."""
        self.tokens.append(token)
        if token in self.request.stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.max_length else None

    def send(self, event: TokenEvent) -> bool:
        """Hand an event out; False when its receiver is gone, which nobody else may suffer from."""
        try:
            self.sink(event)
        except Exception:
            log.warning("request %d has no receiver any more", self.request.request_id)
            return False
        return True
