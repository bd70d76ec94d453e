"""Numbers and other people's text, written for a reader."""

import pytest

from qlorachat.training.wording import duration, printable, size


@pytest.mark.parametrize(
    ("count", "written"),
    [(0, "0 MiB"), (5 * 2**20, "5 MiB"), (2**30, "1.00 GiB"), (int(6.666 * 2**30), "6.67 GiB")],
)
def test_size(count: int, written: str) -> None:
    assert size(count) == written


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (3569, "59 min"),
        (3599, "1 h 00 min"),
        (4 * 3600 + 300, "4 h 05 min"),
    ],
)
def test_duration(seconds: float, written: str) -> None:
    assert duration(seconds) == written


def test_control_characters_cannot_steer_a_terminal() -> None:
    assert printable("a\x1b[31m\tb\nc\r\x9bd\ud800") == "a\ufffd[31m\tb\nc\ufffd\ufffdd\ufffd"
    assert printable("ずんだもん") == "ずんだもん"
