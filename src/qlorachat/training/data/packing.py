"""Several samples in one row of a batch: bin packing that leaves little of a row empty."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence

Pack = tuple[int, ...]  # places in the sequence of samples


def pack(order: Iterable[int], lengths: Sequence[int], room: int) -> list[Pack]:
    """The samples in packs of at most `room` tokens by best fit, the longest sample first.

    Each goes where it leaves the least free; among samples of one length `order` decides. The
    rule, best-fit decreasing, needs at most 11/9 of the fewest possible packs and one more
    (Johnson et al., 1974). Time grows with the samples, times the log of the lengths that differ.
    """
    packs: list[list[int]] = []
    by_free: defaultdict[int, list[list[int]]] = defaultdict(list)  # free tokens -> packs
    frees: list[int] = []  # the keys of by_free that have packs, ascending
    for index in sorted(order, key=lengths.__getitem__, reverse=True):
        length = lengths[index]
        assert length <= room, "samples are cut to the row's length"
        place = bisect_left(frees, length)
        if place == len(frees):
            free = room
            packs.append(chosen := [])
        else:
            free = frees[place]
            chosen = by_free[free].pop()
            if not by_free[free]:
                del frees[place]
        chosen.append(index)
        left = by_free[free - length]
        if not left:
            insort(frees, free - length)
        left.append(chosen)
    return [tuple(chosen) for chosen in packs]
