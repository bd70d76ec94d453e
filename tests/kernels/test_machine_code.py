"""bench/machine_code.py, whose counts docs/kernels.md names, against what is known of a kernel."""

import subprocess
import sys
from pathlib import Path

from tests.kernels.cubin import compiled, opcodes, registers
from tests.kernels.test_nf4 import needs_nvrtc
from tests.kernels.test_triton import needs_triton

SCRIPT = Path(__file__).parents[2] / "bench" / "machine_code.py"


@needs_nvrtc
@needs_triton
def test_registers_instructions_and_loops_are_the_kernel_s() -> None:
    source, kernel = "nf4_matmul_hopper.cu", "nf4_matmul_8_ragged"
    command = [sys.executable, str(SCRIPT), source, "--kernel", kernel]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code = compiled(source, "sm_90a")
    head, *loops = done.stdout.splitlines()
    assert head.startswith(f"{kernel}: {registers(code)[kernel]} registers, ")
    assert f" {len(opcodes(code, kernel))} instructions, " in head
    (unit,) = (loop for loop in loops if "HGMMA" in loop)
    assert " 16 HGMMA" in unit  # four products of four blocks
