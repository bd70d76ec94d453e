"""What a fused decode step does with the sums of q|k|v and of gate|up.

Both come from an x whose norm was put off (`residual`): sums are multiplied by 1 / rms here.
"""

from __future__ import annotations

import torch

from qlorachat.kernels.activation import silu_mul_reference
from qlorachat.kernels.device import (
    dependent_launch,
    jit,
    runs_triton,
    tl,
    triton,
    wait_for_previous,
)
from qlorachat.kernels.rotary import _product, _store_halves, rope_and_cache_reference
from qlorachat.kernels.sums import (
    ROW_BLOCK,
    RowAdapters,
    adapter_shape,
    adapter_tensors,
    check_squares,
    check_sums,
    clear_sums,
    inverse_rms_reference,
    load_b,
    load_inverse_rms,
    load_sums,
    take_sums_reference,
)
from qlorachat.kernels.tiles import store_tiled, tiled_shape, write_tiled

_COLUMNS = 64  # of one program: a block of a tiled x


def rope_and_cache_sums(
    sums: torch.Tensor,
    adapters: RowAdapters | None,
    squares: torch.Tensor,
    width: int,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    q: torch.Tensor,
) -> None:
    """`rope_and_cache` of q|k|v = (W x plus LoRA) / rms, rounded once; the queries go to q.

    sums: float32 [(H + 2G) * D, P], cleared. squares: float32 [P], sums over `width` columns.
    q: [M, H, D], contiguous. The rest is as in `rope_and_cache`, in q's dtype.
    """
    rows, heads, head_dim = q.shape
    kv_heads = key_cache.shape[2]
    assert len(sums) == (heads + 2 * kv_heads) * head_dim
    assert head_dim % 2 == 0
    assert cos.shape == sin.shape == (len(cos), head_dim)
    assert positions.shape == slots.shape == (rows,)
    assert positions.dtype == slots.dtype == torch.int32
    assert key_cache.shape == value_cache.shape == (*key_cache.shape[:3], head_dim)
    assert key_cache.dtype == value_cache.dtype == q.dtype
    assert all(tensor.is_contiguous() for tensor in (cos, sin, key_cache, value_cache, q))
    check_sums(sums, adapters, rows, 3, q.dtype)
    check_squares(squares, sums.shape[1])
    context = (cos, sin, positions, slots, key_cache, value_cache, q)
    if not runs_triton(q):
        rope_and_cache_sums_reference(sums, adapters, squares, width, eps, *context)
        return
    _rope_sums_kernel[(heads + 2 * kv_heads, triton.cdiv(rows, ROW_BLOCK))](
        *(sums, *adapter_tensors(adapters), squares, *context, rows, eps),
        heads=heads,
        kv_heads=kv_heads,
        half=head_dim // 2,
        width=width,
        **adapter_shape(adapters, 3, q.dtype),
        padded=sums.shape[1],
        row_block=ROW_BLOCK,
        half_block=max(16, triton.next_power_of_2(head_dim // 2)),  # tensor cores' least
        **dependent_launch(q),
    )


def silu_mul_sums(
    sums: torch.Tensor,
    adapters: RowAdapters | None,
    squares: torch.Tensor,
    hidden: int,
    eps: float,
    x: torch.Tensor,
    rows: int,
) -> None:
    """`silu_mul` of gate|up = (W x plus LoRA) / rms, rounded once, tiled; for the first M = `rows`.

    sums: float32 [2 * width, P], cleared; width is a multiple of 64. squares: float32 [P], sums
    over `hidden` columns. x: tiled [blocks, P, 64], contiguous.
    """
    outputs, padded = sums.shape
    assert outputs % 2 == 0
    assert x.shape == tiled_shape(outputs // 2, padded)
    assert x.is_contiguous()
    check_sums(sums, adapters, rows, 2, x.dtype)
    check_squares(squares, padded)
    if not runs_triton(x):
        silu_mul_sums_reference(sums, adapters, squares, hidden, eps, x, rows)
        return
    _silu_mul_sums_kernel[(triton.cdiv(outputs // 2, _COLUMNS), triton.cdiv(rows, ROW_BLOCK))](
        *(sums, *adapter_tensors(adapters), squares, x, rows, eps),
        width=outputs // 2,
        hidden=hidden,
        **adapter_shape(adapters, 2, x.dtype),
        padded=padded,
        row_block=ROW_BLOCK,
        column_block=_COLUMNS,
        **dependent_launch(x),
    )


def rope_and_cache_sums_reference(
    sums: torch.Tensor,
    adapters: RowAdapters | None,
    squares: torch.Tensor,
    width: int,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    q: torch.Tensor,
) -> None:
    """`rope_and_cache_sums` in plain torch."""
    rows, values = len(q), key_cache.shape[2] * key_cache.shape[3]
    columns = (0, len(sums) - 2 * values, len(sums) - values, len(sums))
    taken = take_sums_reference(sums, adapters, rows, columns)
    qkv = (taken * inverse_rms_reference(squares, rows, width, eps)).to(q.dtype)
    q.copy_(rope_and_cache_reference(qkv, cos, sin, positions, slots, key_cache, value_cache))


def silu_mul_sums_reference(
    sums: torch.Tensor,
    adapters: RowAdapters | None,
    squares: torch.Tensor,
    hidden: int,
    eps: float,
    x: torch.Tensor,
    rows: int,
) -> None:
    """`silu_mul_sums` in plain torch."""
    taken = take_sums_reference(sums, adapters, rows, (0, len(sums) // 2, len(sums)))
    gate_up = (taken * inverse_rms_reference(squares, rows, hidden, eps)).to(x.dtype)
    write_tiled(silu_mul_reference(gate_up), x)


@jit
def _rope_sums_kernel(
    sums: tl.tensor,
    shrunk: tl.tensor,
    b: tl.tensor,
    adapter_slots: tl.tensor,
    scales: tl.tensor,
    squares: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    q: tl.tensor,
    rows: int,
    eps: float,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
    width: tl.constexpr,
    parts: tl.constexpr,
    rank: tl.constexpr,
    depths: tl.constexpr,
    depth_block: tl.constexpr,
    precision: tl.constexpr,
    padded: tl.constexpr,
    row_block: tl.constexpr,
    half_block: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """One head, q's, k's or v's, of some rows."""
    head = tl.program_id(0)
    row = tl.program_id(1) * row_block + tl.arange(0, row_block)
    column = tl.arange(0, half_block)
    narrow, real = column < half, row < rows
    inside = real[:, None] & narrow[None, :]
    part = tl.where(head < heads, 0, tl.where(head < heads + kv_heads, 1, 2))
    outputs: tl.constexpr = (heads + 2 * kv_heads) * 2 * half
    low = head * (2 * half) + column
    mine, first_b = load_b(
        *(b, adapter_slots, row, low, narrow, real),
        *(0, outputs, rank, depths, depth_block),
    )
    _, second_b = load_b(
        *(b, adapter_slots, row, low + half, narrow, real),
        *(0, outputs, rank, depths, depth_block),
    )
    slot = tl.load(slots + row, mask=real, other=-1).to(tl.int64)
    position = tl.load(positions + row, mask=real, other=0).to(tl.int64)
    wait_for_previous(early)
    first = load_sums(
        *(sums, shrunk, b, adapter_slots, scales, mine, first_b),
        *(row, low, narrow, real, part),
        *(outputs, parts, rank, depths, depth_block, padded, precision),
    )
    second = load_sums(
        *(sums, shrunk, b, adapter_slots, scales, mine, second_b),
        *(row, low + half, narrow, real, part),
        *(outputs, parts, rank, depths, depth_block, padded, precision),
    )
    inverse_rms = load_inverse_rms(squares, row, real, eps, width)
    first = (first * inverse_rms).to(q.dtype.element_ty)
    second = (second * inverse_rms).to(q.dtype.element_ty)

    cached = inside & (slot >= 0)[:, None]
    if head >= heads + kv_heads:
        place = slot * kv_heads + head - heads - kv_heads
        at = value_cache + place[:, None] * (2 * half) + column[None, :]
        _store_halves(at, first, second, half, cached)
    else:
        angle = position[:, None] * (2 * half) + column[None, :]
        turned_first = _product(first, cos + angle, inside) - _product(second, sin + angle, inside)
        angle += half
        turned_second = _product(second, cos + angle, inside) + _product(first, sin + angle, inside)
        if head < heads:
            at = q + (row * heads + head)[:, None] * (2 * half) + column[None, :]
            _store_halves(at, turned_first, turned_second, half, inside)
        else:
            place = slot * kv_heads + head - heads
            at = key_cache + place[:, None] * (2 * half) + column[None, :]
            _store_halves(at, turned_first, turned_second, half, cached)
    clear_sums(sums, row, low, narrow, padded)
    clear_sums(sums, row, low + half, narrow, padded)


@jit
def _silu_mul_sums_kernel(
    sums: tl.tensor,
    shrunk: tl.tensor,
    b: tl.tensor,
    slots: tl.tensor,
    scales: tl.tensor,
    squares: tl.tensor,
    x: tl.tensor,
    rows: int,
    eps: float,
    width: tl.constexpr,
    hidden: tl.constexpr,
    parts: tl.constexpr,
    rank: tl.constexpr,
    depths: tl.constexpr,
    depth_block: tl.constexpr,
    precision: tl.constexpr,
    padded: tl.constexpr,
    row_block: tl.constexpr,
    column_block: tl.constexpr,
    early: tl.constexpr,
) -> None:
    column = tl.program_id(0) * column_block + tl.arange(0, column_block)
    row = tl.program_id(1) * row_block + tl.arange(0, row_block)
    known, real = column < width, row < rows
    mine, gate_b = load_b(
        *(b, slots, row, column, known, real),
        *(0, 2 * width, rank, depths, depth_block),
    )
    _, up_b = load_b(
        *(b, slots, row, column + width, known, real),
        *(0, 2 * width, rank, depths, depth_block),
    )
    wait_for_previous(early)
    gate = load_sums(
        *(sums, shrunk, b, slots, scales, mine, gate_b, row, column, known, real, 0),
        *(2 * width, parts, rank, depths, depth_block, padded, precision),
    )
    up = load_sums(
        *(sums, shrunk, b, slots, scales, mine, up_b),
        *(row, column + width, known, real, 1),
        *(2 * width, parts, rank, depths, depth_block, padded, precision),
    )
    inverse_rms = load_inverse_rms(squares, row, real, eps, hidden)
    wide = (gate * inverse_rms).to(x.dtype.element_ty).to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(x.dtype.element_ty).to(tl.float32)
    raised = (up * inverse_rms).to(x.dtype.element_ty).to(tl.float32)
    product = (activated * raised).to(x.dtype.element_ty)
    store_tiled(x, product, row, tl.program_id(0), real, padded)
    clear_sums(sums, row, column, known, padded)
    clear_sums(sums, row, column + width, known, padded)
