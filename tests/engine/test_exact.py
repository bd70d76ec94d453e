"""PagedBackend on a small float32 model: whatever the engine does, every answer is the same."""

import threading
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlorachat.adapters import Adapter
from qlorachat.engine.backend import PagedBackend
from qlorachat.engine.batch import Batch, ScheduledRow
from qlorachat.engine.runner import Runner
from qlorachat.engine.sampler import Sampled
from qlorachat.errors import EngineError, OutOfMemory, QlorachatError, QueueFull
from qlorachat.model import PagedLlama
from qlorachat.model.lora import LoraProjection
from qlorachat.opening import OpenedModel
from qlorachat.protocols import ModelInfo
from qlorachat.testing import ByteTokenizer
from qlorachat.tokens import SamplingParams, TokenEvent, TokenRequest
from tests import lora

VOCABULARY, CONTEXT = 97, 256
_ids = count(1)


def open_small() -> OpenedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    info = ModelInfo("small", CONTEXT, VOCABULARY, frozenset(), shapes=shapes)
    return OpenedModel(model, ByteTokenizer(), info)


def prompt(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist())


class Client:
    """Collects one request's tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.error: QlorachatError | None = None
        self.ended = threading.Event()

    def __call__(self, event: TokenEvent) -> None:
        self.error = event.error
        self.tokens += [] if event.token_id is None else [event.token_id]
        if event.finish is not None or event.error is not None:
            self.ended.set()


def ask(
    backend: PagedBackend,
    prompts: Sequence[tuple[int, ...]],
    sampling: SamplingParams,
    adapter: Adapter | None = None,
) -> list[list[int]]:
    """All at once; raises the error of one."""
    clients, sha256 = [Client() for _ in prompts], None if adapter is None else adapter.sha256
    for each, client in zip(prompts, clients, strict=True):
        backend.submit(TokenRequest(next(_ids), each, sampling, frozenset(), sha256), client)
    assert all(client.ended.wait(120) for client in clients)
    for client in clients:
        if client.error is not None:
            raise client.error
    return [client.tokens for client in clients]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    """Each request alone, without a prefix cache, in an engine with room for all."""
    backend = PagedBackend(open_small(), prefix_caching=False)
    answers = {
        name: [ask(backend, [each], sampling)[0] for each in PROMPTS]
        for name, sampling in SAMPLING.items()
    }
    backend.close()
    return answers


PROMPTS = [prompt(20 + 7 * seed, seed) for seed in range(6)]
PROMPTS += [PROMPTS[5][:48] + prompt(9, 7), PROMPTS[5]]  # a shared beginning, and a twin
SAMPLING = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=90),
    "sampled": SamplingParams(temperature=1.0, top_p=0.9, seed=5, max_tokens=90),
    "penalized": SamplingParams(
        temperature=0.7,
        top_k=20,
        repetition_penalty=1.2,
        frequency_penalty=0.5,
        seed=9,
        max_tokens=90,
        logit_bias={3: 2.0},
    ),
}


# of an adapter of 16 ranks, and of 400 tokens: 2 layers, 2 key heads of 16 float32, keys and values
SHORT = f"{(118784 + 512 * 400) / 2**20:.4f}MiB"


@pytest.fixture(params=["roomy", "crowded", "short of blocks"])
def backend(request: pytest.FixtureRequest) -> Iterator[PagedBackend]:
    options: dict[str, dict[str, Any]] = {
        "roomy": {},
        "crowded": {"max_sequences": 2},
        "short of blocks": {"memory": SHORT},
    }
    made = PagedBackend(open_small(), **options[request.param])
    yield made
    made.close()


@pytest.mark.parametrize("name", SAMPLING)
def test_answers_are_those_of_each_request_alone(
    backend: PagedBackend, expected: dict[str, list[list[int]]], name: str
) -> None:
    for _ in range(2):  # the second time from the prefix cache
        assert ask(backend, PROMPTS, SAMPLING[name]) == expected[name]
    blocks = backend._scheduler._blocks
    assert blocks.num_free == blocks.num_blocks


def test_blocks_do_run_short_and_requests_are_preempted(
    expected: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = PagedBackend(open_small(), memory=SHORT)
    resumed = 0
    launch = backend._runner.launch

    def record(batch: Batch) -> object:
        nonlocal resumed
        resumed += sum(len(row.history) > len(row.request.prompt) for row in batch.prefills)
        return launch(batch)

    monkeypatch.setattr(backend._runner, "launch", record)
    assert ask(backend, PROMPTS, SAMPLING["greedy"]) == expected["greedy"]
    assert resumed > 0
    backend.close()


class OneGraph:
    """Stands in for `DecodeGraphs`, which need a card: each run overwrites what the last gave."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._logits = torch.empty(len(runner._last), VOCABULARY)
        self._greedy = torch.empty(len(runner._last), dtype=torch.int64)

    def run(self, rows: Sequence[ScheduledRow]) -> tuple[torch.Tensor, torch.Tensor]:
        logits, greedy = self._logits[: len(rows)], self._greedy[: len(rows)]
        logits.copy_(self._runner._decode_eagerly(rows))
        greedy.copy_(logits.argmax(-1))
        self._runner._last[[row.row for row in rows]] = greedy
        return logits, greedy


@pytest.mark.parametrize("in_graphs", [False, True])
@pytest.mark.parametrize("name", SAMPLING)
def test_rows_share_out_steps_that_take_few(
    expected: dict[str, list[list[int]]],
    name: str,
    in_graphs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PagedLlama, "most_decode_rows", 3)
    backend = PagedBackend(open_small())
    taken: list[int] = []
    decode = backend._runner._decode

    def record(rows: Sequence[ScheduledRow]) -> Sampled:
        taken.append(len(rows))
        return decode(rows)

    monkeypatch.setattr(backend._runner, "_decode", record)
    if in_graphs:
        monkeypatch.setattr(backend._runner, "_graphs", OneGraph(backend._runner))
    assert ask(backend, PROMPTS, SAMPLING[name]) == expected[name]
    assert max(taken) == 3
    assert sum(taken) >= sum(map(len, expected[name])) - len(PROMPTS)
    backend.close()


def make_adapter(rank: int) -> Adapter:
    """Of the small model's value projections, its content hash is the rank."""
    modules = [f"model.layers.{layer}.self_attn.v_proj" for layer in range(2)]
    return lora.make_adapter(
        dict.fromkeys(modules, (32, 64)), dict.fromkeys(modules, rank), str(rank)
    )


def test_ranks_of_an_unloaded_adapter_are_given_up() -> None:
    backend = PagedBackend(open_small())
    stacks, greedy = backend._runner._model.adapters, SAMPLING["greedy"]
    small, large, again = make_adapter(4), make_adapter(40), make_adapter(20)
    base = ask(backend, PROMPTS, greedy)
    backend.load_adapter(small)
    answers = ask(backend, PROMPTS, greedy, small)
    assert answers != base
    assert stacks.rank == 16
    backend.load_adapter(large)
    assert ask(backend, PROMPTS, greedy, large) not in (base, answers)
    assert stacks.rank == 48
    assert ask(backend, PROMPTS, greedy, small) == answers
    backend.unload_adapter(large.sha256)
    assert stacks.rank == 16
    assert ask(backend, PROMPTS, greedy, small) == answers
    backend.unload_adapter(small.sha256)
    assert stacks.rank == 0
    assert ask(backend, PROMPTS, greedy) == base
    backend.load_adapter(again)
    backend.load_adapter(small)
    assert ask(backend, PROMPTS, greedy, small) == answers
    assert ask(backend, PROMPTS, greedy, again) not in (base, answers)
    assert stacks.rank == 32
    backend.close()


def run_out(monkeypatch: pytest.MonkeyPatch, method: str, call: int) -> None:
    """Of memory, in that call of a projection's method and in no later one."""
    calls, whole = count(1), getattr(LoraProjection, method)

    def fail(*arguments: Any) -> None:
        if next(calls) == call:
            raise torch.OutOfMemoryError("no memory")
        whole(*arguments)

    monkeypatch.setattr(LoraProjection, method, fail)


@pytest.mark.parametrize("max_adapters", [1, 8])
@pytest.mark.parametrize(
    ("method", "call"), [("allocate", 1), ("allocate", 4), ("write", 2), ("write", 9)]
)
def test_memory_that_runs_out_over_an_adapter_spoils_no_other(
    method: str, call: int, max_adapters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = PagedBackend(open_small(), max_adapters=max_adapters)
    small, large, greedy = make_adapter(4), make_adapter(40), SAMPLING["greedy"]
    for adapter in (small, large):
        backend.load_adapter(adapter)
    base, answers = ask(backend, PROMPTS, greedy), ask(backend, PROMPTS, greedy, small)
    run_out(monkeypatch, method, call)
    with pytest.raises(OutOfMemory):
        ask(backend, PROMPTS, greedy, large)
    assert ask(backend, PROMPTS, greedy) == base
    assert ask(backend, PROMPTS[::-1], greedy, small) == answers[::-1]
    assert ask(backend, PROMPTS, greedy, large) not in (base, answers)
    assert ask(backend, PROMPTS, greedy, small) == answers
    backend.close()


def test_memory_that_runs_out_when_ranks_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = PagedBackend(open_small())
    small, large, greedy = make_adapter(4), make_adapter(40), SAMPLING["greedy"]
    for adapter in (small, large):
        backend.load_adapter(adapter)
    answers = ask(backend, PROMPTS, greedy, small)
    ask(backend, PROMPTS, greedy, large)
    run_out(monkeypatch, "allocate", 3)
    backend.unload_adapter(large.sha256)
    assert ask(backend, PROMPTS, greedy, small) == answers
    assert backend._runner._model.adapters.rank == 16
    backend.close()


def test_an_unload_ends_with_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = PagedBackend(open_small())
    backend.load_adapter(small := make_adapter(4))

    def fail(sha256: str) -> None:
        raise SystemError("the card fell off the bus")

    monkeypatch.setattr(backend._runner, "forget", fail)
    with pytest.raises(EngineError, match="fell off the bus"):
        backend.unload_adapter(small.sha256)
    backend.close()


def test_a_burst_is_refused_only_beyond_the_places_and_the_queue() -> None:
    backend = PagedBackend(open_small(), max_sequences=5, max_queue=3)
    plan, go = backend._scheduler.plan, threading.Event()

    def wait() -> Batch | None:
        go.wait(60)
        return plan()

    backend._scheduler.plan = wait  # type: ignore[method-assign]
    clients = [Client() for _ in range(8)]
    for client in clients:
        request = TokenRequest(next(_ids), PROMPTS[0], SAMPLING["greedy"], frozenset())
        backend.submit(request, client)
    with pytest.raises(QueueFull):
        ask(backend, PROMPTS[:1], SAMPLING["greedy"])
    go.set()
    assert all(client.ended.wait(120) and client.error is None for client in clients)
    ask(backend, PROMPTS[:1], SAMPLING["greedy"])
    backend.close()
