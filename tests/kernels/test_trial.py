"""Trials of the CUDA kernels, run on a CPU (`emulator`); what a card is told when one fails."""

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch

from qlorachat.kernels import card as cards
from qlorachat.kernels import cuda_source, decode_step, trial
from qlorachat.kernels.decode_attention import attend_sums_reference
from qlorachat.kernels.decode_lora import Expanding, Shrinking
from qlorachat.kernels.eight_bits import INT8
from qlorachat.kernels.nf4_write_out import LoraMatrices
from tests.kernels.emulator import HOPPER, Emulator, OnCard
from tests.kernels.test_decode_step import KERNELS

HALF = torch.bfloat16
LIKE = torch.empty(0).as_subclass(OnCard)
CARD = torch.device("cuda", 0)
TRIALS: list[tuple[Callable[[torch.Tensor], None], int]] = [
    (trial.try_products, 46),
    (trial.try_step, 24),
    (partial(trial.try_attention, group=1, head_dim=128, cached=HALF), 2),
    (partial(trial.try_attention, group=3, head_dim=64, cached=INT8), 2),
    (partial(trial.try_attention, group=4, head_dim=256, cached=HALF), 2),
]


@pytest.mark.parametrize(("attempt", "launches"), TRIALS)
def test_all_kernels_pass(
    card: Emulator, attempt: Callable[[torch.Tensor], None], launches: int
) -> None:
    for card.seed in (0, 1, 2):
        attempt(LIKE)
    assert len(card.launched) == 3 * launches


def test_all_kernels_of_a_step_are_tried(card: Emulator) -> None:
    trial.try_step(LIKE)
    roomy = card.card is HOPPER  # others have no room for all of 64 ranks
    least = {each for each in KERNELS if roomy or not each.endswith("_64")}
    assert KERNELS >= set(card.launched) >= least


@pytest.mark.parametrize("wrong", [1.0, float("nan")])
def test_a_wrong_result_is_found(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(*arguments: Any, **of_a_card: object) -> None:
        attend_sums_reference(*arguments)
        out = arguments[-1]
        out[0, 0, 0] += wrong

    monkeypatch.setattr(trial, "attend_sums", attend)
    with pytest.raises(RuntimeError, match="attention in 1 blocks differs from its reference by"):
        trial.try_attention(torch.empty(0), 1, 64, HALF)


LEFT_OUT = [
    (trial.try_products, trial, "nf4_write_out", LoraMatrices, "a weight written out"),
    (trial.try_products, trial, "nf4_matmul_tiled", Shrinking, "a product of 3 rows"),
    (trial.try_products, trial, "nf4_matmul_tiled", Expanding, "a product of 3 rows"),
    (trial.try_step, decode_step, "begin_residual", Shrinking, "the first residual"),
    (trial.try_step, decode_step, "add_to_residual", Shrinking, "a residual"),
    (trial.try_step, decode_step, "add_to_residual", Expanding, "a residual"),
    (trial.try_step, decode_step, "silu_mul_sums", Expanding, "SwiGLU"),
]


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("attempt", "module", "name", "kind", "what"), LEFT_OUT)
def test_adapters_that_are_left_out_are_found(
    attempt: Callable[[torch.Tensor], None],
    module: ModuleType,
    name: str,
    kind: type[LoraMatrices | Shrinking | Expanding],
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = getattr(module, f"{name}_reference")

    def leave_out(*arguments: Any) -> Any:
        return reference(*(None if isinstance(each, kind) else each for each in arguments))

    monkeypatch.setattr(module, name, leave_out)
    with pytest.raises(RuntimeError, match=f"{what} differs from its reference by"):
        attempt(LIKE)


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A card on which everything compiles."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch, "empty", lambda size, device: LIKE)
    monkeypatch.setattr(cuda_source, "found", lambda: True)
    monkeypatch.setattr(cuda_source, "load", lambda *given: None)
    monkeypatch.setattr(cuda_source, "shared_bytes", lambda device: 99 * 1024)
    for name in ("try_products", "try_step", "try_attention"):
        monkeypatch.setattr(cards, name, lambda *given: None)
    yield
    cards.why_not_products.cache_clear()
    cards.why_not_step.cache_clear()


def fail(*given: object) -> None:
    raise RuntimeError("CUDA: no image")


SHAPE = (32, 8, 128, HALF, CARD)
FAILURE = "our kernels fail on it (CUDA: no image)"


@pytest.mark.usefixtures("ampere")
def test_a_card_that_passes_runs_all() -> None:
    assert cards.why_not_products(CARD) is None
    assert cards.why_not_step(*SHAPE) is None


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("broken", ["try_products", "try_step", "try_attention"])
def test_a_kernel_that_fails_is_not_used(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, broken, fail)
    products = broken == "try_products"
    assert cards.why_not_products(CARD) == (FAILURE if products else None)
    assert cards.why_not_step(*SHAPE) == (None if products else FAILURE)


@pytest.mark.usefixtures("ampere")
def test_a_driver_that_refuses_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_source, "load", fail)
    assert cards.why_not_products(CARD) == cards.why_not_step(*SHAPE) == FAILURE


def test_other_devices_are_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cards.why_not_products(torch.device("cpu")) == "it is no NVIDIA card"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    turing = torch.device("cuda", 1)
    assert cards.why_not_products(turing) == "its tensor cores are older than Ampere's"
    assert "80 wide" in str(cards.why_not_step(32, 8, 80, HALF, turing))
