"""How sizes, times and other people's text are written for a reader."""

import re

_MIB, _GIB = 2**20, 2**30
# what would steer a terminal, or cannot be written to one
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def size(count: int) -> str:
    """Bytes as GiB with two decimals, below one as whole MiB."""
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / _MIB:.0f} MiB"


def duration(seconds: float) -> str:
    """Seconds as `45 s`, `12 min` or `1 h 05 min`, rounded."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def printable(text: str) -> str:
    """A text without control characters, of which only tabs and line ends stay."""
    return _CONTROL.sub("\ufffd", text)
