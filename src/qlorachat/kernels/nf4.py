"""NF4 weights in bitsandbytes' own bytes, double quantization kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from bitsandbytes.functional import QuantState
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Nf4Matrix:
    """A weight [N, K] of up to three parts stacked along N, each quantized by itself.

    packed: uint8 [N * K / 2], two weights a byte, the first in the high nibble. absmax: uint8
    [ceil(K / 256), N, 4], one a block of 64, the blocks past K zero: what 256 weights of each of
    some neighbouring rows need lies together. absmax2: float32, one for each 256 absmax bytes of
    a part counted along its rows, part after part.
    Weight = code[nibble] * (code2[absmax] * absmax2 + offset), with code float32 [16], code2
    float32 [256]. pairs: `byte_pairs` of the code in the dtype of x. heights: rows of each part,
    multiples of 16; offsets: one a part.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    absmax2: torch.Tensor
    code: torch.Tensor
    pairs: torch.Tensor
    code2: torch.Tensor
    heights: tuple[int, ...]
    offsets: tuple[float, ...]
    columns: int

    def __post_init__(self) -> None:
        blocks = self.columns // 64
        assert self.columns % 64 == 0
        assert all(height % 16 == 0 for height in self.heights)
        assert len(self.heights) == len(self.offsets) <= 3
        assert self.packed.numel() == self.rows * self.columns // 2
        assert self.absmax.shape == (-(-blocks // 4), self.rows, 4)
        assert self.absmax.is_contiguous()
        assert self.absmax2.numel() == sum(self.groups)
        assert self.packed.dtype == self.absmax.dtype == torch.uint8
        assert self.pairs.shape == (256, 2)

    @property
    def rows(self) -> int:
        return sum(self.heights)

    @property
    def groups(self) -> list[int]:
        """How many absmax2 each part has."""
        return [-(-height * (self.columns // 64) // 256) for height in self.heights]


def stack(parts: Sequence[tuple[torch.Tensor, QuantState]], dtype: torch.dtype) -> Nf4Matrix:
    """Weights that bitsandbytes quantized, one below the other, for x of `dtype`.

    parts: packed bytes and state of each: NF4 in blocks of 64, double quantization in blocks of
    256, and the same K.
    """
    states = [state for _, state in parts]
    first, columns = states[0], states[0].shape[1]
    rows, blocks = sum(state.shape[0] for state in states), columns // 64
    absmax = torch.cat([state.absmax for state in states]).view(rows, blocks)
    whole = functional.pad(absmax, (0, -blocks % 4)).view(rows, -1, 4)
    return Nf4Matrix(
        packed=torch.cat([packed.flatten() for packed, _ in parts]),
        absmax=whole.transpose(0, 1).contiguous(),
        absmax2=torch.cat([state.state2.absmax for state in states]),
        code=first.code,
        pairs=byte_pairs(first.code, dtype),
        code2=first.state2.code,
        heights=tuple(state.shape[0] for state in states),
        offsets=tuple(float(state.offset) for state in states),
        columns=columns,
    )


def nf4_dequantize(weight: Nf4Matrix) -> torch.Tensor:
    """The weights, float32 [N, K], in plain torch."""
    nibbles = torch.stack([weight.packed.flatten() >> 4, weight.packed.flatten() & 15], 1)
    values = weight.code[nibbles.int()].view(-1, 64)
    return (values * absmax(weight)[:, None]).view(weight.rows, weight.columns)


def absmax(weight: Nf4Matrix) -> torch.Tensor:
    """Each block's absmax, float32 [N * K / 64], as bitsandbytes decodes it."""
    blocks = weight.columns // 64
    along_rows = weight.absmax.transpose(0, 1).flatten(1)[:, :blocks].flatten()
    sizes = [height * blocks for height in weight.heights]
    parts = zip(
        along_rows.split(sizes), weight.absmax2.split(weight.groups), weight.offsets, strict=True
    )
    scales = [
        weight.code2[codes.int()] * absmax2.repeat_interleave(256)[: len(codes)] + offset
        for codes, absmax2, offset in parts
    ]
    return torch.cat(scales)


def random_matrix(heights: tuple[int, ...], columns: int, generator: torch.Generator) -> Nf4Matrix:
    """Random bytes on the generator's device, for trials and measurements; absmax up to 1."""
    device = generator.device
    rows = sum(heights)
    groups = sum(-(-height * (columns // 64) // 256) for height in heights)
    spread = torch.linspace(-1, 1, 256, device=device)
    code = spread[::17].contiguous()

    def random_bytes(*shape: int) -> torch.Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator)

    return Nf4Matrix(
        packed=random_bytes(rows * columns // 2),
        absmax=random_bytes(-(-columns // 256), rows, 4),
        absmax2=torch.rand(groups, device=device, generator=generator),
        code=code,
        pairs=byte_pairs(code, torch.bfloat16),
        code2=spread,
        heights=heights,
        offsets=(0.0,) * len(heights),
        columns=columns,
    )


def byte_pairs(code: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[256, 2] of the dtype: the two weights that each byte stands for, high nibble first."""
    byte = torch.arange(256, device=code.device)
    return code.to(dtype)[torch.stack([byte >> 4, byte & 15], 1)]


def dimensions(weight: Nf4Matrix) -> list[int | float]:
    """What the sources call rows, columns, start1, start2, group1, group2, offset0 to offset2."""
    starts, groups = accumulate(weight.heights), accumulate(weight.groups)
    return [
        *(weight.rows, weight.columns),
        *_three(list(starts))[:2],
        *_three(list(groups))[:2],
        *_three(weight.offsets),
    ]


def _three(values: Sequence[int] | Sequence[float]) -> list[int | float]:
    """Padded with the last one: parts that are not there begin at the end."""
    return [*values, *[values[-1]] * (3 - len(values))]
