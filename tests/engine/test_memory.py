"""The memory plan: what is asked for in people's units, what fits, and what is said when not."""

import pytest
import torch

from qlorachat.engine.memory import plan_memory
from qlorachat.errors import ConfigError, ModelError

CPU = torch.device("cpu")


def plan(
    memory: str | None,
    *,
    block_bytes: int = 2**20,
    wanted: int = 10**9,
    weights: int = 0,
    adapters: int = 0,
) -> int:
    made = plan_memory(
        device=CPU,
        weights=weights,
        adapters=adapters,
        block_bytes=block_bytes,
        block_size=16,
        wanted_tokens=wanted,
        memory=memory,
    )
    assert f"{made.tokens:,} tokens" in str(made)
    return made.blocks


@pytest.mark.parametrize(
    ("memory", "blocks"), [("1GiB", 1024), ("512MiB", 512), ("1.5 GiB", 1536), ("1GB", 953)]
)
def test_sizes_are_taken_as_they_are(memory: str, blocks: int) -> None:
    assert plan(memory) == blocks


def test_weights_and_adapters_are_part_of_what_is_allowed() -> None:
    assert plan("1GiB", weights=512 * 2**20, adapters=2**28) == 256
    with pytest.raises(ModelError, match="No KV cache fits"):
        plan("1GiB", weights=3 * 2**30)


def test_a_fraction_is_of_what_there_is() -> None:
    assert 0 < plan("0.2") < plan("0.4")


def test_no_more_than_is_wanted() -> None:
    assert plan("1GiB", wanted=1600) == 100


@pytest.mark.parametrize("memory", ["12", "GiB", "-1GiB", "1.5", "0", "lots", "2 TiB"])
def test_what_is_no_size_is_one_clear_error(memory: str) -> None:
    with pytest.raises(ConfigError, match="12GiB"):
        plan(memory)


def test_a_cache_that_cannot_hold_a_dialog_is_refused() -> None:
    with pytest.raises(ModelError, match="No KV cache fits"):
        plan("1GiB", block_bytes=2**29)
