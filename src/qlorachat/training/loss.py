"""The loss of answers: cross entropy at trained positions alone, never all logits at once."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from qlorachat.training.data.batches import IGNORED

CHUNK = 512  # positions whose logits exist at one time


def answer_loss(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of the cross entropies of all trained tokens, float32.

    `hidden` is the decoder's output (rows, tokens, hidden size); `labels` are ids (rows, tokens)
    with IGNORED at others, where token t is predicted from t - 1. On the CPU, labels cost a
    card no wait.
    """
    following = labels[:, 1:].flatten()
    places = (following != IGNORED).nonzero()[:, 0]
    states = hidden[:, :-1].flatten(0, 1)[places.to(hidden.device)]
    targets = following[places].to(hidden.device)
    total = hidden.new_zeros((), dtype=torch.float32)
    for chunk, target in zip(states.split(CHUNK), targets.split(CHUNK), strict=True):
        # computed again in the backward pass: a chunk's logits are larger than all its states
        total = total + checkpoint(
            _chunk_loss, head, chunk, target, use_reentrant=False, preserve_rng_state=False
        )
    return total


def count_trained(labels: torch.Tensor) -> int:
    """How many tokens `answer_loss` sums over; a first token is never trained."""
    return int((labels != IGNORED).sum())


def _chunk_loss(head: nn.Module, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(head(states).float(), targets, reduction="sum")
