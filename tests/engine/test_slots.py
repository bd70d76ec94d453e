"""Adapter slots: pinned while used, least recently used out, slot 0 for the base."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlorachat.engine.slots import AdapterSlots


def test_the_base_has_slot_zero_and_pins_nothing() -> None:
    slots = AdapterSlots(0)
    assert slots.acquire(None) == 0
    slots.release(None)
    assert slots.acquire("a") is None


def test_an_adapter_keeps_its_slot_until_another_needs_it() -> None:
    slots = AdapterSlots(2)
    first = slots.acquire("a")
    slots.release("a")
    assert slots.acquire("a") == first
    assert slots.acquire("b") not in (None, 0, first)
    slots.release("a")
    assert slots.acquire("c") == first


def test_the_least_recently_used_goes_first() -> None:
    slots = AdapterSlots(2)
    old, new = slots.acquire("old"), slots.acquire("new")
    slots.release("new")
    slots.release("old")  # used last
    assert slots.acquire("c") == new
    assert slots.acquire("old") == old


def test_a_pinned_adapter_stays_until_its_last_user_is_gone() -> None:
    slots = AdapterSlots(1)
    slots.acquire("a")
    slots.acquire("a")
    slots.release("a")
    assert slots.acquire("b") is None
    slots.release("a")
    assert slots.acquire("b") == 1


def test_a_forgotten_adapter_leaves_its_slot_to_the_next_one() -> None:
    slots = AdapterSlots(2)
    slots.acquire("pinned")
    forgotten = slots.acquire("a")
    slots.release("a")
    slots.forget("a")
    slots.forget("a")
    assert slots.acquire("b") == forgotten
    with pytest.raises(AssertionError, match="uses the adapter"):
        slots.forget("b")


@given(st.integers(1, 3), st.lists(st.tuples(st.sampled_from("arf"), st.sampled_from("vwxyz"))))
def test_no_slot_is_shared_or_lost(num_slots: int, moves: list[tuple[str, str]]) -> None:
    slots = AdapterSlots(num_slots)
    users: Counter[str] = Counter()
    content: dict[int, str] = {}  # slot -> adapter, as the device has it
    for move, name in moves:
        if move == "a":
            slot = slots.acquire(name)
            pinned = [other for other, count in users.items() if count]
            assert (slot is None) == (len(pinned) == num_slots and name not in pinned)
            if slot is not None:
                assert 1 <= slot <= num_slots
                assert not users[content.get(slot, name)] or content[slot] == name
                content[slot] = name
                users[name] += 1
        elif move == "r" and users[name]:
            slots.release(name)
            users[name] -= 1
        elif move == "f" and not users[name]:
            slots.forget(name)
    pinned = [name for name, count in users.items() if count]
    assert all(content[slots.acquire(name) or 0] == name for name in pinned)
