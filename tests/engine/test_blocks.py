"""The block pool: users counted, prefixes found by what they were computed with, oldest out."""

from dataclasses import replace

import pytest

from qlorachat.engine.blocks import BlockPool, block_key, root_key
from qlorachat.engine.sequence import Sequence
from qlorachat.tokens import SamplingParams, TokenRequest

REQUEST = TokenRequest(0, tuple(range(10)), SamplingParams(), frozenset())


def sequence(*prompt: int, adapter: str | None = None, scale: float = 1.0) -> Sequence:
    request = replace(REQUEST, prompt=prompt, adapter=adapter, adapter_scale=scale)
    return Sequence(request, lambda event: None, 100)


def compute(blocks: BlockPool, it: Sequence) -> Sequence:
    """Allocate and fill a sequence's blocks, as if its prompt had run."""
    assert blocks.can_allocate(it)
    blocks.allocate(it)
    it.start(row=0, slot=0)
    row = it.schedule(it.num_prefill_left)
    blocks.cache(it, row.start, row.end)
    return it


def test_blocks_are_given_for_every_token_and_taken_back() -> None:
    blocks = BlockPool(4, 4)
    it = sequence(*range(10))
    blocks.allocate(it)
    first = it.block_table[0]
    assert it.block_table == [first, first + 1, first + 2]
    assert blocks.num_free == 1
    blocks.deallocate(it)
    assert it.block_table == []
    assert blocks.num_free == 4


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (1, True), (2, False)])
def test_admission_asks_for_all_tokens_and_what_is_to_be_spared(spare: int, fits: bool) -> None:
    assert BlockPool(4, 4).can_allocate(sequence(*range(10)), spare) is fits


def test_a_block_is_appended_when_the_last_one_is_full() -> None:
    blocks = BlockPool(3, 2)
    it = compute(blocks, sequence(1, 2, 3))
    for position, length in ((3, 2), (4, 3), (5, 3)):
        assert blocks.can_append(it)
        blocks.append(it)
        assert it.schedule(1).start == position
        assert len(it.block_table) == length
    assert not blocks.can_append(it)


def test_a_prefix_is_shared_in_full_blocks_and_leaves_a_token_to_compute() -> None:
    blocks = BlockPool(16, 4)
    first = compute(blocks, sequence(*range(8)))
    same, longer, other = sequence(*range(8)), sequence(*range(11)), sequence(0, 1, 2, 3, 9, 9)
    for it, shared in ((same, 1), (longer, 2), (other, 1)):
        blocks.allocate(it)
        assert it.num_cached_tokens == 4 * shared
        assert it.block_table[:shared] == first.block_table[:shared]
        assert not set(it.block_table[shared:]) & set(first.block_table)
    for it in (first, same, longer, other):
        blocks.deallocate(it)
    assert blocks.num_free == 16


def test_the_same_tokens_after_others_or_with_another_adapter_are_not_shared() -> None:
    blocks = BlockPool(16, 2)
    compute(blocks, sequence(1, 2, 3, 4, adapter="a"))
    for it in (
        sequence(3, 4, 3, 4, 5, adapter="a"),
        sequence(1, 2, 3, 4),
        sequence(1, 2, 3, 4, adapter="b"),
        sequence(1, 2, 3, 4, adapter="a", scale=0.5),
    ):
        blocks.allocate(it)
        assert it.num_cached_tokens == 0
        blocks.deallocate(it)


def test_keys_know_the_base_the_adapter_its_strength_and_all_tokens_before() -> None:
    adapted = replace(REQUEST, adapter="a")
    roots = [
        root_key("base nf4", REQUEST),
        root_key("base 16bit", REQUEST),
        root_key("base nf4", adapted),
        root_key("base nf4", replace(adapted, adapter="b")),
        root_key("base nf4", replace(adapted, adapter_scale=0.5)),
    ]
    assert len(set(roots)) == 5
    assert len({block_key(root, (1, 2)) for root in roots}) == 5
    assert block_key(roots[0], (1, 2)) != block_key(roots[0], (2, 1))
    assert root_key("base", replace(REQUEST, adapter_scale=0.5)) == root_key("base", REQUEST)
    assert root_key("base", replace(adapted, adapter_scale=1)) == root_key("base", adapted)


def test_what_was_used_longest_ago_goes_first_and_a_prefix_from_its_end() -> None:
    blocks = BlockPool(4, 2)
    old, new = compute(blocks, sequence(1, 1, 2, 2)), compute(blocks, sequence(3, 3, 4, 4))
    old_table, new_table = old.block_table, new.block_table
    blocks.deallocate(old)
    blocks.deallocate(new)
    user = compute(blocks, sequence(1, 1, 2))  # takes old's first block, evicts its second
    assert user.block_table == old_table
    other = compute(blocks, sequence(3, 3, 5))
    assert other.block_table == new_table
    assert blocks.num_free == 0


def test_the_second_to_compute_the_same_keeps_its_own_block() -> None:
    blocks = BlockPool(4, 2)
    first, second = sequence(1, 2, 3), sequence(1, 2, 3)
    for it in (first, second):
        blocks.allocate(it)
    for it in (first, second):
        blocks.cache(it, 0, 3)
    assert not set(first.block_table) & set(second.block_table)
    cached = first.block_table[:1]
    blocks.deallocate(first)
    blocks.deallocate(second)
    third = compute(blocks, sequence(1, 2, 3))
    assert third.block_table[:1] == cached


def test_nothing_is_shared_with_the_prefix_cache_off() -> None:
    blocks = BlockPool(8, 2, prefix_caching=False)
    tables = [compute(blocks, sequence(1, 2, 3, 4, 5)).block_table for _ in range(2)]
    assert not set(tables[0]) & set(tables[1])
