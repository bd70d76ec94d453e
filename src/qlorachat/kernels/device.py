"""Where Triton runs: each kernel asks here, and is its torch version where the answer is no."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

# Windows and the CPU build of torch come without Triton; it has no type stubs anywhere
_FOUND = importlib.util.find_spec("triton") is not None
triton: Any = importlib.import_module("triton") if _FOUND else None
tl: Any = importlib.import_module("triton.language") if _FOUND else None


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; without Triton the function itself, which then nothing calls."""
    # a batch of 1 row or of 16 needs no kernel of its own
    return triton.jit(function, do_not_specialize=["rows"]) if _FOUND else function


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether kernels on this tensor are Triton's: on NVIDIA cards from Ampere on.

    Under Triton's interpreter (TRITON_INTERPRET=1) they are so for CPU tensors too.
    """
    if not _FOUND:
        return False
    return bool(triton.knobs.runtime.interpret) or (tensor.is_cuda and _is_ampere(tensor.device))


@functools.cache
def starts_early(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it runs: from Hopper on."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether a card has wgmma, which no other generation has."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) == (9, 0)
    )


def dependent_launch(tensor: torch.Tensor) -> dict[str, bool]:
    """Options of a Triton kernel that calls `wait_for_previous` before it touches anything."""
    early = starts_early(tensor.device)
    return {"early": early, "launch_pdl": True} if early else {"early": False}


@jit
def wait_for_previous(early: tl.constexpr) -> None:
    """Let the next kernel start, and wait until what the kernels before wrote is there."""
    if early:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@functools.cache
def count_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a card; 1 for a CPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def dot_precision(dtype: torch.dtype) -> str:
    """How tensor cores multiply tiles cast from `dtype` to float32, exact to the dtype's digits.

    The cast is for Triton's interpreter, which multiplies bfloat16 wrongly. A 16-bit number fits
    TF32 unchanged; a float32 is multiplied in three TF32 steps.
    """
    return "tf32x3" if dtype == torch.float32 else "tf32"


@functools.cache
def _is_ampere(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
