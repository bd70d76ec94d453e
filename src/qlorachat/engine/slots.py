"""Which adapter is in which slot of the device: one that a running sequence uses stays there."""

from collections import Counter, OrderedDict


class AdapterSlots:
    """Slots 1..num_slots hold one adapter each, known by its content hash; slot 0 is the base."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots, 0, -1))
        self._slot_of: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._users: Counter[str] = Counter()

    def acquire(self, sha256: str | None) -> int | None:
        """The adapter's slot, pinned until as many releases; None when all are pinned by others.

        Where the slot held another adapter, the weights must be copied before the next launch
        that names it; launches before that still find the old ones.
        """
        if sha256 is None:
            return 0
        slot = self._slot_of.get(sha256) or self._take()
        if slot is not None:
            self._slot_of[sha256] = slot
            self._users[sha256] += 1
        return slot

    def release(self, sha256: str | None) -> None:
        """Undo one acquire; the adapter stays in its slot until another needs it."""
        if sha256 is None:
            return
        self._users[sha256] -= 1
        self._slot_of.move_to_end(sha256)

    def forget(self, sha256: str) -> None:
        """Free the slot of an adapter that is being unloaded; nothing may use it any more."""
        assert not self._users[sha256], "a running sequence uses the adapter"
        if slot := self._slot_of.pop(sha256, None):
            self._free.append(slot)

    def _take(self) -> int | None:
        """A slot for another adapter: an empty one, else that of the least recently used."""
        if self._free:
            return self._free.pop()
        unused = next((sha256 for sha256 in self._slot_of if not self._users[sha256]), None)
        return None if unused is None else self._slot_of.pop(unused)
