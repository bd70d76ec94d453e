"""The engine's loop around scheduler and fake device, and the clients that check its answers."""

from qlorachat.engine.batch import Batch
from qlorachat.engine.blocks import BlockPool
from qlorachat.engine.scheduler import Limits, Scheduler
from qlorachat.engine.sequence import Sequence
from qlorachat.engine.slots import AdapterSlots
from qlorachat.tokens import FinishReason, TokenEvent, TokenRequest
from tests.engine.device import Device, text

CONTEXT = 40  # tokens


class Client:
    """Who asked: collects events and knows what the answer must be."""

    def __init__(self, request: TokenRequest, leaves_after: int | None = None) -> None:
        self.request = request
        self.events: list[TokenEvent] = []
        self._leaves_after = leaves_after
        prompt, sampling = len(request.prompt), request.sampling
        whole = text(request, min(prompt + sampling.max_tokens, CONTEXT))[prompt:]
        stops = (place for place, token in enumerate(whole, 1) if token in request.stop_ids)
        end = next(stops, None)
        self.expected = list(whole[:end])
        self.expected_finish = FinishReason.LENGTH if end is None else FinishReason.STOP

    def __call__(self, event: TokenEvent) -> None:
        self.events.append(event)
        if self.left:
            raise ConnectionError("the client is gone")

    @property
    def left(self) -> bool:
        return self._leaves_after is not None and len(self.events) >= self._leaves_after

    @property
    def most_steps(self) -> int:
        """To its end once it is the oldest: a token a step, and the steps in flight around them."""
        return len(self.request.prompt) + self.request.sampling.max_tokens + 4

    @property
    def tokens(self) -> list[int]:
        return [event.token_id for event in self.events if event.token_id is not None]

    @property
    def ended(self) -> bool:
        return self.left or any(event.finish or event.error for event in self.events)

    def check(self) -> None:
        """Tokens as expected, in order; one end, last, and for the right reason."""
        assert self.tokens == self.expected[: len(self.tokens)]
        assert not any(event.finish or event.error for event in self.events[:-1])
        for event in self.events[-1:]:
            if event.token_id is None:
                assert event.error or event.finish is FinishReason.ABORTED
            elif self.tokens == self.expected:
                assert event.finish is self.expected_finish
            else:
                assert event.finish is None


class Engine:
    """Scheduler and device as the engine's loop joins them, every move at hand."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_sequences: int = 4,
        max_batch_tokens: int = 64,
        num_slots: int = 2,
        prefix_caching: bool = True,
    ) -> None:
        self.blocks = BlockPool(num_blocks, block_size, prefix_caching=prefix_caching)
        self.slots = AdapterSlots(num_slots)
        limits = Limits(max_sequences, max_batch_tokens)
        self.scheduler = Scheduler(limits, self.blocks, self.slots)
        self.device = Device(block_size)
        self.in_flight: list[tuple[Batch, dict[int, int]]] = []
        self.batches: list[Batch] = []

    def submit(self, client: Client) -> Client:
        self.scheduler.submit(Sequence(client.request, client, CONTEXT))
        return client

    def launch(self) -> Batch | None:
        batch = self.scheduler.plan()
        assert batch is not None or self.in_flight or self.scheduler.idle, "the loop would spin"
        if batch is not None:
            self.in_flight.append((batch, self.device.launch(batch)))
            self.batches.append(batch)
        return batch

    def commit(self) -> None:
        self.scheduler.commit(*self.in_flight.pop(0))

    def step(self) -> None:
        """One turn of the loop: launch the next batch, then take the tokens of the one before."""
        waiting = len(self.in_flight)
        if waiting < 2:
            self.launch()
        if waiting:
            self.commit()

    def run(self, limit: int = 200) -> None:
        """Until nothing is left to do."""
        for _ in range(limit):
            self.step()
            if not self.in_flight and self.launch() is None:
                return
        raise AssertionError("the engine does not come to rest")
