"""A record becomes a dialog by the columns it has, or is refused with one clause of a reason."""

from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from types import MappingProxyType

from qlorachat.errors import DialogError
from qlorachat.messages import Message, Role

Columns = Mapping[str, object]

NEEDED = (
    "instruction and output (input may be there too), prompt and completion, messages, or "
    "conversations"
)

_SHOWN = 20  # columns
_SHAREGPT_ROLES: Mapping[str, Role] = MappingProxyType(
    {"system": "system", "human": "user", "gpt": "assistant"}
)


class BadRecord(Exception):
    """A record that no sample can be made of; `str(error)` is one clause."""


def to_messages(columns: Columns, separator: str) -> tuple[Message, ...]:
    """The dialog of a record, which ends with the assistant's turn; null is as good as missing.

    The first format whose columns are there is taken; other columns mean nothing. A prompt or a
    completion may be a text or a list of messages. Raises BadRecord.
    """
    columns = {name: value for name, value in columns.items() if value is not None}
    for names, read in _FORMATS.items():
        if all(name in columns for name in names):
            try:
                messages = read(columns, separator)
            except DialogError as error:
                raise BadRecord(clause(error)) from None
            return _checked(messages)
    raise BadRecord(_what_lacks(columns))


def knows(names: Collection[str]) -> bool:
    """Whether these columns suffice for one of the formats."""
    return any(all(name in names for name in needed) for needed in _FORMATS)


def select(names: Collection[str]) -> list[str]:
    """Those of the columns that some format reads, in their order."""
    read = {"input"}.union(*_FORMATS)
    return [name for name in names if name in read]


def listed(names: Iterable[str]) -> str:
    """The first columns for people; a name is escaped, whatever is in it."""
    return ", ".join(map(repr, islice(names, _SHOWN))) or "no columns"


def clause(error: Exception) -> str:
    """An error's message as a clause of another sentence."""
    return str(error).rstrip(".")


def _from_messages(columns: Columns, _: str) -> tuple[Message, ...]:
    return _messages("messages", columns["messages"])


def _from_conversations(columns: Columns, _: str) -> tuple[Message, ...]:
    turns = _list("conversations", columns["conversations"])
    return tuple(_sharegpt_turn(turn) for turn in turns)


def _from_prompt(columns: Columns, _: str) -> tuple[Message, ...]:
    return (
        *_text_or_messages("prompt", columns["prompt"], "user"),
        *_text_or_messages("completion", columns["completion"], "assistant"),
    )


def _from_instruction(columns: Columns, separator: str) -> tuple[Message, ...]:
    parts = [_text(name, columns.get(name, "")) for name in ("instruction", "input")]
    question = separator.join(part for part in parts if part.strip())
    return Message("user", question), Message("assistant", _text("output", columns["output"]))


_FORMATS: Mapping[tuple[str, ...], Callable[[Columns, str], tuple[Message, ...]]] = (
    MappingProxyType(
        {
            ("messages",): _from_messages,
            ("conversations",): _from_conversations,
            ("prompt", "completion"): _from_prompt,
            ("instruction", "output"): _from_instruction,
        }
    )
)


def _sharegpt_turn(turn: object) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRecord(f"a turn of its conversations is {_kind(turn)}, not an object")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        known = ", ".join(_SHAREGPT_ROLES)
        raise BadRecord(f"a turn of its conversations is from {speaker!r}, not one of {known}")
    return Message(_SHAREGPT_ROLES[speaker], _text("value", turn.get("value")))


def _text_or_messages(name: str, value: object, role: Role) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message(role, value),)
    return _messages(name, value)


def _messages(name: str, value: object) -> tuple[Message, ...]:
    # parse itself says of anything why it is no message
    return tuple(Message.parse(each) for each in _list(name, value))  # type: ignore[arg-type]


def _list(name: str, value: object) -> list[object]:
    if not isinstance(value, list):
        raise BadRecord(f"its {name} is {_kind(value)}, not a list")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"its {name} is {_kind(value)}, not text")
    return value


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _checked(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages, if they are a dialog that ends with an answer and has no empty one."""
    if not messages:
        raise BadRecord("it has no messages")
    if messages[-1].role != "assistant":
        raise BadRecord(f"it ends with the {messages[-1].role}'s turn, not the assistant's")
    if not any(message.role == "user" and message.content.strip() for message in messages):
        raise BadRecord("nothing is asked in it")
    if not all(message.content.strip() for message in messages if message.role == "assistant"):
        raise BadRecord("its answer is empty")
    return messages


def _what_lacks(columns: Columns) -> str:
    """The rest of the format that was begun, else what all formats need."""
    for names in _FORMATS:
        if names[0] in columns:
            missing = next(name for name in names if name not in columns)
            return f"its {missing} is missing or null"
    return f"it has {listed(columns)} where {NEEDED} are needed"
