"""Which of our CUDA kernels a card runs: compiled, and tried once against their references.

One that does not compile, can't be launched or computes something else is not used there, and the
reason is said.
"""

from __future__ import annotations

import functools

import torch

from qlorachat.kernels import cuda_source, decode_attention, decode_step, nf4_write_out, tiles
from qlorachat.kernels.device import is_hopper
from qlorachat.kernels.trial import try_attention, try_products, try_step


@functools.cache
def why_not_products(device: torch.device) -> str | None:
    """Why NF4 products can't be ours on a device; None: they can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "it is no NVIDIA card"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "its tensor cores are older than Ampere's"
    if not cuda_source.found():
        return (
            "cuda-bindings or NVRTC is not installed (pip install qlorachat[cuda], or "
            "qlorachat[cuda12] for a driver before 580)"
        )
    try:
        product = "nf4_matmul_hopper.cu" if is_hopper(device) else "nf4_matmul.cu"
        cuda_source.load([product, tiles.SOURCE, nf4_write_out.SOURCE], device)
        try_products(torch.empty(0, device=device))
    except (RuntimeError, OSError) as error:
        return f"our kernels fail on it ({error})"
    return None


@functools.cache
def why_not_step(
    heads: int, kv_heads: int, head_dim: int, cached: torch.dtype, device: torch.device
) -> str | None:
    """Why the kernels of a fused decode step can't run where products do; None: they can.

    heads, kv_heads, head_dim: of a model. cached: the dtype of its keys and values.
    """
    if reason := decode_attention.why_not(heads, kv_heads, head_dim):
        return reason
    try:
        shape = decode_attention.definitions(heads, kv_heads, head_dim, cached, device)
        cuda_source.load([decode_step.SOURCE], device)
        cuda_source.load([decode_attention.SOURCE], device, shape)
        like = torch.empty(0, device=device)
        try_step(like)
        try_attention(like, heads // kv_heads, head_dim, cached)
    except (RuntimeError, OSError) as error:
        return f"our kernels fail on it ({error})"
    return None
