"""The Triton kernels, in processes of their own: interpreted, compiled, and absent."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed; there is none for this system's Python",
)


def run_apart(*arguments: str, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=FOLDER.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run_checks(name: str, **environment: str) -> None:
    pytest_arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    run_apart(*pytest_arguments, str(FOLDER / name), environment=environment)


@needs_triton
def test_interpreted_kernels_equal_their_references() -> None:
    run_checks("interpreted_checks.py", TRITON_INTERPRET="1")


@needs_triton
def test_the_kernels_compile_for_a_card(tmp_path: Path) -> None:
    # Triton 3.9 warns where fusion is left to its default
    settings = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    run_checks("compiled_checks.py", TRITON_INTERPRET="0", **settings)


def test_without_triton_the_kernels_are_their_references() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from qlorachat.kernels import rms_norm, silu_mul\n"
        "assert torch.equal(rms_norm(torch.ones(1, 4), torch.ones(4), 0.0), torch.ones(1, 4))\n"
        "assert silu_mul(torch.zeros(2, 6)).shape == (2, 3)\n"
    )
    run_apart("-c", program, environment={})
