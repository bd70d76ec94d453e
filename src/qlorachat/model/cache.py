"""The paged KV cache: blocks of tokens for every layer, allocated once."""

import torch

from qlorachat.kernels.eight_bits import row_width


class KVCache:
    """Keys and values, each of shape (layers, blocks, block_size, kv_heads, head_dim).

    In 8 bits a row is longer than head_dim, by what `kernels.eight_bits` keeps there.
    """

    def __init__(
        self,
        *,
        layers: int,
        blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, blocks, block_size, kv_heads, row_width(head_dim, dtype))
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.block_size = block_size

    @staticmethod
    def bytes_per_token(*, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Of keys and values together."""
        return 2 * layers * kv_heads * row_width(head_dim, dtype) * dtype.itemsize
