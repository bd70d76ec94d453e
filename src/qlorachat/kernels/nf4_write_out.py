"""NF4 weights written out in 16 bit, for products with many rows; an adapter in them, if wanted."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qlorachat.kernels import cuda_source
from qlorachat.kernels.cuda_source import Argument
from qlorachat.kernels.lora import by_parts
from qlorachat.kernels.nf4 import Nf4Matrix, dimensions, nf4_dequantize

SOURCE = "nf4_write_out.cu"
MOST_RANKS = 32  # with 64, adding B (A x) to the product is as quick
_THREADS, _WIDTH = 256, 128  # of a block; columns that it has, WIDTH in the source
_COPIES_BYTES = 16 * 32 * 4  # of shared memory, COPIES in the source


class LoraMatrices(NamedTuple):
    """One adapter of a weight [N, K]: scale * B A, for each of the weight's parts.

    a: [parts * R, K], its ranks in the order of `lora`. b: [N, R], alpha / r folded in. Both
    contiguous, in bfloat16. ranks: of R, a multiple of 16, 0 for none in this weight; past them are
    zeros. scale: the adapter's strength.
    """

    a: torch.Tensor
    b: torch.Tensor
    ranks: int
    scale: float


def nf4_write_out(weight: Nf4Matrix, lora: LoraMatrices | None = None) -> torch.Tensor:
    """weight + scale * B A, bfloat16 [N, K], rounded once; MOST_RANKS ranks at most.

    Without an adapter to the bit as bitsandbytes decodes it. On a device that
    `card.why_not_products` has nothing against; elsewhere use `nf4_write_out_reference`.
    """
    ranks = 0 if lora is None else lora.ranks
    adapter: tuple[Argument, ...] = (None, None, 0, 0.0)
    if lora is not None:
        stride = lora.b.shape[1]
        assert ranks in range(0, min(stride, MOST_RANKS) + 1, 16)
        assert lora.a.shape == (len(weight.heights) * stride, weight.columns)
        assert lora.b.shape == (weight.rows, stride)
        assert lora.a.dtype == lora.b.dtype == torch.bfloat16
        assert lora.a.is_contiguous()
        assert lora.b.is_contiguous()
        adapter = (lora.a, lora.b, stride, float(lora.scale))
    shape, device = (weight.rows, weight.columns), weight.packed.device
    out = torch.empty(shape, dtype=torch.bfloat16, device=device)
    name = f"nf4_write_out_{ranks}" if ranks else "nf4_write_out"
    function = cuda_source.load_kernel(SOURCE, name, device)
    arguments = (
        *(weight.packed, weight.absmax, weight.absmax2, weight.code, weight.code2, out),
        *adapter,
        *dimensions(weight),
    )
    height = 256 if ranks else 128  # of a block, rows of one part
    grid = (-(-weight.columns // _WIDTH), sum(-(-own // height) for own in weight.heights))
    cuda_source.launch(function, grid, _THREADS, _shared_bytes(height, ranks), arguments, device)
    return out


def nf4_write_out_reference(weight: Nf4Matrix, lora: LoraMatrices | None = None) -> torch.Tensor:
    """`nf4_write_out` in plain torch, float32 [N, K]."""
    plain = nf4_dequantize(weight)
    if lora is None:
        return plain
    each_a = by_parts(lora.a.float().T, len(weight.heights)).unbind(1)
    each_b = lora.b.float().split(weight.heights)
    added = torch.cat([b @ a.T for a, b in zip(each_a, each_b, strict=True)])
    return plain + lora.scale * added


def _shared_bytes(height: int, ranks: int) -> int:
    """Code values, packed weights and A, padded so that no two lanes want one bank."""
    return _COPIES_BYTES + height * (_WIDTH // 2 + 16) + ranks * (2 * _WIDTH + 16)
