"""What the trainer knows by itself."""

import pytest
from transformers.training_args import OptimizerNames

from qlorachat.training.trainer import unpaged

NAMES = {name.value for name in OptimizerNames}


@pytest.mark.parametrize("name", sorted(name for name in NAMES if "paged" in name))
def test_every_paged_optimizer_has_one_without_pages(name: str) -> None:
    assert unpaged(name) in NAMES
    assert "paged" not in unpaged(name)


def test_others_keep_their_name() -> None:
    assert all(unpaged(name) == name for name in NAMES if "paged" not in name)
