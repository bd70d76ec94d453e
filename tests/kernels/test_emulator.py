"""The emulator of the CUDA kernels: a kernel's mistake is said, or shows in its results."""

from pathlib import Path

import pytest
import torch

from qlorachat.kernels.cuda_source import Argument
from tests.kernels.emulator import Emulator
from tests.kernels.emulator.translate import translate_asm

CPU = torch.device("cpu")
THREADS = 64
SHARED = 4 * THREADS  # bytes
TYPES = """
typedef unsigned char u8;
extern __shared__ __align__(1024) u8 shared[];
#define KERNEL(NAME) \\
  extern "C" __global__ void __launch_bounds__(64) NAME(const int* lora_slots, float* out, int n)
#define VALUES reinterpret_cast<float*>(shared)
#define WAIT asm volatile("griddepcontrol.wait;" ::: "memory")
"""
# lora_slots are what a kernel may read before the wait
KERNELS = """
KERNEL(mirror) {
  const int i = threadIdx.x;
  VALUES[i] = lora_slots[i];
  __syncthreads();
  WAIT;
  out[i] = VALUES[n - i];
}
KERNEL(races) {
  const int i = threadIdx.x;
  VALUES[i] = lora_slots[i];
  WAIT;
  out[i] = VALUES[n - i];
}
KERNEL(reads_beyond) { WAIT; out[threadIdx.x] = __ldg(lora_slots + threadIdx.x + 1); }
KERNEL(writes_beyond) { WAIT; out[threadIdx.x + 1] = 0.f; }
KERNEL(writes_early) { out[threadIdx.x] = 0.f; WAIT; }
KERNEL(reads_early) { const float early = out[threadIdx.x]; WAIT; out[threadIdx.x] = early; }
KERNEL(leaves_its_warp) { if (threadIdx.x % 2 == 0) __syncwarp(); }
KERNEL(parts_its_warp) { if (threadIdx.x % 2) __syncwarp(); else __ballot_sync(~0u, true); }
KERNEL(writes_beyond_shared) { VALUES[threadIdx.x + 1] = 0.f; }
KERNEL(does_not_end) { while (true) __syncwarp(); }
KERNEL(traps) { if (threadIdx.x == 5) __trap(); }
"""


@pytest.fixture
def small(compiled_for_cpu: Emulator, tmp_path: Path) -> Emulator:
    (tmp_path / "small.cu").write_text(TYPES + KERNELS, encoding="utf-8")
    return Emulator(tmp_path, tmp_path)


def run(emulator: Emulator, kernel: str, seed: int = 0) -> torch.Tensor:
    emulator.seed = seed
    b, out = torch.arange(THREADS, dtype=torch.int32), torch.full((THREADS,), 0.5)
    function = emulator.load_kernel("small.cu", kernel, CPU)
    arguments = (b, out, THREADS - 1)
    emulator.launch(function, (2,), THREADS, SHARED, arguments, CPU, early=True)
    return out


def test_mistakes_are_found(small: Emulator) -> None:
    expected = torch.arange(THREADS).flip(0).float()
    for seed in range(4):
        assert torch.equal(run(small, "mirror", seed), expected)
    assert run(small, "races", 2).isnan().any()
    assert run(small, "reads_early").isnan().all()
    for kernel, message in (
        ("reads_beyond", "thread 63 of .*: __ldg of 4 bytes at byte 256 of argument 0, which has"),
        ("writes_beyond", "a write outside out"),
        ("writes_early", "argument 1 is written before griddepcontrol.wait"),
        ("leaves_its_warp", "deadlock .*: 64 threads, of which 32 at __syncwarp"),
        ("parts_its_warp", "__(ballot_sync|syncwarp), where other lanes of the warp are at __"),
        ("writes_beyond_shared", "writes beyond its shared memory"),
        ("does_not_end", "it does not end"),
        ("traps", "thread 5 of block .*: __trap"),
    ):
        with pytest.raises(RuntimeError, match=f"{kernel}: .*{message}"):
            run(small, kernel)


def test_arguments_are_of_the_declared_types(small: Emulator) -> None:
    function = small.load_kernel("small.cu", "mirror", CPU)
    b, out = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    wrong: list[tuple[Argument, ...]]
    wrong = [(b, out), (b, out, 1.0), (out, b, 1), (b, 1, 1), (b, out, None)]
    for arguments in wrong:
        with pytest.raises(AssertionError):
            small.launch(function, (1,), THREADS, SHARED, arguments, CPU)


def test_an_unknown_instruction_does_not_compile(small: Emulator, tmp_path: Path) -> None:
    body = 'KERNEL(unknown) { asm volatile("fence.of_some_kind;"); }\n'
    (tmp_path / "other.cu").write_text(TYPES + body, encoding="utf-8")
    with pytest.raises(RuntimeError, match="fence_of_some_kind"):
        small.load_kernel("other.cu", "unknown", CPU)


def test_ptx_becomes_calls() -> None:
    text = "{ .reg .pred p; AGAIN: a.b::c.u32 p, [%0 + 4], {%1, %2}, _; @p bra AGAIN; }"
    calls = translate_asm(text, ["x", "y[0]", "y[1]"], 3)
    assert " ".join(calls.split()) == (
        "{ bool p{}; AGAIN_3:; ptx::a_b_c_u32(p, (x) + 4, ptx::registers((y[0]), (y[1]))); "
        "if (p) goto AGAIN_3; }"
    )
