"""The CUDA kernels on a CPU, where there is a C++ compiler."""

import pytest

from qlorachat.kernels import cuda_source, decode_attention, decode_step, nf4_matmul
from tests.kernels import emulator


@pytest.fixture(scope="session")
def compiled_for_cpu(tmp_path_factory: pytest.TempPathFactory) -> emulator.Emulator:
    if emulator.compiler() is None:
        pytest.skip("needs a C++ compiler on Linux")
    return emulator.Emulator(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(
    params=[emulator.HOPPER, emulator.AMPERE, emulator.BLACKWELL], ids=lambda card: card.name
)
def card(
    request: pytest.FixtureRequest,
    compiled_for_cpu: emulator.Emulator,
    monkeypatch: pytest.MonkeyPatch,
) -> emulator.Emulator:
    """Launches on tensors that are `OnCard` run on this CPU, as on each kind of card."""
    kind: emulator.Card = request.param
    monkeypatch.setattr(cuda_source, "load_kernel", compiled_for_cpu.load_kernel)
    monkeypatch.setattr(cuda_source, "launch", compiled_for_cpu.launch)
    monkeypatch.setattr(cuda_source, "shared_bytes", lambda device: kind.shared_bytes)
    monkeypatch.setattr(decode_attention, "starts_early", lambda device: kind.starts_early)
    for module in (nf4_matmul, decode_step):
        monkeypatch.setattr(module, "is_hopper", lambda device: kind is emulator.HOPPER)
    monkeypatch.setattr(nf4_matmul, "tuned_blocks", lambda *key: None)
    compiled_for_cpu.card = kind
    compiled_for_cpu.launched.clear()
    return compiled_for_cpu
