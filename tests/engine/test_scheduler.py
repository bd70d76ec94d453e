"""The scheduler against a fake model: whatever happens, each request gets its own tokens, once."""

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from qlorachat.errors import ContextOverflow, EngineError, OutOfMemory
from qlorachat.tokens import FinishReason, SamplingParams, TokenRequest
from tests.engine.device import VOCABULARY, states
from tests.engine.harness import CONTEXT, Client, Engine

PROMPT = (1, 2, 3, 4, 5, 6, 0, 1, 2, 3)
_ids = itertools.count()


def ask(
    prompt: tuple[int, ...] = PROMPT,
    max_tokens: int = 6,
    stop_ids: frozenset[int] = frozenset(),
    adapter: str | None = None,
    leaves_after: int | None = None,
) -> Client:
    sampling = SamplingParams(max_tokens=max_tokens)
    request = TokenRequest(next(_ids), prompt, sampling, stop_ids, adapter)
    return Client(request, leaves_after)


def check_complete(*clients: Client) -> None:
    for client in clients:
        client.check()
        assert client.tokens == client.expected


def check_empty(engine: Engine) -> None:
    """Nothing is held any more: blocks, slots, rows."""
    scheduler, blocks, slots = engine.scheduler, engine.blocks, engine.slots
    assert scheduler.idle
    assert not scheduler.num_running
    assert not scheduler.num_waiting
    assert blocks.num_free == blocks.num_blocks
    assert not any(blocks._users)
    assert not any(slots._users.values())
    assert sorted(scheduler._rows) == list(range(scheduler._limits.max_sequences))


def test_the_next_step_is_planned_before_the_tokens_are_known() -> None:
    engine = Engine()
    client = engine.submit(ask(max_tokens=3))
    first, second = engine.launch(), engine.launch()
    assert first is not None
    assert second is not None
    assert [row.tokens for row in first.rows] == [PROMPT]
    assert [(row.tokens, row.start) for row in second.decodes] == [(None, len(PROMPT))]
    assert client.events == []
    engine.commit()
    assert client.tokens == client.expected[:1]
    engine.run()
    check_complete(client)
    check_empty(engine)


def test_no_step_is_planned_beyond_max_tokens_or_the_context() -> None:
    for prompt, max_tokens in ((PROMPT, 4), (PROMPT, 1), (PROMPT * 3 + PROMPT[:8], 9)):
        engine = Engine()
        client = engine.submit(ask(prompt, max_tokens))
        engine.run()
        check_complete(client)
        assert client.events[-1].finish is FinishReason.LENGTH
        assert len(engine.batches) == len(client.tokens)


def test_a_stop_id_ends_the_answer_and_the_step_in_flight_is_ignored() -> None:
    stop = Client(ask().request).expected[2]
    engine = Engine()
    client = engine.submit(ask(stop_ids=frozenset({stop})))
    engine.run()
    check_complete(client)
    assert client.events[-1].finish is FinishReason.STOP
    assert len(engine.batches) == len(client.tokens) + 1
    check_empty(engine)


def test_a_stop_id_on_the_last_allowed_token_is_a_stop() -> None:
    answer = Client(ask().request).expected
    last = next(place for place, token in enumerate(answer) if token not in answer[:place])
    engine = Engine()
    client = engine.submit(ask(max_tokens=last + 1, stop_ids=frozenset({answer[last]})))
    engine.run()
    assert client.events[-1].finish is FinishReason.STOP


def test_decodes_come_first_and_prompts_fill_the_budget_in_chunks() -> None:
    engine = Engine(max_batch_tokens=6)
    first = engine.submit(ask(max_tokens=8))
    engine.step()
    engine.step()
    second = engine.submit(ask(PROMPT[::-1], max_tokens=2))
    engine.run()
    check_complete(first, second)
    shapes = [
        (len(batch.decodes), [(row.num_tokens, row.sample) for row in batch.prefills])
        for batch in engine.batches
    ]
    assert shapes[:5] == [
        (0, [(6, False)]),
        (0, [(4, True)]),
        (1, [(5, False)]),
        (1, [(5, True)]),
        (2, []),
    ]


def test_a_second_turn_computes_only_what_is_new() -> None:
    engine = Engine()
    first = engine.submit(ask(max_tokens=7))
    engine.run()
    dialog = PROMPT + tuple(first.tokens) + (1, 2)
    second = engine.submit(ask(dialog))
    engine.run()
    check_complete(first, second)
    (chunk,) = [row for batch in engine.batches for row in batch.prefills if row.start]
    assert chunk.start == 16  # 10 + 7 tokens, the last one not computed: four full blocks
    assert chunk.history == dialog


def test_a_prompt_that_is_cached_whole_computes_its_last_token() -> None:
    engine = Engine()
    for _ in range(2):
        client = engine.submit(ask(PROMPT[:8]))
        engine.run()
        check_complete(client)
    assert [row.start for batch in engine.batches for row in batch.prefills] == [0, 4]


def test_nothing_is_reused_across_adapters_strengths_or_with_the_cache_off() -> None:
    sampling = SamplingParams(max_tokens=2)
    kinds = [(None, 1.0), ("a", 1.0), ("a", 0.5), ("b", 1.0)]
    for prefix_caching in (True, False):
        engine = Engine(prefix_caching=prefix_caching)
        for adapter, scale in kinds * 2:
            request = TokenRequest(next(_ids), PROMPT, sampling, frozenset(), adapter, scale)
            check = engine.submit(Client(request))
            engine.run()
            check_complete(check)
        starts = [row.start for batch in engine.batches for row in batch.prefills]
        assert starts == [0] * 4 + [8 if prefix_caching else 0] * 4


def test_the_youngest_gives_way_and_loses_nothing() -> None:
    engine = Engine(num_blocks=8, block_size=2)
    old = engine.submit(ask(PROMPT[:4], max_tokens=12))
    young = engine.submit(ask(PROMPT[:3], max_tokens=10))
    engine.run()
    check_complete(old, young)
    restarts = [row for batch in engine.batches for row in batch.prefills if row.history]
    assert [row.request for row in restarts] == [old.request, young.request, young.request]
    assert len(restarts[-1].history) > len(young.request.prompt)
    assert old.events[-1].time < young.events[-1].time
    check_empty(engine)


def test_logprobs_pass_through() -> None:
    engine = Engine()
    client = engine.submit(ask(max_tokens=1))
    assert engine.launch()
    batch, tokens = engine.in_flight.pop()
    logprobs = {row: (-0.5, ((token, -0.5), (0, -2.0))) for row, token in tokens.items()}
    engine.scheduler.commit(batch, tokens, logprobs)
    (event,) = client.events
    assert event.logprob == -0.5
    assert event.top == ((event.token_id, -0.5), (0, -2.0))


def test_what_can_never_end_is_refused_with_numbers() -> None:
    engine = Engine(num_blocks=4, block_size=4)
    engine.submit(ask(max_tokens=7))  # its last token needs no place
    with pytest.raises(OutOfMemory, match=r"10 tokens and 8 more .* the memory holds 16"):
        engine.submit(ask(max_tokens=8))
    with pytest.raises(ContextOverflow, match="The prompt has 40 tokens"):
        engine.submit(ask(PROMPT * 4))
    assert engine.scheduler.num_waiting == 1


def test_a_prompt_that_needs_every_block_runs_once_it_is_alone() -> None:
    engine = Engine(num_blocks=4, block_size=4)
    clients = [engine.submit(ask(PROMPT[:4])), engine.submit(ask(PROMPT + PROMPT[4:], 1))]
    engine.run()
    check_complete(*clients)
    check_empty(engine)


def test_a_batch_that_cannot_run_ends_its_requests_and_no_others() -> None:
    engine = Engine(max_sequences=1)
    failing, other = engine.submit(ask()), engine.submit(ask())
    engine.step()
    engine.step()
    batch = engine.scheduler.plan()
    assert batch is not None
    engine.scheduler.fail(batch, OutOfMemory("no memory"))
    assert isinstance(failing.events[-1].error, OutOfMemory)
    engine.run()
    check_complete(other)
    check_empty(engine)


def test_an_adapter_that_finds_no_slot_waits_its_turn() -> None:
    engine = Engine(num_slots=1)
    first, second = ask(adapter="a"), ask(PROMPT[:4], adapter="a")
    clients = [engine.submit(each) for each in (first, second, ask(adapter="b"), ask())]
    engine.step()
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (2, 2)
    engine.run()
    check_complete(*clients)
    check_empty(engine)


def test_twins_share_one_prefill() -> None:
    engine = Engine()
    clients = [engine.submit(ask()) for _ in range(3)]
    engine.step()
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (1, 2)
    engine.run()
    check_complete(*clients)
    check_empty(engine)


token_ids = st.integers(0, VOCABULARY - 1)


@dataclass(frozen=True)
class Demand:
    """What a client comes with; `name` is that of an adapter, as of now."""

    prompt: tuple[int, ...]
    max_tokens: int
    stop_ids: frozenset[int]
    name: str | None
    scale: float
    leaves_after: int | None


@st.composite
def demands(draw: st.DrawFn) -> Demand:
    """A prompt that shares its beginning with others, and what may end its answer."""
    prompt = PROMPT[: draw(st.sampled_from([0, 4, 7, 10]))]
    return Demand(
        prompt=(*prompt, *draw(st.lists(token_ids, min_size=not prompt, max_size=8))),
        max_tokens=draw(st.integers(1, 14)),
        stop_ids=draw(st.sampled_from([frozenset[int](), frozenset({5})])),
        name=draw(st.sampled_from([None, None, "x", "y"])),
        scale=draw(st.sampled_from([1.0, 0.5])),
        leaves_after=draw(st.sampled_from([None, None, None, 1, 3])),
    )


class EngineMachine(RuleBasedStateMachine):
    """Arrivals, ends, aborts, failures and changes of adapters, at any moment of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine()
        self.clients: list[Client] = []
        self.adapters: dict[str, str] = {}  # name -> content hash
        self.unloading: set[str] = set()

    @initialize(
        block_size=st.integers(1, 4),
        num_tokens=st.integers(20, 40),
        max_sequences=st.integers(1, 4),
        spare_tokens=st.sampled_from([0, 1, 3, 12]),
        num_slots=st.integers(1, 2),
        prefix_caching=st.sampled_from([True, True, False]),
    )
    def open(
        self,
        block_size: int,
        num_tokens: int,
        max_sequences: int,
        spare_tokens: int,
        num_slots: int,
        prefix_caching: bool,
    ) -> None:
        self.engine = Engine(
            num_blocks=num_tokens // block_size,
            block_size=block_size,
            max_sequences=max_sequences,
            max_batch_tokens=max_sequences + spare_tokens,
            num_slots=num_slots,
            prefix_caching=prefix_caching,
        )

    @rule(demands=st.lists(demands(), min_size=1, max_size=6))
    def arrive(self, demands: list[Demand]) -> None:
        for demand in demands:
            self._submit(demand)

    def _submit(self, demand: Demand) -> None:
        request = TokenRequest(
            request_id=next(_ids),
            prompt=demand.prompt,
            sampling=SamplingParams(max_tokens=demand.max_tokens),
            stop_ids=demand.stop_ids,
            adapter=self.adapters.get(demand.name or ""),
            adapter_scale=demand.scale,
        )
        try:
            self.clients.append(self.engine.submit(Client(request, demand.leaves_after)))
        except OutOfMemory:
            room = self.engine.blocks.num_blocks * self.engine.blocks.block_size
            assert min(len(request.prompt) + demand.max_tokens, CONTEXT) - 1 > room

    @precondition(lambda self: not self.engine.scheduler.idle or self.engine.in_flight)
    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()
            self.all_is_well()

    @precondition(lambda self: not self.engine.scheduler.idle and len(self.engine.in_flight) < 2)
    @rule()
    def launch(self) -> None:
        self.engine.launch()

    @precondition(lambda self: self.engine.in_flight)
    @rule()
    def commit(self) -> None:
        self.engine.commit()

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(self.clients[-8:]))
        before = len(client.events) + (not client.ended)
        self.engine.scheduler.abort(client.request.request_id)
        assert client.ended
        assert len(client.events) == before

    @precondition(lambda self: not self.engine.scheduler.idle and len(self.engine.in_flight) < 2)
    @rule()
    def fail_to_launch(self) -> None:
        if batch := self.engine.scheduler.plan():
            self.engine.scheduler.fail(batch, EngineError("it does not launch"))
            failed = {row.request.request_id for row in batch.rows}
            assert all(it.ended for it in self.clients if it.request.request_id in failed)

    @rule(name=st.sampled_from(["x", "y"]), sha256=st.sampled_from(["s1", "s2", "s3"]))
    def load_or_replace_adapter(self, name: str, sha256: str) -> None:
        self.unload_adapter(name)
        self.adapters[name] = sha256
        self.unloading.discard(sha256)

    @rule(name=st.sampled_from(["x", "y"]))
    def unload_adapter(self, name: str) -> None:
        old = self.adapters.pop(name, None)
        if old is not None and old not in self.adapters.values():
            self.unloading.add(old)
        self.finish_unloading()

    @rule()
    def finish_unloading(self) -> None:
        for sha256 in [it for it in self.unloading if not self.engine.scheduler.uses(it)]:
            self.engine.slots.forget(sha256)
            self.unloading.remove(sha256)

    @precondition(lambda self: any(not client.ended for client in self.clients))
    @rule()
    def the_oldest_ends_soon(self) -> None:
        oldest = next(client for client in self.clients if not client.ended)
        for _ in range(oldest.most_steps):
            self.engine.step()
            if oldest.ended:
                return
        raise AssertionError("the oldest request starves")

    @invariant()
    def all_is_well(self) -> None:
        self.every_client_got_what_it_should()
        self.running_ones_are_older_than_waiting_ones()
        self.blocks_are_where_they_should_be()
        self.shared_blocks_hold_the_same_for_all()
        self.slots_are_pinned_by_who_runs()

    def every_client_got_what_it_should(self) -> None:
        live = set(self.engine.scheduler._sequences)
        assert live == {it.request.request_id for it in self.clients if not it.ended}
        for client in self.clients:
            client.check()

    def running_ones_are_older_than_waiting_ones(self) -> None:
        scheduler = self.engine.scheduler
        queue = [*scheduler._running, *scheduler._waiting]
        assert len(queue) == len(scheduler._sequences)
        assert [it.request.request_id for it in queue] == sorted(scheduler._sequences)
        assert all(it.running for it in scheduler._running)
        assert not any(it.running or it.block_table for it in scheduler._waiting)

    def blocks_are_where_they_should_be(self) -> None:
        blocks, running = self.engine.blocks, self.engine.scheduler._running
        held = [block for it in running for block in it.block_table]
        assert blocks._users == [held.count(block) for block in range(blocks.num_blocks)]
        free = [*blocks._free, *blocks._kept]
        assert sorted({*free, *held}) == list(range(blocks.num_blocks))
        assert len(free) + len(set(held)) == blocks.num_blocks
        assert not set(blocks._free) & blocks._key_of.keys()
        assert blocks._kept.keys() <= blocks._key_of.keys()
        assert blocks._block_of == {key: block for block, key in blocks._key_of.items()}

    def shared_blocks_hold_the_same_for_all(self) -> None:
        size = self.engine.blocks.block_size
        meanings: dict[int, int] = {}  # block -> what its users take its last position for
        for it in self.engine.scheduler._running:
            known = list(states(it.request, len(it.block_table) * size))
            for block, state in zip(it.block_table, known[size - 1 :: size], strict=True):
                assert meanings.setdefault(block, state) == state

    def slots_are_pinned_by_who_runs(self) -> None:
        slots, running = self.engine.slots, self.engine.scheduler._running
        used = [it.request.adapter for it in running if it.request.adapter is not None]
        assert +slots._users == {sha256: used.count(sha256) for sha256 in used}
        for it in running:
            assert it.slot == (slots._slot_of[it.request.adapter] if it.request.adapter else 0)
        filled = [*slots._slot_of.values(), *slots._free]
        assert sorted(filled) == list(range(1, slots.num_slots + 1))

    def teardown(self) -> None:
        if len(self.clients) % 2:
            self.engine.scheduler.fail_all(EngineError("closed"))
        live = [client for client in self.clients if not client.ended]
        self.engine.run(limit=sum(client.most_steps for client in live) + 3)
        self.every_client_got_what_it_should()
        assert all(client.ended for client in self.clients)
        check_empty(self.engine)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
