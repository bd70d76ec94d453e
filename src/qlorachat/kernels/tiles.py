"""Rows as NF4 products read them: operand B of tensor cores, with 128-byte swizzle.

A tiled x is [blocks, P, 64]: blocks of 64 columns, in units of 4 of them, and P padded rows. What
is padding, of either kind, is allocated zero and stays so.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from qlorachat.kernels import cuda_source

SOURCE = "tiles.cu"
_THREADS = 256
_BLOCK = 64  # columns
_UNIT = 4  # blocks


def rows_padded(rows: int) -> int:
    """P, the rows of a tiled x that has `rows` real ones: 8, 16, 32 or 64."""
    assert 1 <= rows <= 64
    return max(8, 1 << (rows - 1).bit_length())


def tiled_shape(columns: int, padded: int) -> tuple[int, int, int]:
    """The shape of a tiled x [`padded` rows, `columns`]."""
    assert columns % _BLOCK == 0
    return -(-columns // (_UNIT * _BLOCK)) * _UNIT, padded, _BLOCK


def tile(x: torch.Tensor, padded: int, sums: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] tiled, [blocks, P, 64], with zeros for padding; M is at most P = `padded`.

    On a card: contiguous and of 16 bit. sums: float32, contiguous, cleared in the same launch.
    """
    if not x.is_cuda:
        if sums is not None:
            sums.zero_()
        return tile_reference(x, padded)
    rows, columns = x.shape
    assert sums is None or sums.is_contiguous()
    assert sums is None or sums.dtype == torch.float32
    assert x.is_contiguous()
    assert x.element_size() == 2
    tiled = x.new_empty(tiled_shape(columns, padded))
    pairs = tiled.numel() // padded // 2
    function = cuda_source.load_kernel(SOURCE, "tile", x.device)
    grid = (-(-padded * pairs // _THREADS),)
    count = 0 if sums is None else sums.numel()
    arguments = (x, tiled, sums, rows, columns, padded, pairs, count)
    cuda_source.launch(function, grid, _THREADS, 0, arguments, x.device)
    return tiled


def tile_reference(x: torch.Tensor, padded: int) -> torch.Tensor:
    """`tile` in plain torch."""
    rows, columns = x.shape
    blocks = tiled_shape(columns, padded)[0]
    full = functional.pad(x, (0, blocks * _BLOCK - columns, 0, padded - rows))
    lanes = full.view(padded, blocks, 4, 4, 2, 2)  # [P, blocks, t, s, h, e]
    return _swizzle(lanes.permute(1, 0, 3, 4, 2, 5).reshape(blocks, padded, 8, 8))


def untile(tiled: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The first rows and columns of a tiled x, [rows, columns]."""
    blocks, padded, _ = tiled.shape
    chunks = _swizzle(tiled.view(blocks, padded, 8, 8))
    lanes = chunks.view(blocks, padded, 4, 2, 4, 2).permute(1, 0, 4, 2, 3, 5)
    return lanes.reshape(padded, blocks * _BLOCK)[:rows, :columns]


def write_tiled(x: torch.Tensor, tiled: torch.Tensor) -> None:
    """x [M, K] written to a tiled tensor, whose padding stays as it is."""
    rows, blocks = len(x), x.shape[1] // _BLOCK
    tiled[:blocks, :rows] = tile_reference(x, tiled.shape[1])[:blocks, :rows]


def _swizzle(chunks: torch.Tensor) -> torch.Tensor:
    """[blocks, P, 8, 8] with the 8 pieces of each row at their place xor the row's last bits."""
    blocks, padded = chunks.shape[:2]
    row = torch.arange(padded, device=chunks.device)[:, None]
    place = torch.arange(8, device=chunks.device) ^ (row & 7)
    return chunks[:, row, place].view(blocks, padded, _BLOCK)
