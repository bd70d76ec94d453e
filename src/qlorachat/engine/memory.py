"""The memory plan: how many blocks of the KV cache fit beside the weights, said in one line."""

import re
from dataclasses import dataclass

import psutil
import torch

from qlorachat.errors import ConfigError, ModelError

GIB = 2**30
CPU_SHARE = 0.25  # of the memory that is free, for the cache
CUDA_SHARE = 0.92  # of the card's memory, for everything; the rest is the driver's and others'
WORKSPACE = GIB  # bytes on a card for activations, logits, graphs


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What the device holds; all in bytes but `blocks` and `block_size` (tokens)."""

    device: str
    weights: int
    adapters: int
    block_bytes: int
    blocks: int
    block_size: int

    @property
    def tokens(self) -> int:
        return self.blocks * self.block_size

    def __str__(self) -> str:
        return (
            f"memory on {self.device}: weights {self.weights / GIB:.2f} GiB, adapters "
            f"{self.adapters / GIB:.2f} GiB, KV cache {self.blocks * self.block_bytes / GIB:.2f} "
            f"GiB for {self.tokens:,} tokens"
        )


def parse_memory(text: str, total: int) -> int:
    """Bytes of `12GiB`, `800MiB` or a fraction such as `0.8` of `total`; else ConfigError."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|MiB|GB|MB)", text):
        unit = {"GiB": GIB, "MiB": 2**20, "GB": 10**9, "MB": 10**6}[match.group(2)]
        return int(float(match.group(1)) * unit)
    if re.fullmatch(r"0?\.\d+|1(\.0+)?", text):
        return int(float(text) * total)
    raise ConfigError(
        f"memory is a size such as 12GiB or a fraction such as 0.8, not {text!r}.", param="memory"
    )


def plan_memory(
    *,
    device: torch.device,
    weights: int,
    adapters: int,
    block_bytes: int,
    block_size: int,
    wanted_tokens: int,
    memory: str | None,
) -> MemoryPlan:
    """Blocks for at most `wanted_tokens`; ModelError when not even one context fits beside."""
    room = _room(device, memory, weights, adapters)
    blocks = min(room // block_bytes, -(-wanted_tokens // block_size))
    plan = MemoryPlan(str(device), weights, adapters, block_bytes, max(0, blocks), block_size)
    if plan.blocks < 1 or plan.tokens < 256:
        raise ModelError(
            f"No KV cache fits: {plan}. Give it more memory (--memory), quantize to nf4, or load "
            "fewer adapters."
        )
    return plan


def _room(device: torch.device, memory: str | None, weights: int, adapters: int) -> int:
    """Bytes for the cache."""
    if device.type == "cpu":
        free = int(psutil.virtual_memory().available)
        return parse_memory(memory, free) if memory else int(free * CPU_SHARE)
    free, total = torch.cuda.mem_get_info(device)
    allowed = parse_memory(memory, total) if memory else int(total * CUDA_SHARE)
    used = total - free  # ours and others'
    return min(allowed - weights - adapters - WORKSPACE, allowed - used - adapters - WORKSPACE)
