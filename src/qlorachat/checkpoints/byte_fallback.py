"""Decoding of vocabularies with byte pieces, in which one broken byte spoils no neighbour.

tokenizers' own ByteFallback turns a whole run of byte pieces into U+FFFD when a part is no UTF-8.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def byte_fallback_decoder(backend: Backend) -> Callable[[Sequence[int]], str] | None:
    """How to decode ids of a vocabulary with byte pieces; None for any other vocabulary.

    Covers the decoder of Llama's and Gemma's families: pieces with a replaced blank, byte pieces,
    and blanks stripped from the start.
    """
    steps = _steps(json.loads(backend.decoder.__getstate__()) if backend.decoder else None)
    kinds = [step["type"] for step in steps]
    if kinds not in (
        ["Replace", "ByteFallback", "Fuse", "Strip"],
        ["Replace", "ByteFallback", "Fuse"],
    ):
        return None
    blank: str = steps[0]["pattern"]["String"]
    stripped = steps[3]["start"] if len(steps) > 3 else 0
    pieces: dict[int, bytes] = {}

    def decode(ids: Sequence[int]) -> str:
        for token in ids:
            if token not in pieces:
                pieces[token] = _bytes_of(backend.id_to_token(token) or "", blank)
        text = b"".join(pieces[token] for token in ids).decode("utf-8", "replace")
        return text[len(text[:stripped]) - len(text[:stripped].lstrip(" ")) :]

    return decode


def _bytes_of(piece: str, blank: str) -> bytes:
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(match[1])
    return piece.replace(blank, " ").encode()


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = (decoder or {}).get("decoders", [])
    return steps
