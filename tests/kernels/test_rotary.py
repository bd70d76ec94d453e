"""rope_and_cache against transformers' Llama rotary embedding, and what it writes where."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from qlorachat.kernels import rope_and_cache
from qlorachat.kernels.eight_bits import (
    INT8,
    codes_of,
    encoded,
    find,
    head_dim_of,
    narrow,
    scales_of,
    widen,
)
from qlorachat.kernels.rotary import _find_real, _repeat_real, _write
from tests.kernels.cases import make_rope

SHAPES = [(9, 3, 64), (4, 4, 80), (6, 1, 96), (2, 2, 128)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_the_rotation_is_llamas(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> None:
    case = make_rope(dtype, rows=7, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    config = LlamaConfig(hidden_size=heads * head_dim, num_attention_heads=heads)
    positions = torch.arange(50)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(0, dtype=dtype), positions)
    qkv, _, _, rows, slots, key_cache, value_cache = case.arguments()
    q = rope_and_cache(qkv, cos[0], sin[0], rows, slots, key_cache, value_cache)

    split = qkv.view(1, 7, -1, head_dim).split([heads, kv_heads, kv_heads], dim=2)
    at = (cos[:, rows], sin[:, rows])
    queries, keys = apply_rotary_pos_emb(split[0], split[1], *at, unsqueeze_dim=2)
    assert torch.equal(q, queries[0])
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert torch.equal(key_cache[slot // 4, slot % 4], keys[0, row])
            assert torch.equal(value_cache[slot // 4, slot % 4], split[2][0, row])


def test_tables_are_cast_to_the_rows_dtype() -> None:
    case = make_rope(torch.bfloat16, rows=3, heads=2, kv_heads=1, head_dim=8)
    qkv, cos, sin, *rest = case.arguments()
    expected = rope_and_cache(qkv, cos.bfloat16(), sin.bfloat16(), *rest)
    assert torch.equal(rope_and_cache(qkv, cos, sin, *rest), expected)


def test_a_cache_in_8_bits_gets_codes_of_the_same_rows() -> None:
    shape = {"rows": 8, "heads": 2, "kv_heads": 2, "head_dim": 8}
    case = make_rope(torch.bfloat16, **shape, in_8_bits=True)
    caches = (widen(case.key_cache, torch.bfloat16), widen(case.value_cache, torch.bfloat16))
    wide = replace(case, key_cache=caches[0], value_cache=caches[1])
    ours, theirs = case.arguments(), wide.arguments()
    assert torch.equal(rope_and_cache(*ours), rope_and_cache(*theirs))
    written = case.slots[case.slots >= 0].long()
    for before, cache, other in zip(
        (case.key_cache, case.value_cache), ours[-2:], theirs[-2:], strict=True
    ):
        rows = encoded(other.flatten(0, 1)[written])
        for part, row in zip((codes_of, scales_of), rows, strict=True):
            expected = part(before).flatten(0, 1)
            expected[written] = row
            assert torch.equal(part(cache).flatten(0, 1), expected)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_8_bits_are_off_by_half_a_code_at_most(size: float) -> None:
    values = size * torch.randn(50, 4, 3, 64)
    values[0, ..., 1:] = 0  # one number that is the largest
    blocks = narrow(values, INT8)
    assert blocks.shape == (50, 4, 3, 68)
    assert head_dim_of(blocks) == 64
    read = widen(blocks, torch.float32)
    half = values.abs().amax(-1, keepdim=True) / 127 / 2
    assert bool(((read - values).abs() <= half * 1.001).all())
    torch.testing.assert_close(read[0], values[0], rtol=1e-6, atol=0)
    assert torch.equal(widen(narrow(values, torch.float32), torch.float32), values)


def test_a_block_in_8_bits_has_its_codes_and_then_its_scales() -> None:
    values = torch.randn(5, 4, 3, 64)
    for block, own in zip(values, narrow(values, INT8), strict=True):
        codes, scales = own.flatten().split([4 * 3 * 64, 4 * 3 * 4])
        scales = scales.clone().view(torch.float32).view(3, 4, 1)  # by head
        torch.testing.assert_close(scales.flatten(1).T, block.abs().amax(-1) / 127)
        numbers = codes.view(4, 3, 64) * scales.transpose(0, 1)
        assert (numbers - block).abs().max() <= block.abs().max() / 127 / 2 * 1.001


def test_nothing_else_in_the_cache_changes() -> None:
    case = make_rope(torch.float32, rows=8, heads=2, kv_heads=2, head_dim=8)
    arguments = case.arguments()
    rope_and_cache(*arguments)
    untouched = torch.ones(case.key_cache.shape[0] * 4, dtype=torch.bool)
    untouched[case.slots[case.slots >= 0]] = False
    for before, after in zip((case.key_cache, case.value_cache), arguments[-2:], strict=True):
        assert torch.equal(before.flatten(0, 1)[untouched], after.flatten(0, 1)[untouched])


def test_rows_that_are_all_padding_write_nothing() -> None:
    case = make_rope(torch.float32, rows=4, heads=2, kv_heads=2, head_dim=8)
    case.slots.fill_(-1)
    arguments = case.arguments()
    rope_and_cache(*arguments)
    assert torch.equal(case.key_cache, arguments[-2])
    assert torch.equal(case.value_cache, arguments[-1])


@pytest.mark.parametrize("slots", [[3, 0, 5], [-1, 4, -1, 0], [-1], [-1, -1, -1], [2]])
@pytest.mark.parametrize("dtype", [torch.float32, INT8])
def test_a_card_is_not_waited_for_and_gets_the_same_writes(
    slots: list[int], dtype: torch.dtype
) -> None:
    at, rows = torch.tensor(slots, dtype=torch.int32), torch.randn(len(slots), 2, 8)
    expected = narrow(torch.randn(3, 2, 2, 8), dtype)
    written = expected.clone()
    for cache, places in ((expected, _find_real(at)), (written, _repeat_real(at))):
        _write(cache, rows, places, find(cache, places.target))
    assert torch.equal(written, expected)
