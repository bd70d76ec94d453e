"""The fused decode step, in a process of its own where Triton is its interpreter."""

from tests.kernels.test_triton import needs_triton, run_checks


@needs_triton
def test_the_fused_step_is_the_plain_one() -> None:
    run_checks("../model/fused_checks.py", TRITON_INTERPRET="1")
