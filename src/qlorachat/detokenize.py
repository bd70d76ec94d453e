"""Token ids become text that is safe to show: whole characters, and no part of a stop string."""

from collections.abc import Sequence

from qlorachat.errors import UsageError
from qlorachat.protocols import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how the bytes of a character not yet whole decode
_WINDOW = 16  # ids decoded together at most
_CONTEXT = 4  # ids kept when the window moves: a character has at most four bytes


class TextStream:
    """The text of one answer, piece by piece.

    The pieces join to `tokenizer.decode` of all ids, cut before the first stop string: the one
    that ends first, and of those the longest. A step decodes a few ids, however long the answer.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise UsageError("A stop string has at least one character.", param="stop")
        self.stopped = False
        self._decode = tokenizer.decode
        self._stop = tuple(stop)
        self._window: list[int] = []
        self._text = ""  # of the window
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, token_id: int) -> str:
        """The text that is safe to show after one more id; nothing once a stop string was found."""
        if self.stopped:
            return ""
        text = self._decode([*self._window, token_id])
        if len(text) == len(self._text) and self._is_silent(token_id):
            return ""
        piece = text[_whole(self._text) : _whole(text)]
        self._window.append(token_id)
        self._text = text
        if len(self._window) == _WINDOW:
            del self._window[:-_CONTEXT]
            self._text = self._decode(self._window)
        return self._release(piece)

    def flush(self) -> str:
        """The end of the text: an unfinished character, and what only looked like a stop string."""
        shown = ""
        if not self.stopped:
            shown = self._release(self._text[_whole(self._text) :]) + self._held
        self._window, self._text, self._held = [], "", ""
        return shown

    def _is_silent(self, token_id: int) -> bool:
        """Whether the id is no text, as a control token; it must not fill the window."""
        return not self._decode([token_id, token_id])  # twice: a first lone space is dropped

    def _release(self, piece: str) -> str:
        """What is safe to show of the held text with `piece` added; the rest is held."""
        text = self._held + piece
        if found := [(text.find(s) + len(s), text.find(s)) for s in self._stop if s in text]:
            self.stopped, self._held = True, ""
            _, start = min(found)
            return text[:start]
        safe = len(text) - max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[safe:]
        return text[:safe]


def _whole(text: str) -> int:
    """How many characters of a growing text stay as they are: all but an unfinished last one."""
    return len(text) - text.endswith(_UNFINISHED)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
