"""State that goes to disk comes back equal, tensors to the bit."""

from pathlib import Path

import torch
from torch import nn

from qlorachat.training.state_file import read_state, write_state


def test_every_kind_of_value(tmp_path: Path) -> None:
    shared = torch.arange(3.0)
    state = {
        "none": None,
        "float": 0.1 + 0.2,
        "flags": [True, False],
        "names": {0: "a", "b": 1},
        "tensors": [shared, shared, torch.tensor(5), torch.ones(2, 2, dtype=torch.bfloat16).T],
        "$tensor": "a key like ours",
        "random": torch.get_rng_state(),
    }
    write_state(tmp_path, state)
    read = read_state(tmp_path)
    assert read.keys() == state.keys()
    assert all(
        torch.equal(a, b)
        for a, b in zip(read.pop("tensors"), state.pop("tensors"), strict=True)  # type: ignore[arg-type]
    )
    assert torch.equal(read.pop("random"), state.pop("random"))  # type: ignore[arg-type]
    assert read == state


def test_an_optimizer_goes_on_as_if_nothing_was(tmp_path: Path) -> None:
    def step(weight: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        (weight**2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    weights = [nn.Parameter(torch.arange(4.0)) for _ in range(2)]
    optimizers = [torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1) for weight in weights]
    for pair in zip(weights, optimizers, strict=True):
        step(*pair)
    write_state(tmp_path, optimizers[1].state_dict())
    optimizers[1] = torch.optim.AdamW([weights[1]], lr=0.5)
    optimizers[1].load_state_dict(read_state(tmp_path))
    for pair in zip(weights, optimizers, strict=True):
        step(*pair)
    assert torch.equal(*weights)
