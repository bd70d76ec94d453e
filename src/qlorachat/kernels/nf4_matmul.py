"""The product of few rows with an NF4 weight, on NVIDIA cards from Ampere on."""

from dataclasses import dataclass

import torch

from qlorachat.kernels import cuda_source
from qlorachat.kernels.device import count_processors, starts_early
from qlorachat.kernels.nf4 import Nf4Matrix, dimensions, nf4_dequantize
from qlorachat.kernels.tuned import tuned_blocks

MOST_ROWS = 64  # above, it is better to write the weights out and multiply
TABLE_BYTES = 65536  # of shared memory, TABLE in the sources


def nf4_matmul(x: torch.Tensor, weight: Nf4Matrix, *, blocks: int | None = None) -> torch.Tensor:
    """x @ weight^T, [M, N], of x's dtype; sums in float32.

    x: [M, K], contiguous, bfloat16 or float16, 1 to 64 rows. The weight's two-level absmax is
    applied to each block's float32 sum; only the 16 code values are rounded to the dtype. On a
    card that `nf4.why_not` has nothing against. blocks: how many share the weight's rows, or
    more where a block has no room for so many; None: see `tuned`.
    """
    rows = len(x)
    assert x.shape == (rows, weight.columns)
    assert x.is_contiguous()
    assert 1 <= rows <= MOST_ROWS
    if not x.is_cuda:
        return nf4_matmul_reference(x, weight)
    assert x.dtype == weight.pairs.dtype
    out = x.new_empty(rows, weight.rows)
    shape = _shape(rows)
    tuned = tuned_blocks("nf4_matmul", 8 * shape.tiles, (weight.rows, weight.columns), x.device)
    blocks = blocks or tuned or count_processors(x.device)
    groups = _groups_of_a_block(weight.rows // 16, blocks, shape, x.device)
    shared_bytes = TABLE_BYTES + groups * shape.bytes_of_a_group
    aligned = weight.columns // 64 % shape.chunk == 0
    name = f"nf4_matmul_{8 * shape.tiles}" + ("" if aligned else "_ragged")
    function = cuda_source.load_kernel("nf4_matmul.cu", x.dtype, name, x.device)
    grid = (-(-(weight.rows // 16) // groups), -(-rows // (8 * shape.tiles)))
    arguments = (
        *(weight.packed, weight.absmax, weight.absmax2),
        *(weight.pairs, weight.code2, x, out),
        *(rows, *dimensions(weight), groups),
    )
    cuda_source.launch(
        function,
        grid,
        32 * shape.warps,
        shared_bytes,
        arguments,
        x.device,
        early=starts_early(x.device),
    )
    return out


def nf4_matmul_reference(x: torch.Tensor, weight: Nf4Matrix) -> torch.Tensor:
    """`nf4_matmul` in plain torch, on any device; the weights are written out in float32."""
    return (x.float() @ nf4_dequantize(weight).T).to(x.dtype)


@dataclass(frozen=True, slots=True)
class _Shape:
    """How a kernel of the source is instanced."""

    tiles: int  # of 8 rows of x
    chunk: int  # blocks of 64 weights
    warps: int

    @property
    def bytes_of_a_group(self) -> int:
        """Shared memory for the partial sums of 16 weight rows."""
        return 512 * self.tiles * self.warps


def _shape(rows: int) -> _Shape:
    if rows <= 8:
        return _Shape(1, 4, 16)
    return _Shape(2, 2, 16) if rows <= 16 else _Shape(4, 2, 8)


def _groups_of_a_block(groups: int, blocks: int, shape: _Shape, device: torch.device) -> int:
    """Of 16 rows of the weight; as many as one of `blocks` has to take, or as fit."""
    room = cuda_source.shared_bytes(device) - TABLE_BYTES
    return max(1, min(-(-groups // blocks), room // shape.bytes_of_a_group))
