"""Rope and attention of a fused decode step: the reference against rope, then attention."""

import pytest
import torch

from qlorachat.kernels import (
    cuda_source,
    decode_attention,
    paged_decode_attention,
    rope_and_cache,
)
from qlorachat.kernels.decode_attention import PagedContext, attend_sums, make_meeting
from qlorachat.kernels.eight_bits import INT8
from qlorachat.kernels.sums import LateNorm
from qlorachat.kernels.tiles import untile
from tests.kernels.cases import POISON, make_paged
from tests.kernels.cubin import registers
from tests.kernels.emulator import AMPERE, BLACKWELL, HOPPER, Card
from tests.kernels.step_cases import EPS, HIDDEN, assert_untouched, make_product, make_tiled
from tests.kernels.test_nf4 import needs_nvrtc

LENGTHS = [1, 0, 40, 17, 33, 0, 16, 2, 100]  # 0: a padding row
PROCESSORS = 132


def copied(context: PagedContext) -> PagedContext:
    return PagedContext(*(tensor.clone() for tensor in context))


def caches(context: PagedContext) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values by slot, [slots, G, D]."""
    return context.key_cache.flatten(0, 1), context.value_cache.flatten(0, 1)


def written(context: PagedContext) -> torch.Tensor:
    """Which slots get a new key and value, bool [slots]."""
    own = torch.zeros(len(caches(context)[0]), dtype=torch.bool)
    own[context.slots[context.slots >= 0]] = True
    return own


def make_context(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, all_lengths: list[int] = LENGTHS
) -> PagedContext:
    """NaN wherever no key or value of an earlier step is."""
    case = make_paged(dtype, all_lengths, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    lengths, block_size = case.context_lengths, case.key_cache.shape[1]
    positions = (lengths - 1).clamp(min=0)
    blocks = case.block_tables[torch.arange(len(lengths)), positions // block_size]
    slots = torch.where(lengths > 0, blocks * block_size + positions % block_size, -1)
    angles = torch.rand(max(all_lengths), head_dim) * 6
    context = PagedContext(
        *(angles.cos().to(dtype), angles.sin().to(dtype), positions, slots),
        *(case.key_cache, case.value_cache, case.block_tables, lengths),
    )
    for cache in caches(context):
        cache[written(context)] = POISON
    return context


def attend_apart(qkv: torch.Tensor, context: PagedContext, scale: float) -> torch.Tensor:
    """`rope_and_cache`, then `paged_decode_attention` in float32, [M, H * D]."""
    cos, sin, positions, slots, keys, values, tables, lengths = context
    q = rope_and_cache(qkv, cos, sin, positions, slots, keys, values).float()
    out = torch.full_like(q, POISON)
    paged_decode_attention(q, keys.float(), values.float(), tables, lengths, scale, out)
    return out.flatten(1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 16), (4, 2, 80), (2, 1, 96), (9, 3, 64), (8, 1, 128)]
)
def test_it_is_rope_then_attention(heads: int, kv_heads: int, head_dim: int) -> None:
    rows, columns = len(LENGTHS), heads * head_dim
    sums, given, qkv = make_product(rows, columns + 2 * kv_heads * head_dim)
    before = make_context(torch.float32, heads, kv_heads, head_dim)
    ours, theirs = copied(before), copied(before)
    out, squares = make_tiled(torch.float32, columns, 16), given.clone()
    norm = LateNorm(squares, HIDDEN, EPS)
    attend_sums(sums, norm, ours, 1 / head_dim, out)
    expected = attend_apart(qkv, theirs, 1 / head_dim)
    actual = untile(out, rows, columns)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert not actual[before.context_lengths == 0].any()
    assert_untouched(out, rows, columns)
    assert not sums.any()
    assert torch.equal(squares, given)
    own = written(before)
    for old, new, other in zip(*map(caches, (before, ours, theirs)), strict=True):
        torch.testing.assert_close(new[own], other[own], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(new[~own], old[~own], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_rounded_once_after_the_norm(dtype: torch.dtype) -> None:
    sums, squares = torch.randn(len(LENGTHS), 8 * 64), 100 * torch.rand(len(LENGTHS))
    qkv = (sums * torch.rsqrt(squares[:, None] / 50 + EPS)).to(dtype)
    ours = make_context(dtype, 4, 2, 64)
    theirs, out = copied(ours), make_tiled(dtype, 4 * 64, 16)
    attend_sums(sums, LateNorm(squares, 50, EPS), ours, 0.1, out)
    expected = attend_apart(qkv, theirs, 0.1).to(dtype)
    assert torch.equal(untile(out, len(LENGTHS), 4 * 64), expected)
    for new, other in zip(caches(ours), caches(theirs), strict=True):
        assert torch.equal(new[written(ours)], other[written(ours)])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "reason"),
    [
        (32, 32, 128, None),
        (8, 1, 64, None),
        (8, 1, 128, None),
        (4, 1, 256, None),
        (32, 32, 80, "attention heads are 80 wide, not 64, 128 or 256"),
        (4, 4, 32, "attention heads are 32 wide, not 64, 128 or 256"),
        (4, 4, 512, "attention heads are 512 wide, not 64, 128 or 256"),
        (9, 1, 64, "9 query heads of 64 share a key head"),
        (18, 2, 128, "9 query heads of 128 share a key head"),
        (5, 1, 256, "5 query heads of 256 share a key head"),
    ],
)
def test_why_a_model_has_no_kernel(
    heads: int, kv_heads: int, head_dim: int, reason: str | None
) -> None:
    assert decode_attention.why_not(heads, kv_heads, head_dim) == reason


A100 = Card("A100", 800, 163 * 1024)
CARDS = {HOPPER: "sm_90a", A100: "sm_80", AMPERE: "sm_86", BLACKWELL: "sm_120"}
ON_CARD = torch.device("cuda", 0)


def pretend(monkeypatch: pytest.MonkeyPatch, card: Card) -> None:
    """What launchers ask of a card, with PROCESSORS of them."""
    monkeypatch.setattr(decode_attention, "count_processors", lambda device: PROCESSORS)
    monkeypatch.setattr(decode_attention, "starts_early", lambda device: card.starts_early)
    monkeypatch.setattr(cuda_source, "shared_bytes", lambda device: card.shared_bytes)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, HOPPER)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("heads", "width", "splits"),
    [
        (1, 1, 1),
        (1, 3, 2),
        (1, 7, 4),
        (1, 8, 8),
        (1, 4096, 8),
        (66, 128, 8),
        (67, 128, 4),
        (133, 128, 2),
        (264, 128, 2),
        (265, 128, 1),
        (64 * 32, 128, 1),
    ],
)
def test_contexts_are_split_to_fill_a_card(heads: int, width: int, splits: int) -> None:
    assert decode_attention._choose_splits(heads, width, ON_CARD) == splits


@pytest.mark.usefixtures("hopper")
def test_splits_are_powers_of_two() -> None:
    for heads in range(1, 1000):
        for width in range(1, 20):
            splits = decode_attention._choose_splits(heads, width, ON_CARD)
            assert splits in (1, 2, 4, 8)
            assert splits <= width


def compile_attention(
    head_dim: int, group: int, cached: torch.dtype = torch.bfloat16, architecture: str = "sm_90a"
) -> bytes:
    shape = decode_attention.definitions(group, 1, head_dim, cached, ON_CARD)
    definitions = ["SHARED_BASE=0", *shape]
    return cuda_source.compile_source("decode_attention.cu", architecture, definitions)


@needs_nvrtc
@pytest.mark.parametrize("card", CARDS, ids=CARDS.get)
@pytest.mark.parametrize("cached", [torch.bfloat16, INT8])
@pytest.mark.parametrize(
    ("head_dim", "group"),
    [(64, 1), (64, 3), (64, 8), (128, 1), (128, 4), (128, 8), (256, 1), (256, 4)],
)
def test_the_source_compiles(
    head_dim: int, group: int, cached: torch.dtype, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert decode_attention.why_not(group, 1, head_dim) is None
    pretend(monkeypatch, card)
    code = compile_attention(head_dim, group, cached, CARDS[card])
    assert code.startswith(b"\x7fELF")
    assert registers(code)["attend"] <= 255


def test_a_smaller_card_has_fewer_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    for card, blocks, stages in ((HOPPER, 4, 3), (A100, 3, 3), (AMPERE, 2, 2), (BLACKWELL, 2, 2)):
        pretend(monkeypatch, card)
        assert decode_attention._most_blocks(device) == blocks * PROCESSORS
        assert f"STAGES={stages}" in decode_attention.definitions(1, 1, 64, INT8, device)
        meeting = make_meeting(3, 8, 2, 64, device)
        assert meeting.sums.shape == (blocks * PROCESSORS, 4 * 66)
        assert meeting.arrived.shape == (6,)
        assert make_meeting(64, 64, 32, 64, device).sums.shape == (2048, 2 * 66)
        assert make_meeting(3, 8, 2, 64, device, splits=4).sums.shape == (24, 4 * 66)


@needs_nvrtc
@pytest.mark.usefixtures("hopper")
def test_the_source_refuses_other_heads() -> None:
    with pytest.raises(RuntimeError, match="HEAD_DIM of 64, 128 or 256"):
        compile_attention(80, 1)
