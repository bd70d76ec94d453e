"""What one step of the engine runs: frozen, integers only, all that a runner gets to know.

Batches are launched in the order they were planned, on one stream of the device: whatever a batch
reads or writes, it does after every batch before it.
"""

from dataclasses import dataclass

from qlorachat.tokens import TokenRequest


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """One sequence's share of a step: consecutive positions whose keys and values are computed."""

    request: TokenRequest  # sampling settings, adapter and its strength
    row: int  # where the runner keeps this sequence's state, such as its last sampled token
    slot: int  # where the adapter's weights are on the device; 0 is the base model alone
    start: int  # first position computed; all before it are in the blocks
    tokens: tuple[int, ...] | None  # one for each position; None: the one this row sampled last
    block_table: tuple[int, ...]  # position p is at offset p % block_size of [p // block_size]
    sample: bool  # whether the last position's logits give a token
    history: tuple[int, ...] = ()  # prompt and answer so far where the row's state begins anew

    @property
    def num_tokens(self) -> int:
        return 1 if self.tokens is None else len(self.tokens)

    @property
    def end(self) -> int:
        """The position after the last one computed; a sampled token's own position."""
        return self.start + self.num_tokens

    def cache_slot(self, position: int, block_size: int) -> int:
        """Where a position's keys and values are: block * block_size + offset."""
        return self.block_table[position // block_size] * block_size + position % block_size


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One step. A row index occurs once; no row reads a position that another one writes."""

    decodes: tuple[ScheduledRow, ...]  # one position each, its token on the device already
    prefills: tuple[ScheduledRow, ...]  # chunks of prompts

    @property
    def rows(self) -> tuple[ScheduledRow, ...]:
        return self.decodes + self.prefills
