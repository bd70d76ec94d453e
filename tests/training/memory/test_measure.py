"""The measured column: real passes of a tiny model, and steps of known size."""

import math
import threading
from pathlib import Path

import pytest
import torch

from qlorachat.checkpoints import locate
from qlorachat.errors import ModelError
from qlorachat.training.config import TrainConfig
from qlorachat.training.memory.measure import Batch, measure
from qlorachat.training.memory.plan import MemoryPlan, Part, predict
from qlorachat.training.memory.shape import ModelShape
from qlorachat.training.model import attach_adapter, load_base

CPU = torch.device("cpu")
MIB = 2**20
PARTS = {
    "base weights": 100,
    "adapter and gradients": 20,
    "optimizer": 10,
    "checkpoints": 5,
    "one layer": 3,
    "logits": 4,
}
PLAN = MemoryPlan("cpu", 10**9, tuple(Part(*item) for item in PARTS.items()))
STATIC = {"base weights": 101, "adapter and gradients": 21, "optimizer": 11}


def batch(rows: int, tokens: int) -> Batch:
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(tokens).repeat(rows, 1)}


def test_parts_that_stay_are_given_and_the_rest_is_seen_as_one() -> None:
    seen: list[int] = []

    def step(each: Batch) -> None:
        seen.append(each["input_ids"].numel())
        if len(seen) == 1:
            memory = torch.ones(200 * MIB, dtype=torch.uint8)
            threading.Event().wait(0.1)  # as long as a pass of a small model
            assert memory[-1] == 1

    measured = measure(
        PLAN, step=step, longest=batch(2, 9), median=batch(1, 7), static=STATIC, device=CPU
    )
    assert seen == [18, 7]
    parts = measured.plan.parts
    assert [(part.name, part.predicted) for part in parts] == [
        ("base weights", 100),
        ("adapter and gradients", 20),
        ("optimizer", 10),
        ("activations", 9),
    ]
    assert [part.measured for part in parts[:3]] == [101, 21, 11]
    assert 100 * MIB < (parts[3].measured or 0) < 600 * MIB  # other memory comes and goes
    assert measured.plan.predicted == PLAN.predicted
    assert measured.plan.needed == 133 + (parts[3].measured or 0)
    assert math.isclose(measured.tokens_per_second * measured.seconds, 7)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_real_pass(tiny: Path) -> None:
    checkpoint = locate(str(tiny))
    config = TrainConfig(device="cpu", quantization="nf4", max_length=256, micro_batch=64)
    model = attach_adapter(load_base(checkpoint, config), checkpoint, config, None)
    for parameter in model.parameters().values():
        parameter.grad = torch.zeros_like(parameter)

    def step(each: Batch) -> None:
        model.loss(each).backward()

    step(batch(1, 32))  # what libraries allocate once is no activation
    shape = ModelShape.of(checkpoint, "nf4")
    plan = predict(shape, config, longest=256, device_type="cpu", limit=None)

    def ratio() -> float:
        measured = measure(
            plan, step=step, longest=batch(64, 256), median=batch(1, 128), static=STATIC, device=CPU
        )
        activations = measured.plan.parts[-1]
        assert activations.measured is not None
        assert activations.predicted > 90 * MIB
        return activations.measured / activations.predicted

    # The process grows by what else goes on in it, too: the least of three is the pass's own.
    assert 0.5 < min(ratio() for _ in range(3)) < 2


def test_running_out_of_memory_is_one_line() -> None:
    def step(each: Batch) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\n...")

    with pytest.raises(
        ModelError, match="2 rows of 9 tokens ran out of memory of 954 MiB"
    ) as error:
        measure(PLAN, step=step, longest=batch(2, 9), median=batch(1, 7), static=STATIC, device=CPU)
    assert "\n" not in str(error.value)
