"""The product of few rows with an NF4 weight and their adapters' A in one launch, on Hopper."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qlorachat.kernels import cuda_source
from qlorachat.kernels.device import count_processors, is_hopper
from qlorachat.kernels.nf4 import Nf4Matrix, dimensions, nf4_dequantize
from qlorachat.kernels.nf4_matmul import TABLE_BYTES
from qlorachat.kernels.tiles import untile
from qlorachat.kernels.tuned import tuned_blocks

_STAGES = 4  # of the ring of x, STAGES in the source
_UNIT_BLOCKS = 4  # blocks of 64 k in a unit, CHUNK in the source
_STRIDE = 20  # of 16 ranks of a row of x, STRIDE in the source
_SPLITS = 4  # of K among the blocks that multiply with A
_FREE = 4  # processors left to those


class Shrinking(NamedTuple):
    """The adapters beside a product: shrunk += A x of each row's own slot.

    a: [S, R, K], contiguous, of x's dtype; R, the ranks of all parts, is a multiple of 16. b: [S,
    N, R of a part], which the reader of the sums will want: it is brought into the L2. slots:
    int32 [M], from 1, 0 for none. shrunk: float32 [M, S * R].
    """

    a: torch.Tensor
    b: torch.Tensor
    slots: torch.Tensor
    shrunk: torch.Tensor

    def check(self, x: torch.Tensor, rows: int, columns: int) -> None:
        slots, ranks, _ = self.a.shape
        assert self.a.shape == (slots, ranks, columns)
        assert self.a.dtype == self.b.dtype == x.dtype
        assert len(self.b) == slots
        assert ranks % 16 == 0
        assert self.slots.shape == (rows,)
        assert self.slots.dtype == torch.int32
        assert self.shrunk.shape == (rows, slots * ranks)
        assert self.shrunk.dtype == torch.float32
        assert all(tensor.is_contiguous() for tensor in self)


class _Instance(NamedTuple):
    """How the kernel for some padded rows is compiled."""

    threads: int
    per_processor: int  # blocks


INSTANCES = {
    8: _Instance(256, 2),
    16: _Instance(256, 2),
    32: _Instance(384, 1),
    64: _Instance(384, 1),
}


def runs_tiled(device: torch.device) -> bool:
    """Whether `nf4_matmul_tiled` is a kernel where `nf4.why_not` has nothing against."""
    return is_hopper(device)


def nf4_matmul_tiled(
    x: torch.Tensor,
    weight: Nf4Matrix,
    sums: torch.Tensor,
    adapters: Shrinking | None = None,
    *,
    blocks: int | None = None,
) -> None:
    """sums += weight x, and A x of the adapters, in one launch; atomic adds, in no order.

    x: tiled [blocks, P, 64] (`tiles.tile`), bfloat16 or float16, P of 8, 16, 32 or 64 padded rows.
    sums: float32 [M, N], M of them real.
    blocks: how many share the product; None: see `tuned`.
    """
    rows, padded = len(sums), x.shape[1]
    assert x.shape == (-(-weight.columns // 256) * 4, padded, 64)
    assert padded in INSTANCES
    assert 1 <= rows <= padded
    assert sums.shape == (rows, weight.rows)
    assert sums.dtype == torch.float32
    assert all(tensor.is_contiguous() for tensor in (x, sums))
    if adapters is not None:
        adapters.check(x, rows, weight.columns)
    if not x.is_cuda:
        nf4_matmul_tiled_reference(x, weight, sums, adapters)
        return
    assert x.dtype == weight.pairs.dtype
    threads, per_processor = INSTANCES[padded]
    aligned = weight.columns // 64 % _UNIT_BLOCKS == 0
    name = f"nf4_matmul_{padded}" + ("" if aligned else "_ragged")
    function = cuda_source.load_kernel(
        *("nf4_matmul_hopper.cu", x.dtype, name, x.device),
        shared_percent=cuda_source.STEP_SHARED,
    )
    tuned = tuned_blocks("nf4_matmul_tiled", padded, (weight.rows, weight.columns), x.device)
    blocks = blocks or tuned or per_processor * (count_processors(x.device) - _FREE)
    ring = _STAGES * (_UNIT_BLOCKS * padded * 128 + 16)
    partial = threads // 32 * padded * _STRIDE * 4  # float32 sums of A x, one of every warp
    slots, ranks = (1, 0) if adapters is None else adapters.a.shape[:2]
    b_bytes = 0 if adapters is None else adapters.b[0].numel() * adapters.b.element_size()
    arguments = (
        *(weight.packed, weight.absmax, weight.absmax2),
        *(weight.pairs, weight.code2, x, sums),
        *(adapters or (None,) * 4),
        *(rows, *dimensions(weight), slots, ranks, _SPLITS, b_bytes, blocks),
    )
    cuda_source.launch(
        function,
        (blocks + slots * ranks // 16 * _SPLITS,),
        threads,
        max(TABLE_BYTES + ring, partial),
        arguments,
        x.device,
        early=True,
    )


def nf4_matmul_tiled_reference(
    x: torch.Tensor,
    weight: Nf4Matrix,
    sums: torch.Tensor,
    adapters: Shrinking | None = None,
) -> None:
    """`nf4_matmul_tiled` in plain torch; the weights are written out in float32."""
    plain = untile(x, len(sums), weight.columns).float()
    sums += plain @ nf4_dequantize(weight).T
    if adapters is not None:
        every = torch.einsum("mk,srk->msr", plain, adapters.a.float())
        numbers = torch.arange(1, len(adapters.a) + 1, device=x.device)
        own = adapters.slots[:, None] == numbers
        adapters.shrunk.add_((every * own[:, :, None]).flatten(1))
