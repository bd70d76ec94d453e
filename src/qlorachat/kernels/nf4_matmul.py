"""The product of few rows with an NF4 weight, on NVIDIA cards from Ampere on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qlorachat.kernels import cuda_source
from qlorachat.kernels.cuda_source import Argument
from qlorachat.kernels.decode_lora import (
    Expanding,
    Shrinking,
    beside_arguments,
    expand_reference,
    shrink_reference,
)
from qlorachat.kernels.device import count_processors, is_hopper
from qlorachat.kernels.nf4 import Nf4Matrix, dimensions, nf4_dequantize
from qlorachat.kernels.tiles import rows_padded, tile, untile
from qlorachat.kernels.tuned import tuned_blocks

MOST_ROWS = 64  # above, it is better to write the weights out and multiply
_TABLE_BYTES, _SCALES_BYTES = 65536, 1024  # of shared memory, TABLE and SCALES in the sources
_UNIT_BLOCKS = 4  # blocks of 64 k in a unit, CHUNK in the sources


class _Instance(NamedTuple):
    """How the kernel for some padded rows is launched."""

    threads: int
    shared_bytes: int


def nf4_matmul(x: torch.Tensor, weight: Nf4Matrix) -> torch.Tensor:
    """x @ weight^T, [M, N], of x's dtype; sums in float32.

    x: [M, K], contiguous, 1 to 64 rows; bfloat16 on a card, one that
    `card.why_not_products` has nothing against.
    """
    sums = torch.empty(len(x), weight.rows, device=x.device)
    nf4_matmul_tiled(tile(x, rows_padded(len(x)), sums), weight, sums)
    return sums.to(x.dtype)


def nf4_matmul_tiled(
    x: torch.Tensor,
    weight: Nf4Matrix,
    sums: torch.Tensor,
    lora: Shrinking | Expanding | None = None,
    *,
    ahead: Nf4Matrix | None = None,
    blocks: int | None = None,
) -> None:
    """sums += weight x, and A x or B (A x) of adapters, in one launch; atomic adds, in no order.

    x: tiled [blocks, P, 64] (`tiles.tile`), P of 8, 16, 32 or 64 padded rows; bfloat16 on a card.
    sums: float32 [M, N], M of them real. The weight's two-level absmax is applied to each block's
    float32 sum; only the 16 code values are rounded to the dtype.
    ahead: the weight of the product that follows, if any: on Hopper, its first units are brought to
    the L2. blocks: how many share the product; None: see `tuned`.
    """
    rows, padded = len(sums), x.shape[1]
    assert x.shape == (-(-weight.columns // 256) * 4, padded, 64)
    assert padded in (8, 16, 32, 64)
    assert 1 <= rows <= padded
    assert sums.shape == (rows, weight.rows)
    assert sums.dtype == torch.float32
    assert all(tensor.is_contiguous() for tensor in (x, sums))
    if isinstance(lora, Shrinking):
        lora.check(rows, weight.columns, x.dtype)
    elif lora is not None:
        lora.check(rows, weight.heights, x.dtype)
    if not x.is_cuda:
        nf4_matmul_tiled_reference(x, weight, sums, lora)
        return
    assert x.dtype == weight.pairs.dtype == torch.bfloat16
    hopper = is_hopper(x.device)
    instance = _hopper_instance(padded) if hopper else _instance(padded)
    packed = weight.packed.view(weight.rows, -1)
    aligned = weight.columns // 64 % _UNIT_BLOCKS == 0
    function = cuda_source.load_kernel(
        "nf4_matmul_hopper.cu" if hopper else "nf4_matmul.cu",
        f"nf4_matmul_{padded}" + ("" if aligned else "_ragged"),
        x.device,
        shared_percent=cuda_source.STEP_SHARED,
    )
    tuned = tuned_blocks(padded, (weight.rows, weight.columns), x.device)
    arguments = (
        cuda_source.TileMap(packed) if hopper else packed,
        *(weight.absmax, weight.absmax2, weight.pairs, weight.code2, x, sums),
        *(*beside_arguments(lora), rows, *dimensions(weight)),
    )
    if hopper:
        arguments += _ahead_arguments(ahead, packed)
    grid = (blocks or tuned or count_processors(x.device),)
    cuda_source.launch(function, grid, *instance, arguments, x.device, early=True)


def _ahead_arguments(ahead: Nf4Matrix | None, packed: torch.Tensor) -> tuple[Argument, ...]:
    if ahead is None:
        return cuda_source.TileMap(packed), None, 0, 0
    next_packed = cuda_source.TileMap(ahead.packed.view(ahead.rows, -1))
    return next_packed, ahead.absmax, ahead.rows, ahead.columns


def nf4_matmul_tiled_reference(
    x: torch.Tensor,
    weight: Nf4Matrix,
    sums: torch.Tensor,
    lora: Shrinking | Expanding | None = None,
) -> None:
    """`nf4_matmul_tiled` in plain torch; the weights are written out in float32."""
    plain = untile(x, len(sums), weight.columns).float()
    sums += plain @ nf4_dequantize(weight).T
    if isinstance(lora, Shrinking):
        shrink_reference(plain, lora)
    else:
        expand_reference(sums, lora, weight.heights)


def _instance(padded: int) -> _Instance:
    """`Layout` in nf4_matmul.cu: eight warps for the product, four for the adapters."""
    unit = _UNIT_BLOCKS * padded * 128  # bytes of x
    x_bytes = unit if padded == 64 else 2 * unit
    absmax_bytes = 2 * 128 * _UNIT_BLOCKS  # of two units of 128 rows
    return _Instance(32 * (8 + 4), _TABLE_BYTES + _SCALES_BYTES + absmax_bytes + x_bytes)


def _hopper_instance(padded: int) -> _Instance:
    """`Layout` in nf4_matmul_hopper.cu: three warpgroups for the product, one for all else."""
    rows = 3 * 64  # of the weight, in a unit
    weight_stages = 3 if padded == 8 else 2
    x_bytes = 3 * (_UNIT_BLOCKS * padded * 128 + 16)
    weight_bytes = weight_stages * (rows * 128 + rows * _UNIT_BLOCKS + 16)
    return _Instance(128 * (3 + 1), _TABLE_BYTES + x_bytes + weight_bytes)
