"""The product of few rows with an NF4 weight and their adapters' B in one launch, on Hopper."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qlorachat.kernels import cuda_source
from qlorachat.kernels.decode_lora import Expanding, expand_reference, expanding_arguments
from qlorachat.kernels.device import count_processors, is_hopper
from qlorachat.kernels.nf4 import Nf4Matrix, dimensions, nf4_dequantize
from qlorachat.kernels.nf4_matmul import TABLE_BYTES
from qlorachat.kernels.tiles import untile
from qlorachat.kernels.tuned import tuned_blocks

_UNIT_BLOCKS = 4  # blocks of 64 k in a unit, CHUNK in the source
_WEIGHT_STAGES = 3  # W_STAGES in the source


class _Instance(NamedTuple):
    """How the kernel for some padded rows is compiled: `Layout` in the source."""

    groups: int  # of 64 rows of the weight in a unit, a warpgroup each
    x_stages: int

    @property
    def threads(self) -> int:
        return 128 * (self.groups + 1)

    def shared_bytes(self, padded: int) -> int:
        x = self.x_stages * (_UNIT_BLOCKS * padded * 128 + 16)
        rows = 64 * self.groups
        return TABLE_BYTES + x + _WEIGHT_STAGES * (rows * 128 + rows * _UNIT_BLOCKS + 16)


INSTANCES = {8: _Instance(3, 3), 16: _Instance(3, 3), 32: _Instance(3, 3), 64: _Instance(3, 2)}


def runs_tiled(device: torch.device) -> bool:
    """Whether `nf4_matmul_tiled` is a kernel where `nf4.why_not` has nothing against."""
    return is_hopper(device)


def nf4_matmul_tiled(
    x: torch.Tensor,
    weight: Nf4Matrix,
    sums: torch.Tensor,
    expanding: Expanding | None = None,
    *,
    blocks: int | None = None,
) -> None:
    """sums += weight x, and B (A x) of the adapters, in one launch; atomic adds, in no order.

    x: tiled [blocks, P, 64] (`tiles.tile`), P of 8, 16, 32 or 64 padded rows; bfloat16 on a card.
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
    if expanding is not None:
        expanding.check(rows, weight.heights, x.dtype)
    if not x.is_cuda:
        nf4_matmul_tiled_reference(x, weight, sums, expanding)
        return
    assert x.dtype == weight.pairs.dtype == torch.bfloat16
    instance = INSTANCES[padded]
    aligned = weight.columns // 64 % _UNIT_BLOCKS == 0
    name = f"nf4_matmul_{padded}" + ("" if aligned else "_ragged")
    function = cuda_source.load_kernel(
        *("nf4_matmul_hopper.cu", x.dtype, name, x.device),
        shared_percent=cuda_source.STEP_SHARED,
    )
    tuned = tuned_blocks("nf4_matmul_tiled", padded, (weight.rows, weight.columns), x.device)
    arguments = (
        cuda_source.TileMap(weight.packed.view(weight.rows, -1)),
        *(weight.absmax, weight.absmax2, weight.pairs, weight.code2, x, sums),
        *(*expanding_arguments(expanding), rows, *dimensions(weight)),
    )
    cuda_source.launch(
        function,
        (blocks or tuned or count_processors(x.device),),
        instance.threads,
        instance.shared_bytes(padded),
        arguments,
        x.device,
        early=True,
    )


def nf4_matmul_tiled_reference(
    x: torch.Tensor,
    weight: Nf4Matrix,
    sums: torch.Tensor,
    expanding: Expanding | None = None,
) -> None:
    """`nf4_matmul_tiled` in plain torch; the weights are written out in float32."""
    plain = untile(x, len(sums), weight.columns).float()
    sums += plain @ nf4_dequantize(weight).T
    expand_reference(sums, expanding, weight.heights)
