"""Decode and prefill speed on one CUDA card: the paged engine beside transformers with PEFT.

    python bench/decode.py [--size 7b] [--rank 16]

Random NF4 weights of the Llama-2-7B or -13B shape with an adapter on all linear layers. Logits of
the two are compared first, then each row is timed by the wall clock, with scheduling, sampling and
hand-out of tokens inside. Writes bench/results/decode.json, named further for another size or rank,
with keys and values in 8 bits and with what cards before Hopper run.
"""

import argparse
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import count, pairwise, product
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from as_ampere import as_ampere
from qlorachat.adapters import Adapter
from qlorachat.engine.backend import PagedBackend
from qlorachat.tokens import SamplingParams, TokenEvent, TokenRequest
from random_model import SHAPES, adapter, build, opened, scaled

RESULTS = Path(__file__).parent / "results"
ANSWER = 128  # tokens; the context is that of the middle of the answer
PROMPT = 192  # tokens, where no context is said
MOST = 128  # rows, of the largest batch
CASES = (  # batch, context
    *((1, 1024), (1, 256), (8, 256), (32, 256)),
    *((64, 256), (64, 1024), (MOST, 256)),
)
ROUNDS = 3  # of decoding, of which the median is noted
REST = 0.5  # seconds before a prefill
STEP_GAP = 3.0  # microseconds: kernels of one graph follow each other faster

ids = count(1)


class Stream:
    """One request's events, with the times at which they came."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.ended = threading.Event()

    def __call__(self, event: TokenEvent) -> None:
        if event.error is not None:
            print("error:", event.error, flush=True)
        if event.token_id is not None:
            self.tokens.append(event.token_id)
            self.times.append(event.time)
        if event.finish is not None or event.error is not None:
            self.ended.set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SHAPES), default="7b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--kv-cache", choices=["auto", "int8"], default="auto")
    parser.add_argument("--as-ampere", action="store_true", help="what cards before Hopper run")
    arguments = parser.parse_args()
    with as_ampere(arguments.as_ampere):
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    model = build(arguments.size, "cuda")
    one = adapter(model, rank=arguments.rank, seed=1)
    record: dict[str, Any] = {"machine": machine(), "copy GB/s": round(copy_bandwidth())}
    record |= {name: getattr(arguments, name) for name in ("size", "rank", "kv_cache", "as_ampere")}
    print(record, flush=True)
    reference = peer(model, one, record, timed=not arguments.no_peer)
    backend = PagedBackend(
        opened(model, arguments.size),
        max_sequences=MOST,
        max_queue=MOST,
        kv_cache=arguments.kv_cache,
        prefix_caching=False,
    )
    record["plan"] = str(backend.plan)
    wide = adapter(model, rank=64, seed=9) if arguments.rank < 64 else None
    for each in (one, *(scaled(one, seed) for seed in range(2, 9)), *([wide] if wide else [])):
        backend.load_adapter(each)
    check(backend, one, reference, record)
    for batch, context in CASES:
        decode_rows(backend, batch, context, {"base": [None], "one adapter": [one]}, record)
    prefill_rows(backend, one, record)
    profile_steps(backend, one, record)
    eight = [one, *(scaled(one, seed) for seed in range(2, 9))]
    decode_rows(backend, 32, 256, {"eight adapters": eight}, record)
    if wide is not None:
        for batch, context in ((1, 1024), (32, 256)):
            decode_rows(backend, batch, context, {"one adapter of rank 64": [wide]}, record)
    backend.close()


def note(record: dict[str, Any], name: str, value: object) -> None:
    """Kept at once: a run that is cut short has what it measured."""
    record[name] = value
    file = "decode"
    file += "" if record["size"] == "7b" else f"_{record['size']}"
    file += "" if record["rank"] == 16 else f"_rank{record['rank']}"
    file += "" if record["kv_cache"] == "auto" else f"_{record['kv_cache']}"
    file += "_as_ampere" if record["as_ampere"] else ""
    text = json.dumps(record, indent=2) + "\n"
    (RESULTS / f"{file}.json").write_text(text, encoding="utf-8")
    print(f"{name}: {value}", flush=True)


def random_prompt(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(5, 30000, (length,), generator=generator).tolist())


def run(
    backend: PagedBackend, prompts: Sequence[tuple[int, ...]], adapters: Sequence[str | None],
    max_tokens: int,
) -> list[Stream]:  # fmt: skip
    streams = [Stream() for _ in prompts]
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    for prompt, sha256, stream in zip(prompts, adapters, streams, strict=True):
        request = TokenRequest(next(ids), prompt, sampling, frozenset(), sha256)
        backend.submit(request, stream)
    for stream in streams:
        assert stream.ended.wait(120)
    return streams


def decode_rate(streams: Sequence[Stream]) -> float:
    """Tokens/s while all decode: from the last one's first token to the first one's last."""
    start = max(stream.times[0] for stream in streams)
    end = min(stream.times[-1] for stream in streams)
    made = sum(sum(start < t <= end for t in stream.times) for stream in streams)
    return made / (end - start)


def decode_rows(
    backend: PagedBackend,
    batch: int,
    context: int,
    kinds: Mapping[str, Sequence[Adapter | None]],
    record: dict[str, Any],
) -> None:
    """Each kind's adapters are given to the rows in turn; kinds run in turn, for a card drifts."""
    prompts = [random_prompt(context - ANSWER // 2, seed) for seed in range(batch)]
    rows: dict[str, list[str | None]] = {}
    for name, adapters in kinds.items():
        hashes = [None if each is None else each.sha256 for each in adapters]
        rows[name] = [hashes[i % len(hashes)] for i in range(batch)]
        run(backend, prompts, rows[name], 8)  # graphs are captured
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(ROUNDS):
        for name, own in rates.items():
            own.append(decode_rate(run(backend, prompts, rows[name], ANSWER)))
    for name, own in rates.items():
        key = f"engine, batch {batch}, context {context}, {name}, tokens/s"
        note(record, key, round(median(own), 1))


def prefill_rows(backend: PagedBackend, one: Adapter, record: dict[str, Any]) -> None:
    seeds = count(1)
    for batch, (name, hashed) in product((1, 4), {"one adapter": one.sha256, "base": None}.items()):

        def go(batch: int = batch, hashed: str | None = hashed) -> float:
            prompts = [random_prompt(2048, next(seeds)) for _ in range(batch)]
            start = perf_counter()
            run(backend, prompts, [hashed] * batch, 1)
            return perf_counter() - start

        note_prefill(record, f"engine, prefill {batch}x2048, {name}", batch, go)


def note_prefill(record: dict[str, Any], name: str, batch: int, go: Callable[[], float]) -> None:
    """Tokens/s of prompts in close succession, and of such that find the card rested: products of
    some 40 ms make it lower its clock."""
    for rest, said in ((0.0, ""), (REST, ", rested")):
        times = []
        for _ in range(4):
            sleep(rest)
            times.append(go())
        note(record, f"{name}{said}, tokens/s", round(batch * 2048 / min(times[1:])))


def profile_steps(backend: PagedBackend, one: Adapter, record: dict[str, Any]) -> None:
    """Where a decode step's time goes: kernels by name, waiting included, and when none runs."""
    for batch in (1, 32):
        prompts = [random_prompt(PROMPT, seed) for seed in range(batch)]
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run(backend, prompts, [one.sha256] * batch, 40)
        events = sorted(
            (e for e in profiler.events() or () if e.device_type == DeviceType.CUDA),
            key=lambda e: e.time_range.start,
        )
        events = events[len(events) // 2 : -len(events) // 10]  # the middle: decode steps only
        busy, reached = 0.0, 0.0  # kernels overlap: one starts while the one before it runs
        for event in events:
            busy += max(0.0, event.time_range.end - max(reached, event.time_range.start))
            reached = max(reached, event.time_range.end)
        span = events[-1].time_range.end - events[0].time_range.start
        note(record, f"batch {batch}, device idle, %", round(100 * (1 - busy / span), 1))
        gaps = [b.time_range.start - a.time_range.end for a, b in pairwise(events)]
        between = sum(gap for gap in gaps if gap > STEP_GAP)
        note(record, f"batch {batch}, device idle between steps, %", round(100 * between / span, 1))
        times: dict[str, float] = {}
        for event in events:
            times[event.name[:60]] = times.get(event.name[:60], 0.0) + (
                event.time_range.end - event.time_range.start
            )
        top = sorted(times.items(), key=lambda item: -item[1])[:14]
        shares = {name: f"{100 * value / span:.1f} %" for name, value in top}
        note(record, f"batch {batch}, share of time", shares)


@torch.inference_mode()
def peer(model: Any, one: Adapter, record: dict[str, Any], *, timed: bool) -> torch.Tensor:
    """transformers + PEFT: the logits to compare with, and its rates; leaves the model bare."""
    config = LoraConfig(**one.peft_config, inference_mode=True)
    wrapped = PeftModel(model, config, adapter_name="one")
    set_peft_model_state_dict(wrapped, dict(one.tensors), adapter_name="one")
    prompt = torch.tensor([random_prompt(PROMPT, 0)], device="cuda")
    output = wrapped(input_ids=prompt, logits_to_keep=1)
    reference: torch.Tensor = output.logits[0, -1].float()
    if timed:
        for batch in (1, 8, 32):
            note(
                record,
                f"transformers + PEFT generate, batch {batch}, tokens/s",
                generate(wrapped, batch),
            )
        for batch in (1, 4):
            prefill(wrapped, batch, record)
    wrapped.unload()
    return reference


def generate(wrapped: Any, batch: int, tokens: int = 48) -> float:
    prompts = torch.tensor([random_prompt(PROMPT, s) for s in range(batch)], device="cuda")

    def go(new: int) -> float:
        torch.cuda.synchronize()
        start = perf_counter()
        wrapped.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
            max_new_tokens=new, min_new_tokens=new, pad_token_id=0,
        )  # fmt: skip
        torch.cuda.synchronize()
        return perf_counter() - start

    go(4)
    return round(batch * (tokens - 1) / (go(tokens) - go(1)), 1)


def prefill(wrapped: Any, batch: int, record: dict[str, Any]) -> None:
    prompts = torch.tensor([random_prompt(2048, s) for s in range(batch)], device="cuda")

    def go() -> float:
        torch.cuda.synchronize()
        start = perf_counter()
        wrapped(input_ids=prompts, logits_to_keep=1)
        torch.cuda.synchronize()
        return perf_counter() - start

    note_prefill(record, f"transformers + PEFT prefill {batch}x2048", batch, go)


def check(
    backend: PagedBackend, one: Adapter, reference: torch.Tensor, record: dict[str, Any]
) -> None:
    """The engine's logits against transformers + PEFT's, and batch 1 against batch 8."""
    prompt = random_prompt(PROMPT, 0)
    sampling = SamplingParams(temperature=0.0, max_tokens=16, logprobs=20)
    streams = [Stream() for _ in range(8)]
    events: list[TokenEvent] = []

    def first(event: TokenEvent) -> None:
        events.append(event)
        streams[0](event)

    backend.submit(TokenRequest(next(ids), prompt, sampling, frozenset(), one.sha256), first)
    assert streams[0].ended.wait(120)
    expected = reference.log_softmax(-1)
    worst = max(abs(value - float(expected[token])) for token, value in events[0].top)
    margin = events[0].top[0][1] - events[0].top[1][1]
    note(record, "largest difference of 20 logprobs", round(worst, 4))
    note(
        record,
        "greedy token equal, margin",
        [events[0].token_id == int(expected.argmax()), round(margin, 4)],
    )
    for stream in streams[1:]:
        request = TokenRequest(
            next(ids), prompt, replace(sampling, logprobs=None), frozenset(), one.sha256
        )
        backend.submit(request, stream)
    assert all(stream.ended.wait(120) for stream in streams)
    same = [stream.tokens == streams[1].tokens for stream in streams]
    note(record, "equal answers: alone, then 7 in one batch", same)


def copy_bandwidth() -> float:
    """GB/s of a device copy of 4 GiB, bytes read and written."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(20):
        target.copy_(source)
    torch.cuda.synchronize()
    return 20 * 2 * 2**32 / (perf_counter() - start) / 1e9


def machine() -> dict[str, object]:
    names = ("torch", "transformers", "bitsandbytes", "peft", "triton")
    return {
        "card": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in names},
    }


if __name__ == "__main__":
    main()
