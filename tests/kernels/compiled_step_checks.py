"""The Triton kernels of a fused decode step compiled for Ampere and Hopper, in a 7B model's shapes.

test_decode_step.py runs this file in a process of its own, as test_triton.py does with the others.
"""

from collections.abc import Callable

import pytest
import torch

from qlorachat.kernels import attention, decode_step, residual
from qlorachat.kernels.sums import RowAdapters
from tests.kernels.compiled_checks import HALF, compiled, integers, zeros
from tests.kernels.step_cases import make_tiled

__all__ = ["compiled"]  # a fixture

ROWS, PADDED, WIDTH, INNER = 20, 32, 4096, 11008
ADAPTERS = {"none": None, "rank 16": 16, "rank 48": 48, "rank 256": 256}


def make_adapters(outputs: int, parts: int, rank: int | None) -> RowAdapters | None:
    if rank is None:
        return None
    shrunk = torch.zeros(2 * parts * rank, PADDED)
    return RowAdapters(shrunk, zeros(2, outputs, rank), integers(ROWS), torch.zeros(ROWS))


def begin(rank: int | None) -> None:
    ids = torch.zeros(ROWS, dtype=torch.int64)
    x, h, squares = make_tiled(HALF, WIDTH, PADDED), zeros(ROWS, WIDTH), torch.zeros(PADDED)
    residual.begin_residual(ids, zeros(32000, WIDTH), zeros(WIDTH), x, h, squares)


def add(rank: int | None) -> None:
    sums, h, squares = torch.zeros(WIDTH, PADDED), zeros(ROWS, WIDTH), torch.zeros(PADDED)
    adapters, x = make_adapters(WIDTH, 1, rank), make_tiled(HALF, WIDTH, PADDED)
    residual.add_to_residual(sums, adapters, h, zeros(WIDTH), x, squares)
    residual.add_to_residual(sums, adapters, h, None, None, None)


def rope(rank: int | None) -> None:
    for head_dim in (128, 80):
        cache, table = zeros(2, 16, 32, head_dim), torch.zeros(64, head_dim)
        outputs = 96 * head_dim
        decode_step.rope_and_cache_sums(
            torch.zeros(outputs, PADDED),
            make_adapters(outputs, 3, rank),
            *(torch.zeros(PADDED), WIDTH, 1e-5, table, table, integers(ROWS), integers(ROWS)),
            *(cache, cache, zeros(ROWS, 32, head_dim)),
        )


def silu(rank: int | None) -> None:
    adapters, squares = make_adapters(2 * INNER, 2, rank), torch.zeros(PADDED)
    sums, x = torch.zeros(2 * INNER, PADDED), make_tiled(HALF, INNER, PADDED)
    decode_step.silu_mul_sums(sums, adapters, squares, WIDTH, 1e-5, x, ROWS)


def attend(rank: int | None) -> None:
    cache, out = zeros(2, 16, 32, 128), make_tiled(HALF, WIDTH, PADDED)
    context = (cache, cache, integers(ROWS, 8), integers(ROWS))
    for splits in (1, 4):
        attention.paged_decode_attention(zeros(ROWS, 32, 128), *context, 0.1, out, splits, True)


LAUNCHES: list[tuple[Callable[[int | None], None], list[str]]] = [
    (add, ["_add_kernel"] * 2),
    (rope, ["_rope_sums_kernel"] * 2),
    (silu, ["_silu_mul_sums_kernel"]),
]
WITHOUT_LORA: list[tuple[Callable[[int | None], None], list[str]]] = [
    (begin, ["_begin_kernel"]),
    (attend, ["_attend_kernel", "_attend_kernel", "_combine_kernel"]),
]


@pytest.fixture
def names(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for module in (decode_step, residual):
        monkeypatch.setattr(module, "runs_triton", lambda tensor: True)
    return compiled


@pytest.mark.parametrize("rank", ADAPTERS.values(), ids=ADAPTERS.keys())
@pytest.mark.parametrize(("launch", "kernels"), LAUNCHES)
def test_it_compiles(
    launch: Callable[[int | None], None], kernels: list[str], rank: int | None, names: list[str]
) -> None:
    launch(rank)
    assert names == kernels


@pytest.mark.parametrize(("launch", "kernels"), WITHOUT_LORA)
def test_it_compiles_without_lora(
    launch: Callable[[int | None], None], kernels: list[str], names: list[str]
) -> None:
    launch(None)
    assert names == kernels
