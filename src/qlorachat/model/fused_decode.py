"""A decode step in eight launches a layer.

A product leaves float32 sums; the kernel that reads them writes the next product's x. A norm's
factor is applied late: by the reader of the product that follows it, for W (factor * x) =
factor * (W x). Adapters add B (A x) to the sums: beside a product A x is computed, and its reader
adds B; but attention, which has many readers for a row, finds that done beside q|k|v, whose x comes
with A x.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlorachat.kernels.card import why_not_products, why_not_step
from qlorachat.kernels.decode_attention import (
    Meeting,
    PagedContext,
    attend_sums,
    has_clusters,
    make_meeting,
)
from qlorachat.kernels.decode_lora import Expanding, Shrinking, shrunk_stride
from qlorachat.kernels.decode_step import add_to_residual, begin_residual, silu_mul_sums
from qlorachat.kernels.nf4 import Nf4Matrix
from qlorachat.kernels.nf4_matmul import MOST_ROWS, nf4_matmul_tiled
from qlorachat.kernels.sums import LateNorm
from qlorachat.kernels.tiles import rows_padded, tiled_shape
from qlorachat.model.cache import KVCache
from qlorachat.model.layer import Layer
from qlorachat.model.lora import LoraProjection
from qlorachat.model.nf4_linear import Nf4Linear
from qlorachat.model.rows import DecodeRows, Rows


def why_not_fused(
    layers: Sequence[Layer],
    dtype: torch.dtype,
    cached: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> str | None:
    """Why a model's decode steps can't be fused; None: they can. cached: of keys and values."""
    device = layers[0].attention_norm.device
    if reason := why_not_products(device):
        return reason
    projections = [each for layer in layers for each in layer.projections]
    if not all(isinstance(each, Nf4Linear) for each in projections):
        return "not all projections are in NF4 on our kernels"
    if any(each.bias is not None for each in projections):
        return "projections have biases"
    if dtype != torch.bfloat16:
        return "float16 has too small a range for a norm that is applied late"
    return why_not_step(heads, kv_heads, head_dim, cached, device)


@dataclass(frozen=True, slots=True)
class _Product:
    """A fused projection and the adapters beside it; `number` counts them through the model."""

    weight: Nf4Matrix
    lora: LoraProjection
    number: int

    @property
    def ranks(self) -> int:
        """Of an adapter, of all parts."""
        return self.lora.a.shape[1] if self.lora.a.ndim == 3 else 0


class _Workspace:
    """What the kernels of a step hand on, for one count of padded rows and of adapters' ranks."""

    def __init__(
        self, products: Sequence[_Product], like: torch.Tensor, padded: int, meeting: Meeting | None
    ) -> None:
        self.meeting = meeting
        widths = [products[place].weight.columns for place in (0, 1, 3)]
        self.hidden, self.attended, self.inner = (
            like.new_zeros(tiled_shape(width, padded)) for width in widths
        )
        most = max(product.weight.rows for product in products)
        # zero between launches: whoever reads a sum writes 0 back
        self._sums = torch.zeros(padded * most, device=like.device)
        # zero at the start of a step: squares of the rows before each norm, A x of each product
        norms, ranks = len(products) // 2, [product.ranks for product in products]
        sizes = [padded * size for size in (norms, *map(shrunk_stride, ranks))]
        self.cleared = torch.empty(sum(sizes), device=like.device)
        squares, *shrunk = self.cleared.split_with_sizes(sizes)
        self._squares = squares.view(norms, padded)
        self._shrunk = [
            own.view(padded, -1)[:, :size] for own, size in zip(shrunk, ranks, strict=True)
        ]

    def reset(self) -> None:
        """After a step that did not end: its sums may not be zero."""
        if not (self._sums.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._sums.zero_()  # a capture runs nothing

    def sums(self, rows: int, outputs: int) -> torch.Tensor:
        """Float32 [rows, outputs], of one product at a time."""
        return self._sums[: rows * outputs].view(rows, outputs)

    def squares(self, rows: int, norm: int) -> torch.Tensor:
        """Float32 [rows], before norm number `norm`."""
        return self._squares[norm, :rows]

    def shrunk(self, rows: int, number: int) -> torch.Tensor:
        """A x of product `number`, float32 [rows, ranks of all parts]."""
        return self._shrunk[number][:rows]


class FusedDecode:
    """The residual stream of decode rows after the last layer."""

    def __init__(
        self,
        layers: Sequence[Layer],
        embedding: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        epsilon: float,
    ) -> None:
        """`rope`: cosines and sines of every position. Of layers that `why_not_fused` allows."""
        pairs = [
            (own.weight, lora)
            for layer in layers
            for own, lora in zip(layer.projections, layer.lora.projections, strict=True)
            if isinstance(own, Nf4Linear)
        ]
        self._products = [_Product(*pair, number) for number, pair in enumerate(pairs)]
        # the norm before the attention and the one before the MLP of each layer
        self._norms = [norm for each in layers for norm in (each.attention_norm, each.mlp_norm)]
        self._embedding, self._rope, self._epsilon = embedding, rope, epsilon
        self._workspaces: dict[tuple[int, int], _Workspace] = {}

    def takes(self, rows: Rows) -> bool:
        looked_up = not rows.lora.active or rows.lora.slots is not None
        paged = isinstance(rows.attention, DecodeRows)
        return paged and looked_up and len(rows.ids) <= MOST_ROWS

    def __call__(self, rows: Rows, cache: KVCache) -> torch.Tensor:
        """(rows, hidden), before the final norm; keys and values are cached."""
        workspace = self._workspace(len(rows.ids))
        try:
            return self._run(rows, cache, workspace)
        except BaseException:
            workspace.reset()  # not dropped: CUDA graphs hold its addresses
            raise

    def _workspace(self, rows: int) -> _Workspace:
        """Kept until the adapters' ranks change, and with them every CUDA graph."""
        padded, ranks = rows_padded(rows), sum(product.ranks for product in self._products)
        if (padded, ranks) not in self._workspaces:
            self._workspaces = {at: own for at, own in self._workspaces.items() if at[1] == ranks}
            new = _Workspace(self._products, self._embedding, padded, self._meeting(padded))
            self._workspaces[padded, ranks] = new
        return self._workspaces[padded, ranks]

    def _meeting(self, rows: int) -> Meeting | None:
        like, head_dim = self._embedding, self._rope[0].shape[1]
        if not like.is_cuda or has_clusters(like.device):
            return None
        qkv, output = self._products[0].weight, self._products[1].weight
        heads, kv_heads = output.columns // head_dim, qkv.heights[1] // head_dim
        return make_meeting(rows, heads, kv_heads, head_dim, like.device)

    def _run(self, rows: Rows, cache: KVCache, space: _Workspace) -> torch.Tensor:
        count = len(rows.ids)
        space.cleared.zero_()
        residual = self._embedding.new_empty(count, self._embedding.shape[1])
        into = (self._norms[0], space.hidden, residual, space.squares(count, 0))
        begin_residual(rows.ids, self._embedding, *into, self._shrinking(rows, space, 0))
        for index in range(len(self._norms) // 2):
            first = 4 * index  # product of the layer: q|k|v, o, gate|up, down
            sums = self._multiply(first, space.hidden, rows, space)
            self._attend(sums, index, rows, space, cache)
            sums = self._multiply(first + 1, space.attended, rows, space)
            self._add(sums, residual, rows, space, 2 * index + 1)
            sums = self._multiply(first + 2, space.hidden, rows, space)
            late = self._late_norm(space, count, 2 * index + 1)
            silu_mul_sums(sums, late, space.inner, self._expanding(rows, space, first + 2))
            sums = self._multiply(first + 3, space.inner, rows, space)
            self._add(sums, residual, rows, space, 2 * index + 2)
        return residual

    def _multiply(
        self, number: int, x: torch.Tensor, rows: Rows, space: _Workspace
    ) -> torch.Tensor:
        """W x of a product; beside it B (A x) for q|k|v, A x for the others."""
        weight, of_qkv = self._products[number].weight, number % 4 == 0
        sums = space.sums(len(rows.ids), weight.rows)
        lora = (self._expanding if of_qkv else self._shrinking)(rows, space, number)
        following = self._products[number + 1 : number + 2]
        ahead = following[0].weight if following else None
        nf4_matmul_tiled(x, weight, sums, lora, ahead=ahead)
        return sums

    def _shrinking(self, rows: Rows, space: _Workspace, number: int) -> Shrinking | None:
        """A of the rows' adapters on a product, and where A x is added up."""
        if not rows.lora.active or rows.lora.slots is None:
            return None
        lora, shrunk = self._products[number].lora, space.shrunk(len(rows.ids), number)
        ranks = None if rows.lora.ranks is None else len(lora.modules) * rows.lora.ranks
        return Shrinking(lora.a, rows.lora.slots, shrunk, rows.lora.one, ranks)

    def _expanding(self, rows: Rows, space: _Workspace, number: int) -> Expanding | None:
        """B of the rows' adapters on a product, and A x."""
        lora = rows.lora
        if not lora.active or lora.slots is None or lora.scales is None:
            return None
        shrunk = space.shrunk(len(rows.ids), number)
        b = self._products[number].lora.b
        return Expanding(shrunk, b, lora.slots, lora.scales, lora.one, lora.ranks)

    def _attend(
        self, sums: torch.Tensor, layer: int, rows: Rows, space: _Workspace, cache: KVCache
    ) -> None:
        assert isinstance(rows.attention, DecodeRows)
        late = self._late_norm(space, len(rows.ids), 2 * layer)
        places = (*self._rope, rows.positions, rows.slots)
        reach = (rows.attention.block_tables, rows.attention.context_lengths)
        context = PagedContext(*places, cache.keys[layer], cache.values[layer], *reach)
        attend_sums(sums, late, context, context.head_dim**-0.5, space.attended, space.meeting)

    def _late_norm(self, space: _Workspace, rows: int, norm: int) -> LateNorm:
        return LateNorm(space.squares(rows, norm), self._embedding.shape[1], self._epsilon)

    def _add(
        self, sums: torch.Tensor, residual: torch.Tensor, rows: Rows, space: _Workspace, norm: int
    ) -> None:
        """Into the residual, and from it the x of the product after norm number `norm`."""
        expanding = self._expanding(rows, space, 2 * norm - 1)
        if norm == len(self._norms):
            add_to_residual(sums, residual, None, None, None, expanding, None)
            return
        into = (self._norms[norm], space.hidden, space.squares(len(residual), norm))
        shrinking = self._shrinking(rows, space, 2 * norm) if norm % 2 == 0 else None
        add_to_residual(sums, residual, *into, expanding, shrinking)
