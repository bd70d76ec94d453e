"""Adapters beside the base: for each projection, the A and B of every slot stacked in one tensor.

Slot s is [s - 1] of the stacks; slot 0 is the bare base. A row of a step names its slot, so one
launch serves rows of different adapters.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn import functional

from qlorachat import kernels
from qlorachat.adapters import Adapter
from qlorachat.kernels.lora import RANK_GROUP
from qlorachat.kernels.nf4_write_out import LoraMatrices

# the four fused projections of a layer, and the modules whose outputs stand side by side in each
GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass(frozen=True, slots=True)
class LoraRows:
    """Which adapter each row of a step gets.

    On the host: `segments`, runs of rows with one adapter, for matrix products. On the device:
    `slots` int32 (rows,) and `scales` float32 (rows,), for kernels that look a row's adapter up;
    `one`: no two rows have different adapters; `ranks`: the most that one of these has, a multiple
    of 16; None: as many as there is room for.
    """

    active: bool  # whether any row has an adapter
    segments: Sequence[kernels.LoraSegment] = ()
    slots: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    one: bool = False
    ranks: int | None = None


class LoraProjection:
    """The stacked adapters of one fused projection."""

    def __init__(self, modules: Sequence[str], shapes: Mapping[str, tuple[int, int]]) -> None:
        self.modules = modules
        self.columns = list(accumulate((shapes[module][0] for module in modules), initial=0))
        self.inputs = shapes[modules[0]][1]
        self.a = torch.empty(0)  # (slots, parts * rank, in), ranks in the order of kernels.lora
        self.b = torch.empty(0)  # (slots, out, rank)
        self.ranks: list[int] = []  # of each slot, a multiple of 16; past them are zeros

    def allocate(self, slots: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        """Room for `slots` adapters of at most `rank`, all zero; what was there is dropped."""
        parts = len(self.modules)
        self.a = torch.zeros(slots, parts * rank, self.inputs, dtype=dtype, device=device)
        self.b = torch.zeros(slots, self.columns[-1], rank, dtype=dtype, device=device)
        self.ranks = [rank] * slots

    def write(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter's matrices into a slot, its alpha over rank folded into B."""
        own_a, own_b = self.a[slot - 1], self.b[slot - 1]
        own_a.zero_()
        own_b.zero_()
        rank, widest = self.b.shape[2], 0
        each_a = own_a.unflatten(0, (-1, len(self.modules), RANK_GROUP)).unbind(1)
        for part, module in enumerate(self.modules):
            if (pair := adapter.matrices(module)) is None:
                continue
            a, b = pair
            widest = max(widest, len(a))
            scaled = b.float() * adapter.settings.scale_of(module)
            padded = functional.pad(a, (0, 0, 0, rank - len(a)))
            each_a[part].copy_(padded.unflatten(0, (-1, RANK_GROUP)))
            columns = slice(self.columns[part], self.columns[part + 1])
            own_b[columns, : b.shape[1]].copy_(scaled)
        self.ranks[slot - 1] = _whole(widest)

    def of_all(self, rows: LoraRows, count: int) -> LoraMatrices | None:
        """The adapter that all rows of a prefill of `count` have; None if they differ in it."""
        if [(each.start, each.stop) for each in rows.segments] != [(0, count)]:
            return None
        (only,) = rows.segments
        own = only.slot - 1
        return LoraMatrices(self.a[own], self.b[own], self.ranks[own], only.scale)

    def add(self, y: torch.Tensor, x: torch.Tensor, rows: LoraRows) -> torch.Tensor:
        """`y` plus, row by row, scale * B A x of the row's adapter; y is changed in place."""
        if not rows.active:
            return y
        if rows.slots is None or rows.scales is None:
            touched = [each for each in rows.segments if self.ranks[each.slot - 1]]
            kernels.lora_add_segments(x, self.a, self.b, touched, y, self.columns)
            return y
        sums = kernels.lora_shrink(x, self.a, rows.slots)
        kernels.lora_expand_add(sums, self.b, rows.slots, rows.scales, y, self.columns)
        return y


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """The four projections of a layer."""

    qkv: LoraProjection
    output: LoraProjection
    gate_up: LoraProjection
    down: LoraProjection

    @property
    def projections(self) -> list[LoraProjection]:
        """In the order of a step."""
        return [self.qkv, self.output, self.gate_up, self.down]


class AdapterStacks:
    """The stacked adapters of every layer."""

    def __init__(
        self,
        layers: int,
        shapes: Mapping[str, tuple[int, int]],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._layers = [
            LoraLayer(
                **{
                    group: LoraProjection(
                        [f"model.layers.{index}.{module}" for module in modules], shapes
                    )
                    for group, modules in GROUPS.items()
                }
            )
            for index in range(layers)
        ]
        self._dtype, self._device = dtype, device
        self.slots = 0  # how many adapters there is room for
        self.rank = 0
        self._ranks: dict[int, int] = {}  # of the adapter in each slot

    def layer(self, index: int) -> LoraLayer:
        return self._layers[index]

    def has_room(self, slots: int, rank: int) -> bool:
        """Whether there is room for so much and no more."""
        return (self.slots, self.rank) == _rounded(slots, rank)

    def allocate(self, slots: int, rank: int) -> None:
        """Make such room; every adapter has to be written again."""
        self.slots = self.rank = 0  # if memory runs out on the way, there is no room
        wanted = _rounded(slots, rank)
        for projection in self._projections():
            projection.allocate(*wanted, self._dtype, self._device)
        self.slots, self.rank = wanted

    def write(self, slot: int, adapter: Adapter) -> None:
        """Copy an adapter into a slot."""
        self._ranks[slot] = _whole(adapter.largest_rank)
        for projection in self._projections():
            projection.write(slot, adapter)

    def most_ranks(self, slots: Iterable[int]) -> int:
        """Of the adapters in these slots, a multiple of 16; 0 for no slots."""
        return max((self._ranks[slot] for slot in slots), default=0)

    def bytes_of(self, slots: int, rank: int) -> int:
        """What `allocate` would take."""
        slots, rank = _rounded(slots, rank)
        elements = sum(
            len(p.modules) * rank * p.inputs + p.columns[-1] * rank for p in self._projections()
        )
        return slots * elements * self._dtype.itemsize

    def _projections(self) -> list[LoraProjection]:
        return [projection for layer in self._layers for projection in layer.projections]


def _rounded(slots: int, rank: int) -> tuple[int, int]:
    """Kernels are compiled for a count of slots, so few counts."""
    return 1 << (slots - 1).bit_length(), _whole(rank)


def _whole(rank: int) -> int:
    """Sixteens, as tensor cores take ranks."""
    return -(-rank // RANK_GROUP) * RANK_GROUP
