"""The steps of a Llama layer as pure functions of tensors.

Each is a Triton kernel on NVIDIA cards from Ampere on and plain torch elsewhere, and has that torch
version (`*_reference`) beside it; the NF4 product (`nf4`) and a fused decode step are CUDA C.
Importing this needs neither.
"""

from qlorachat.kernels.activation import silu_mul
from qlorachat.kernels.attention import (
    Places,
    gathered_decode_attention,
    list_places,
    paged_decode_attention,
    read_blocks,
)
from qlorachat.kernels.lora import lora_expand_add, lora_shrink
from qlorachat.kernels.lora_segments import LoraSegment, lora_add_segments
from qlorachat.kernels.norm import add_rms_norm, rms_norm
from qlorachat.kernels.rotary import rope_and_cache

__all__ = [
    "LoraSegment",
    "Places",
    "add_rms_norm",
    "gathered_decode_attention",
    "list_places",
    "lora_add_segments",
    "lora_expand_add",
    "lora_shrink",
    "paged_decode_attention",
    "read_blocks",
    "rms_norm",
    "rope_and_cache",
    "silu_mul",
]
