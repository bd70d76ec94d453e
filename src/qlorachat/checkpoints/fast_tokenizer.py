"""A `tokenizers` vocabulary behind our protocol: text is plain text, whatever it spells."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.pre_tokenizers import Sequence as Splits

from qlorachat.checkpoints.byte_fallback import byte_fallback_decoder
from qlorachat.errors import DialogError

# an added token such as `<|user|>` or `[INST]`, which files often don't mark as special
_TAG = re.compile(r"<.+>|\[.+\]")
# what Unicode and `tokenizers` call white space; str.strip would take \x1c to \x1f, too
_BLANKS = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


class FastTokenizer:
    """A `tokenizers` backend behind our protocol; may be called from any thread."""

    def __init__(
        self,
        backend: Backend,
        *,
        bos_token: str | None,
        eos_token: str | None,
        pad_token: str | None = None,
        unk_token: str | None = None,
        adds_bos: bool = False,
    ) -> None:
        """The backend is changed: it no longer truncates, pads, or finds control tokens in text."""
        self._bos, self._eos, self._adds_bos = bos_token, eos_token, adds_bos
        self._pad, self._unk = pad_token, unk_token
        added = backend.get_added_tokens_decoder()
        ends = {bos_token, eos_token}
        self._hidden = {i for i, token in added.items() if token.special or token.content in ends}
        self._control = {
            token.content: i
            for i, token in sorted(added.items())
            if i in self._hidden or _TAG.fullmatch(token.content)
        }
        tokens = {name: added[i] for name, i in self._control.items()}
        self._takes_before = {name for name, token in tokens.items() if token.lstrip}
        self._takes_behind = {name for name, token in tokens.items() if token.rstrip}
        self._backend = _as_plain(backend, list(self._control))
        self._further = _without_prefix(self._backend)
        unknown = self._backend.encode("\U0010ffff", add_special_tokens=False).ids
        self._forbidden = {i: name for name, i in self._control.items() if i not in unknown}
        self._decode = byte_fallback_decoder(backend) or self._decode_by_backend

    @property
    def bos_token(self) -> str | None:
        return self._bos

    @property
    def eos_token(self) -> str | None:
        return self._eos

    @property
    def pad_token(self) -> str | None:
        return self._pad

    @property
    def unk_token(self) -> str | None:
        return self._unk

    @property
    def adds_bos(self) -> bool:
        return self._adds_bos

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Every control token by name; read only."""
        return MappingProxyType(self._control)

    def encode(
        self, text: str, *, after: str | None = None, before: str | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of plain text, and the (start, end) characters each covers; nothing is added.

        after, before: the control tokens beside it, to which blanks of the text may belong. After
        none it is the start of a text, before which some vocabularies put a space.
        The bytes of one character that fell to several tokens all cover that character. Raises
        DialogError where the vocabulary has no plain spelling of a control token's name.
        """
        inner = text.rstrip(_BLANKS) if before in self._takes_before else text
        skipped = len(inner) - len(inner.lstrip(_BLANKS)) if after in self._takes_behind else 0
        backend = self._backend if after is None else self._further
        try:
            encoding = backend.encode(inner[skipped:], add_special_tokens=False)
        except TypeError as error:  # half of a UTF-16 pair, which JSON can carry
            raise DialogError("The text holds a character that is no Unicode.") from error
        if found := self._forbidden.keys() & set(encoding.ids):
            raise DialogError(
                f"This model's tokenizer reads `{self._forbidden[min(found)]}` in a message as a "
                "control token: take it out of the text."
            )
        spans = encoding.offsets
        if skipped:
            spans = [(skipped + start, skipped + end) for start, end in spans]
        return encoding.ids, spans

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole answer: special tokens left out, nothing cleaned up."""
        return self._decode([token for token in ids if token not in self._hidden])

    def _decode_by_backend(self, ids: Sequence[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


def _as_plain(backend: Backend, control: Sequence[str]) -> Backend:
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None  # it would trim blanks from offsets, and adds nothing we want
    backend.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in control]
    )
    backend.encode_special_tokens = True
    return backend


def _without_prefix(backend: Backend) -> Backend:
    """For text behind a control token: where only the first text gets a space before it."""
    if not any(each.prepend_scheme == "first" for each in _metaspaces(backend)):
        return backend
    further = Backend.from_str(backend.to_str())
    further.encode_special_tokens = True
    for each in _metaspaces(further):
        each.prepend_scheme = "never"
    return further


def _metaspaces(backend: Backend) -> list[Metaspace]:
    """Whose settings are the backend's own."""
    splitting = backend.pre_tokenizer
    parts = list(cast(Any, splitting)) if isinstance(splitting, Splits) else [splitting]
    return [each for each in parts if isinstance(each, Metaspace)]
