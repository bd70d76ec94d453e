"""What a run may take, and what is said to people whose run takes more."""

from typing import Any

import psutil
import pytest
import torch

from qlorachat.checkpoints.memory import GIB
from qlorachat.errors import ConfigError, ModelError
from qlorachat.training.config import TrainConfig
from qlorachat.training.memory.limits import (
    Alternative,
    cap_process,
    check_fits,
    memory_limit,
    what_would_fit,
)
from qlorachat.training.memory.plan import predict
from tests.training.memory.shapes import LLAMA_7B

CPU = torch.device("cpu")


def changes(config: TrainConfig, gib: float, longest: int = 1024) -> list[Alternative]:
    shape = LLAMA_7B if config.quantization == "16bit" else LLAMA_7B.in_nf4()
    return what_would_fit(
        shape, config, longest=longest, device_type="cuda", limit=round(gib * GIB)
    )


def refusal(config: TrainConfig, gib: float) -> str:
    limit = round(gib * GIB)
    plan = predict(LLAMA_7B.in_nf4(), config, longest=1024, device_type="cuda", limit=limit)
    with pytest.raises(ModelError) as error:
        check_fits(plan, changes(config, gib))
    return str(error.value)


def test_no_change_where_it_fits_or_nothing_limits() -> None:
    config = TrainConfig()
    assert changes(config, 80) == []
    shape = LLAMA_7B.in_nf4()
    asked: dict[str, Any] = {"longest": 1024, "device_type": "cuda", "limit": None}
    assert what_would_fit(shape, config, **asked) == []
    check_fits(predict(shape, config, **asked), [])


def test_the_smallest_change_that_fits_ends_the_list() -> None:
    config = TrainConfig(gradient_checkpointing=False, micro_batch=4, accumulation=3)
    tried = changes(config, 6)
    assert [each.change for each in tried] == [
        "--gradient-checkpointing",
        "--gradient-checkpointing --micro-batch 2 --accumulation 6",
    ]
    assert tried[0].total > 6 * GIB >= tried[1].total
    assert (tried[1].config.micro_batch, tried[1].config.accumulation) == (2, 6)


def test_unchanged_training_first_then_what_costs_quality() -> None:
    config = TrainConfig(
        gradient_checkpointing=False,
        micro_batch=6,
        accumulation=1,
        optimizer="adamw_torch",
        quantization="16bit",
        max_length=1500,
        rank=48,
    )
    tried = changes(config, 0.5, longest=1300)
    flags = "".join(f"\n{each.change}" for each in tried)
    order = [
        "--gradient-checkpointing",
        "--micro-batch 3 --accumulation 2",
        "--micro-batch 2 --accumulation 3",
        "--micro-batch 1 --accumulation 6",
        "--optimizer paged_adamw_8bit",
        "--quantization nf4",
        "--max-length 1024",
        "--max-length 512",
        "--max-length 256",
        "--rank 32",
        "--rank 16",
        "--rank 8",
    ]
    assert len(tried) == len(order)
    assert all(step in each.change for step, each in zip(order, tried, strict=True))
    assert "--max-length 1024 --max-length" not in flags
    totals = [each.total for each in tried]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(totals)


@pytest.mark.parametrize("rows", range(1, 13))
def test_a_step_keeps_its_rows(rows: int) -> None:
    for each in changes(TrainConfig(micro_batch=rows, accumulation=5), 0):
        assert each.config.micro_batch * each.config.accumulation == rows * 5


def test_an_initial_adapter_keeps_its_rank() -> None:
    assert all("--rank" not in each.change for each in changes(TrainConfig(init_adapter="x"), 0))


def test_a_cpu_pages_nothing() -> None:
    tried = what_would_fit(
        LLAMA_7B.in_nf4(), TrainConfig(), longest=512, device_type="cpu", limit=0
    )
    assert "--optimizer adamw_8bit" in tried[-1].change


def test_what_fits_is_said_as_flags_in_one_line() -> None:
    said = refusal(TrainConfig(), 6)
    assert "where it may take 6.00 GiB: use --micro-batch 2 --accumulation 4, which" in said
    assert "\n" not in said


def test_it_is_said_when_nothing_fits() -> None:
    assert "no setting makes it fit" in refusal(TrainConfig(), 1)
    smallest = TrainConfig(micro_batch=1, max_length=64, rank=4)
    assert "no setting makes it smaller" in refusal(smallest, 1)


def test_a_cpu_is_limited_on_request() -> None:
    assert memory_limit(None, CPU) is None
    assert memory_limit("2GiB", CPU) == 2 * GIB
    assert memory_limit("0.5", CPU) == psutil.virtual_memory().total // 2
    with pytest.raises(ConfigError, match="12GiB"):
        memory_limit("much", CPU)
    cap_process(GIB, CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_raises_rather_than_spills() -> None:
    card = torch.device("cuda", 0)
    whole = memory_limit(None, card)
    assert whole is not None
    assert memory_limit("1000GiB", card) == pytest.approx(whole, rel=0.05)
    cap_process(GIB, card)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 * GIB, dtype=torch.uint8, device=card)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, card)
