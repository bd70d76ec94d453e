"""The CUDA kernels on a CPU, where there is a C++ compiler."""

import pytest

from qlorachat.kernels import cuda_source, nf4_matmul, nf4_tiled
from tests.kernels import emulator


@pytest.fixture(scope="session")
def compiled_for_cpu(tmp_path_factory: pytest.TempPathFactory) -> emulator.Emulator:
    if emulator.compiler() is None:
        pytest.skip("needs a C++ compiler on Linux")
    return emulator.Emulator(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def card(compiled_for_cpu: emulator.Emulator, monkeypatch: pytest.MonkeyPatch) -> emulator.Emulator:
    """Launches on tensors that are `OnCard` run on this CPU."""
    monkeypatch.setattr(cuda_source, "load_kernel", compiled_for_cpu.load_kernel)
    monkeypatch.setattr(cuda_source, "launch", compiled_for_cpu.launch)
    monkeypatch.setattr(cuda_source, "shared_bytes", lambda device: emulator.SHARED_BYTES)
    monkeypatch.setattr(nf4_matmul, "starts_early", lambda device: True)
    for module in (nf4_matmul, nf4_tiled):
        monkeypatch.setattr(module, "tuned_blocks", lambda *key: None)
    compiled_for_cpu.launched.clear()
    return compiled_for_cpu
