"""Blocks of the paged KV cache: each one is free, kept for its content, or held by sequences.

A block is shared only when it is full and its key, a hash of the model, the adapter and every
token up to its end, is the same.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from qlorachat.engine.sequence import Sequence
from qlorachat.tokens import TokenRequest


class BlockPool:
    """Hands blocks to sequences, counts their users and finds prefixes computed before."""

    def __init__(
        self, num_blocks: int, block_size: int, *, base: str = "", prefix_caching: bool = True
    ) -> None:
        """`block_size` is in tokens; `base` names the weights: checkpoint and quantization."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._base = base
        self._prefix_caching = prefix_caching
        self._users = [0] * num_blocks
        self._free = list(range(num_blocks))
        self._kept: OrderedDict[int, None] = OrderedDict()  # no user; least recently used first
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._coming: Counter[bytes] = Counter()  # keys of blocks being computed by sequences

    @property
    def num_free(self) -> int:
        """Blocks without a user, those kept for their content among them."""
        return len(self._free) + len(self._kept)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_allocate(self, sequence: Sequence, spare: int = 0) -> bool:
        """Whether all known tokens fit, and `spare` blocks stay free."""
        shared = sum(self._users[block] > 0 for block in self._match(sequence))
        return self.blocks_for(len(sequence.tokens)) - shared + spare <= self.num_free

    def allocate(self, sequence: Sequence) -> None:
        """Give a sequence blocks for all its known tokens, cached ones first."""
        assert not sequence.block_table
        hits = self._match(sequence)
        for block in hits:
            self._share(block)
        fresh = self.blocks_for(len(sequence.tokens)) - len(hits)
        # in order: blocks that follow each other are read without a copy
        sequence.block_table = hits + sorted(self._take() for _ in range(fresh))
        sequence.num_cached_tokens = len(hits) * self.block_size
        self._coming.update(self._expected(sequence)[len(hits) :])

    def is_coming(self, sequence: Sequence) -> bool:
        """Whether somebody is computing the next block that a waiting sequence needs."""
        hits = len(self._match(sequence))
        return any(key in self._coming for key in self._expected(sequence)[hits : hits + 1])

    def can_append(self, sequence: Sequence) -> bool:
        """Whether there is a place for the position after those scheduled."""
        return self._has_room(sequence) or self.num_free > 0

    def append(self, sequence: Sequence) -> None:
        """Make sure of a place for the position after those scheduled."""
        if not self._has_room(sequence):
            sequence.block_table.append(self._take())

    def cache(self, sequence: Sequence, start: int, end: int) -> None:
        """Let others find the blocks that were filled by computing positions start..end-1."""
        first, last = start // self.block_size, end // self.block_size
        if first == last or not self._prefix_caching:
            return
        keys = self._keys(sequence, last)[first:]
        self._coming -= Counter(keys)
        for block, key in zip(sequence.block_table[first:last], keys, strict=True):
            if key not in self._block_of:
                self._key_of[block], self._block_of[key] = key, block

    def deallocate(self, sequence: Sequence) -> None:
        """Take a sequence's blocks back; the end of a cached prefix goes before its beginning."""
        # A step in flight may still write a position of the last block here, which no cached block
        # has; whoever gets the block next writes in a later launch, and reads only what it wrote.
        for block in reversed(sequence.block_table):
            self._release(block)
        self._coming -= Counter(self._expected(sequence))
        sequence.block_table = []

    def _has_room(self, sequence: Sequence) -> bool:
        return sequence.num_scheduled < len(sequence.block_table) * self.block_size

    def _match(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the longest known prefix that leaves a token to compute."""
        blocks = []
        for key in self._expected(sequence):
            if (block := self._block_of.get(key)) is None:
                break
            blocks.append(block)
        return blocks

    def _expected(self, sequence: Sequence) -> list[bytes]:
        """Keys of the full blocks before the last known token, which has to be computed."""
        if not self._prefix_caching or sequence.request.prompt_logprobs:
            return []  # for the latter the logits of every position are needed
        return self._keys(sequence, (len(sequence.tokens) - 1) // self.block_size)

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """Keys of the first `count` blocks of tokens, each one made from the key before it."""
        keys, size = sequence.block_keys, self.block_size
        while len(keys) < count:
            parent = keys[-1] if keys else root_key(self._base, sequence.request)
            keys.append(block_key(parent, sequence.tokens[len(keys) * size :][:size]))
        return keys[:count]

    def _take(self) -> int:
        """A block for new content: an empty one, else the least recently used of those kept."""
        block = self._free.pop() if self._free else self._evict()
        self._users[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block

    def _share(self, block: int) -> None:
        self._kept.pop(block, None)
        self._users[block] += 1

    def _release(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block]:
            return
        if block in self._key_of:
            self._kept[block] = None
        else:
            self._free.append(block)


def root_key(base: str, request: TokenRequest) -> bytes:
    """The key before a request's first block: what its tokens are computed with."""
    scale = float(request.adapter_scale) if request.adapter else None
    return _digest(repr((base, request.adapter, scale)).encode())


def block_key(parent: bytes, tokens: Iterable[int]) -> bytes:
    """The key of a full block of `tokens` that follows the block of key `parent`."""
    return _digest(parent + array("q", tokens).tobytes())


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=16).digest()
