"""Every Triton kernel compiled for Ampere and Hopper, on a machine that may have no card.

test_triton.py runs this file in a process of its own. Launchers get CPU tensors of a 7B model's
shapes; the kernels are compiled for what they ask and not launched.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlorachat.kernels import (
    LoraSegment,
    activation,
    attention,
    device,
    lora,
    lora_segments,
    norm,
    rotary,
)
from qlorachat.kernels.eight_bits import INT8, narrow

jit: Any = importlib.import_module("triton.runtime.jit")
driver: Any = importlib.import_module("triton.runtime.driver")
compiler: Any = importlib.import_module("triton.backends.compiler")
HALF = torch.bfloat16


class Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        return compiler.GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # Triton remembers a target for each device

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(params=[80, 90])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were compiled instead of launched."""
    names: list[str] = []
    run = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert run(self, *args, grid=grid, warmup=True, **kwargs).asm["cubin"]
        names.append(self.__name__)

    monkeypatch.setattr(jit.JITFunction, "run", compile_only)
    monkeypatch.setattr(driver.driver, "_active", Driver(request.param))
    monkeypatch.setattr(device, "starts_early", lambda device: request.param >= 90)
    for module in (activation, attention, lora, lora_segments, norm, rotary):
        monkeypatch.setattr(module, "runs_triton", lambda tensor: True)
    return names


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=HALF)


def integers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def attend() -> None:
    for kv_heads, splits in ((32, 1), (8, 4)):
        cache = zeros(2, 16, kv_heads, 128)
        context = (cache, cache, integers(4, 8), integers(4))
        attention.paged_decode_attention(
            zeros(4, 32, 128), *context, 0.1, zeros(4, 32, 128), splits
        )


def attend_to_8_bits() -> None:
    cache = narrow(zeros(2, 16, 32, 128), INT8)
    context = (cache, cache, integers(4, 8), integers(4))
    attention.paged_decode_attention(zeros(4, 32, 128), *context, 0.1, zeros(4, 32, 128), 1)


def rope() -> None:
    cache, table = zeros(2, 16, 32, 128), torch.zeros(64, 128)
    rotary.rope_and_cache(zeros(4, 12288), table, table, integers(4), integers(4), cache, cache)


def rope_to_8_bits() -> None:
    cache, table = narrow(zeros(2, 16, 32, 128), INT8), torch.zeros(64, 128)
    rotary.rope_and_cache(zeros(4, 12288), table, table, integers(4), integers(4), cache, cache)


def add_lora() -> None:
    sums = lora.lora_shrink(zeros(4, 4096), zeros(2, 48, 4096), integers(4))
    columns = (0, 4096, 8192, 12288)
    scales = torch.zeros(4)
    lora.lora_expand_add(sums, zeros(2, 12288, 16), integers(4), scales, zeros(4, 12288), columns)


def rope_of_a_prefill() -> None:
    cache, table = zeros(2, 64, 32, 128), torch.zeros(128, 128)
    places = (integers(65), integers(65))
    rotary.rope_and_cache(zeros(65, 12288), table, table, *places, cache, cache)


def add_lora_to_segments() -> None:
    weights, columns = (zeros(2, 48, 4096), zeros(2, 12288, 16)), (0, 4096, 8192, 12288)
    segments = [LoraSegment(0, 3, 1, 0.5), LoraSegment(3, 4, 2, 1.0)]
    lora_segments.lora_add_segments(zeros(4, 4096), *weights, segments, zeros(4, 12288), columns)


LAUNCHES: dict[str, tuple[Callable[[], object], list[str]]] = {
    "rms_norm": (lambda: norm.rms_norm(zeros(4, 4096), zeros(4096), 1e-5), ["_norm_kernel"]),
    "add_rms_norm": (
        lambda: norm.add_rms_norm(zeros(4, 4096), zeros(4, 4096), zeros(4096), 1e-5),
        ["_norm_kernel"],
    ),
    "silu_mul": (lambda: activation.silu_mul(zeros(4, 22016)), ["_silu_mul_kernel"]),
    "rope_and_cache": (rope, ["_rope_kernel"]),
    "rope_and_cache, 8 bits": (rope_to_8_bits, ["_rope_kernel"]),
    "paged_decode_attention, 8 bits": (attend_to_8_bits, ["_attend_kernel"]),
    "paged_decode_attention": (attend, ["_attend_kernel", "_attend_kernel", "_combine_kernel"]),
    "rope_and_cache of a prefill": (rope_of_a_prefill, ["_rope_kernel"]),
    "segments": (add_lora_to_segments, ["_expand_segment_kernel", "_expand_segment_kernel"]),
    "lora": (add_lora, ["_shrink_kernel", "_expand_kernel"]),
}


@pytest.mark.parametrize("name", list(LAUNCHES))
def test_it_compiles(name: str, compiled: list[str]) -> None:
    launch, kernels = LAUNCHES[name]
    launch()
    assert compiled == kernels
