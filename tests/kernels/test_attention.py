"""paged_decode_attention against dense attention in float64."""

from dataclasses import replace

import pytest
import torch

from qlorachat.kernels import paged_decode_attention, read_blocks
from qlorachat.kernels.eight_bits import widen
from tests.kernels.cases import PagedCase, make_paged

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def attend_densely(case: PagedCase, scale: float) -> torch.Tensor:
    """softmax(scale * q k) v, one row and one head at a time."""
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    group = case.q.shape[1] // case.key_cache.shape[2]
    for row in range(len(case.q)):
        if case.context_lengths[row] == 0:
            continue
        keys, values = (tensor.double() for tensor in case.context(row))
        for head in range(case.q.shape[1]):
            scores = keys[:, head // group] @ case.q[row, head].double() * scale
            out[row, head] = scores.softmax(0) @ values[:, head // group]
    return out


def attend(case: PagedCase, scale: float) -> torch.Tensor:
    out = torch.full_like(case.q, float("nan"))
    paged_decode_attention(*case.arguments(), scale, out)
    return out


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (9, 3, 80), (8, 1, 96)])
def test_it_is_dense_attention(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> None:
    case = make_paged(
        dtype, [1, 15, 16, 17, 100, 0], heads=heads, kv_heads=kv_heads, head_dim=head_dim
    )
    expected = attend_densely(case, 0.2)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(attend(case, 0.2).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_cache_in_8_bits_is_what_its_bytes_say(dtype: torch.dtype) -> None:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 64}
    case = make_paged(dtype, [1, 17, 100, 0], **shape, in_8_bits=True)
    caches = (widen(case.key_cache, dtype), widen(case.value_cache, dtype))
    wide = replace(case, key_cache=caches[0], value_cache=caches[1])
    assert torch.equal(attend(case, 0.2), attend(wide, 0.2))
    blocks = case.block_tables[2, :3].long()
    assert torch.equal(
        read_blocks(case.key_cache, blocks, dtype), read_blocks(wide.key_cache, blocks, dtype)
    )


def test_one_token_of_context_is_its_value() -> None:
    case = make_paged(torch.float32, [1], heads=2, kv_heads=1, head_dim=8, block_size=1)
    assert torch.allclose(attend(case, 1.0)[0, 1], case.context(0)[1][0, 0])


def test_a_padding_row_gets_zeros() -> None:
    case = make_paged(torch.float32, [0, 3, 0], heads=2, kv_heads=2, head_dim=8)
    out = attend(case, 1.0)
    assert not out[0].any()
    assert not out[2].any()
    assert out[1].isfinite().all()


def test_other_rows_do_not_matter() -> None:
    case = make_paged(torch.float32, [5, 90, 33], heads=4, kv_heads=2, head_dim=16)
    together = attend(case, 0.3)
    for row in range(3):
        one = slice(row, row + 1)
        alone = PagedCase(
            case.q[one].clone(),
            case.key_cache,
            case.value_cache,
            case.block_tables[one],
            case.context_lengths[one],
        )
        torch.testing.assert_close(attend(alone, 0.3), together[one])
