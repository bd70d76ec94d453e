"""NF4 products: the torch reference against bitsandbytes, and the CUDA source for every card."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorachat.kernels import cuda_source, nf4
from qlorachat.kernels import nf4_matmul as nf4_matmul_module
from qlorachat.kernels.decode_lora import Expanding, Shrinking
from qlorachat.kernels.nf4 import Nf4Matrix, nf4_dequantize
from qlorachat.kernels.nf4_matmul import nf4_matmul, nf4_matmul_tiled
from qlorachat.kernels.nf4_write_out import MOST_RANKS
from qlorachat.kernels.tiles import rows_padded, tile
from tests.kernels.cubin import ARCHITECTURES, compiled, opcodes, registers
from tests.kernels.emulator import AMPERE, HOPPER
from tests.kernels.step_cases import assert_shrunk, beside, expanded, make_beside

needs_nvrtc = pytest.mark.skipif(
    not cuda_source.found(), reason="cuda-bindings or NVRTC is not installed"
)


def make_matrix(
    heights: tuple[int, ...], columns: int, *, largest: float
) -> tuple[Nf4Matrix, list[tuple[torch.Tensor, QuantState]]]:
    """Random weights as bitsandbytes quantizes them; one row of each part is `largest` times up."""
    torch.manual_seed(columns)
    values = [torch.randn(height, columns) for height in heights]
    for each in values:
        each[1] *= largest
    parts = [quantize_4bit(each, quant_type="nf4", compress_statistics=True) for each in values]
    return nf4.stack(parts, torch.bfloat16), parts


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from([16, 48, 192, 256]), min_size=1, max_size=3),
    st.sampled_from([64, 192, 576, 1024]),
    st.sampled_from([1.0, 1e3]),
)
def test_the_weights_are_those_of_bitsandbytes(
    heights: list[int], columns: int, largest: float
) -> None:
    matrix, parts = make_matrix(tuple(heights), columns, largest=largest)
    expected = torch.cat([dequantize_4bit(packed, state) for packed, state in parts])
    assert torch.equal(nf4_dequantize(matrix), expected)
    x = torch.randn(3, columns).bfloat16()
    product = nf4_matmul(x, matrix)
    assert product.dtype == x.dtype
    torch.testing.assert_close(product.float(), x.float() @ expected.T, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(("kind", "rank"), beside(16, 48))
@pytest.mark.parametrize("rows", [1, 8, 11])
def test_the_tiled_product_adds_real_rows_alone(
    rows: int, kind: type[Shrinking | Expanding] | None, rank: int | None
) -> None:
    matrix, _ = make_matrix((48, 16), 192, largest=1.0)
    x, sums = torch.randn(rows, 192), torch.randn(rows, 64)
    lora = make_beside(kind, torch.float32, rows, matrix, rank)
    tiled = tile(x, rows_padded(rows))
    tiled[:, rows:] = float("nan")
    expected = sums + x.double() @ nf4_dequantize(matrix).double().T
    if isinstance(lora, Expanding):
        expected += expanded(lora, matrix.heights)[0]
    nf4_matmul_tiled(tiled, matrix, sums, lora)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-4, atol=1e-4)
    if isinstance(lora, Shrinking):
        assert_shrunk(lora, tiled)


def test_a_matrix_refuses_what_its_bytes_do_not_fit() -> None:
    matrix, _ = make_matrix((32, 16), 64, largest=1.0)
    for wrong in ({"columns": 96}, {"heights": (40, 8)}, {"heights": (32,)}):
        fields = {name: getattr(matrix, name) for name in Nf4Matrix.__slots__}
        with pytest.raises(AssertionError):
            Nf4Matrix(**{**fields, **wrong})


ROWS = (8, 16, 32, 64)
WRITTEN = [f"nf4_write_out_{ranks}" for ranks in range(16, MOST_RANKS + 1, 16)]


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_sources_compile(architecture: str) -> None:
    products = [f"nf4_matmul_{rows}{kind}" for rows in ROWS for kind in ("", "_ragged")]
    kernels = {
        "nf4_matmul.cu": products,
        "nf4_matmul_hopper.cu": products if architecture == "sm_90a" else [],
        "nf4_write_out.cu": ["nf4_write_out", *WRITTEN],
        "shared_base.cu": ["find_shared_base"],
        "tiles.cu": ["tile"],
    }
    for name, wanted in kernels.items():
        if not wanted:
            continue
        code = compiled(name, architecture)
        assert code.startswith(b"\x7fELF")
        assert set(wanted) <= set(registers(code))


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_processor_has_room_for_a_product(architecture: str) -> None:
    """Its four schedulers have 16,384 registers each, and every fourth warp."""
    hopper = architecture == "sm_90a"
    name = "nf4_matmul_hopper.cu" if hopper else "nf4_matmul.cu"
    found = registers(compiled(name, architecture))
    make = nf4_matmul_module._hopper_instance if hopper else nf4_matmul_module._instance
    for rows in ROWS:
        threads, shared_bytes = make(rows)
        assert shared_bytes <= (HOPPER if hopper else AMPERE).shared_bytes
        for kernel in (f"nf4_matmul_{rows}", f"nf4_matmul_{rows}_ragged"):
            whole = -(-found[kernel] // 8) * 8
            assert -(-threads // 128) * 32 * whole <= 16384, kernel


@needs_nvrtc
def test_hopper_s_loop_does_not_ask_for_its_thread() -> None:
    """S2R takes dozens of clocks, and all decoding waits for it: a twentieth of a product."""
    s2r, hgmma, leaving = 0x919, 0xDF0, 0x94D  # S2R, HGMMA, EXIT
    code = compiled("nf4_matmul_hopper.cu", "sm_90a")
    for rows in ROWS:
        found = opcodes(code, f"nf4_matmul_{rows}")
        products = [at for at, opcode in enumerate(found) if opcode == hgmma]
        assert len(products) == 4 * 4  # of a unit
        assert s2r in found
        end = found.index(leaving, products[-1])  # behind the loop
        assert s2r not in found[products[0] : end], rows


@needs_nvrtc
def test_a_source_that_does_not_compile_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)does not compile for sm_80.*TILES"):
        cuda_source.compile_source("nf4_matmul.cu", "sm_80", ["TILES=x"])


@needs_nvrtc
def test_machine_code_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QLORACHAT_CACHE", str(tmp_path))
    caplog.set_level("INFO", "qlorachat")
    arguments = ("nf4_write_out.cu", "sm_89", ["SHARED_BASE=0"])
    made = cuda_source.machine_code(*arguments)
    (file,) = (tmp_path / "kernels").iterdir()
    assert file.read_bytes() == made
    assert cuda_source.machine_code(*arguments) == made
    assert len(caplog.messages) == 1
    assert "compiling the kernels of nf4_write_out.cu for sm_89" in caplog.messages[0]
    cuda_source.machine_code("nf4_write_out.cu", "sm_89", ["SHARED_BASE=1024"])
    monkeypatch.setenv("QLORACHAT_CACHE", "~nosuchuser/cache")
    assert cuda_source.machine_code(*arguments) == made
    assert len(list((tmp_path / "kernels").iterdir())) == 2
