"""What cards before Hopper run, on a Hopper card: for measurements and checks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from qlorachat.kernels import card, cuda_source, decode_attention, nf4_matmul

_SHARED_BYTES = 99 * 1024  # that a block may have on an RTX 3060, 3090, 4090


@contextmanager
def as_ampere(wanted: bool = True) -> Iterator[None]:
    """No wgmma, clusters or dependent launch, and as much shared memory as a GeForce has.

    Machine code is compiled for the card at hand. Does nothing unless `wanted`.
    """
    with ExitStack() as changed:
        if wanted:
            for module in (card, nf4_matmul):
                changed.enter_context(patch.object(module, "is_hopper", lambda device: False))
            for module in (cuda_source, decode_attention):
                changed.enter_context(patch.object(module, "starts_early", lambda device: False))
            few = patch.object(cuda_source, "shared_bytes", lambda device: _SHARED_BYTES)
            changed.enter_context(few)
        yield
