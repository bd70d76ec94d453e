"""The memory plan: how many blocks of the KV cache fit beside the weights, said in one line."""

from dataclasses import dataclass

import psutil
import torch

from qlorachat.checkpoints.memory import GIB, parse_memory
from qlorachat.errors import ModelError

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
        free = int(psutil.virtual_memory().available)  # the weights are there already
        if memory is None:
            return int(free * CPU_SHARE)
        allowed = parse_memory(memory, free + weights)
        return min(allowed - weights, free) - adapters
    free, total = torch.cuda.mem_get_info(device)
    allowed = parse_memory(memory, total) if memory else int(total * CUDA_SHARE)
    used = total - free  # ours and others'
    return min(allowed - weights - adapters - WORKSPACE, allowed - used - adapters - WORKSPACE)
