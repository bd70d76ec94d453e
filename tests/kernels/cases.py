"""Random inputs of the kernels: ragged shapes, padding rows, and poison where nothing may look."""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from qlorachat.kernels.eight_bits import INT8, narrow

POISON = float("nan")
Context = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class RopeCase:
    """Arguments of rope_and_cache, in its order; every third row is padding."""

    qkv: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor

    def arguments(self) -> tuple[torch.Tensor, ...]:
        """With caches of their own, so that a case can be run several times."""
        caches = (self.key_cache.clone(), self.value_cache.clone())
        return (self.qkv, self.cos, self.sin, self.positions, self.slots, *caches)


def make_rope(
    dtype: torch.dtype,
    *,
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    in_8_bits: bool = False,
) -> RopeCase:
    torch.manual_seed(rows + head_dim)
    block_size, blocks = 4, rows + 2
    slots = torch.randperm(blocks * block_size)[:rows].int()
    slots[1::3] = -1
    cache = torch.randn(2, blocks, block_size, kv_heads, head_dim)
    cache = narrow(cache, INT8) if in_8_bits else cache.to(dtype)
    return RopeCase(
        qkv=torch.randn(rows, (heads + 2 * kv_heads) * head_dim).to(dtype),
        cos=torch.randn(50, head_dim),
        sin=torch.randn(50, head_dim),
        positions=torch.randint(0, 50, (rows,), dtype=torch.int32),
        slots=slots,
        key_cache=cache[0],
        value_cache=cache[1],
    )


@dataclass(frozen=True)
class PagedCase:
    """Contexts in shuffled blocks; whatever lies beyond them is NaN or no block at all."""

    q: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_tables: torch.Tensor
    context_lengths: torch.Tensor

    def arguments(self) -> Context:
        return self.q, self.key_cache, self.value_cache, self.block_tables, self.context_lengths

    def context(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One row's keys and values, [length, G, D]."""
        length, block_size = int(self.context_lengths[row]), self.key_cache.shape[1]
        table = self.block_tables[row, : -(-length // block_size)]
        keys, values = (
            torch.cat([cache[int(block)] for block in table])[:length]
            for cache in (self.key_cache, self.value_cache)
        )
        return keys, values


def make_paged(
    dtype: torch.dtype,
    lengths: list[int],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int = 16,
    in_8_bits: bool = False,
) -> PagedCase:
    torch.manual_seed(sum(lengths) + head_dim)
    blocks = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(blocks) + 1).int()
    cache = torch.randn(2, len(order), block_size, kv_heads, head_dim).to(dtype)
    cache[:, order[-1]] = POISON
    tables = torch.full((len(lengths), max(blocks) + 2), -9, dtype=torch.int32)
    for row, (start, stop) in enumerate(pairwise(accumulate(blocks, initial=0))):
        tables[row, : stop - start] = order[start:stop]
        used = lengths[row] - (blocks[row] - 1) * block_size
        if stop > start:
            cache[:, order[stop - 1], used:] = POISON
    if in_8_bits:
        cache = narrow(cache, INT8)
    return PagedCase(
        q=torch.randn(len(lengths), heads, head_dim).to(dtype),
        key_cache=cache[0],
        value_cache=cache[1],
        block_tables=tables,
        context_lengths=torch.tensor(lengths, dtype=torch.int32),
    )


@dataclass(frozen=True)
class LoraCase:
    """Rows with adapters of their own, or with none; slot 0 holds NaN, ranks differ by slot."""

    x: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    slots: torch.Tensor
    scales: torch.Tensor
    y: torch.Tensor
    columns: tuple[int, ...]

    def expected(self) -> torch.Tensor:
        """y afterwards, row by row and part by part in float64."""
        y, rank = self.y.double(), self.b.shape[2]
        for row, slot in enumerate(self.slots.tolist()):
            if slot == 0:
                continue
            shrunk = self.a[slot - 1].double() @ self.x[row].double()
            for part, (start, stop) in enumerate(pairwise(self.columns)):
                own = shrunk[rank_rows(part, len(self.columns) - 1, rank)]
                y[row, start:stop] += self.scales[row] * (
                    self.b[slot - 1, start:stop].double() @ own
                )
        return y


def rank_rows(part: int, parts: int, rank: int) -> list[int]:
    """Where the ranks of a part are among A's rows: of all parts 16, then of all the next 16."""
    return [each // 16 * parts * 16 + part * 16 + each % 16 for each in range(rank)]


def make_lora(
    dtype: torch.dtype, *, rows: int, inputs: int, rank: int, parts: tuple[int, ...], adapters: int
) -> LoraCase:
    torch.manual_seed(rows + inputs + rank)
    columns = tuple(accumulate(parts, initial=0))
    held = -(-rank // 16) * 16
    a = torch.zeros(adapters, len(parts) * held, inputs)
    b = torch.randn(adapters, columns[-1], held)
    for slot in range(1, adapters + 1):
        for part in range(len(parts)):
            own = rank_rows(part, len(parts), max(1, rank // slot))
            a[slot - 1, own] = torch.randn(len(own), inputs) / inputs**0.5
    return LoraCase(
        x=torch.randn(rows, inputs).to(dtype),
        a=a.to(dtype),
        b=b.to(dtype),
        slots=torch.randint(0, adapters + 1, (rows,), dtype=torch.int32),
        scales=torch.rand(rows) * 2,
        y=torch.randn(rows, columns[-1]).to(dtype),
        columns=columns,
    )
