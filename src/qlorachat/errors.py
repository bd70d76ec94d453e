"""Every error a caller can meet, as one tree; each carries one clear line and an exit code.

QlorachatError                 1  anything of ours
├── UsageError                 2  what the caller asked for cannot be: an option, a name, a dialog
│   ├── ConfigError               an option, environment variable or config file
│   ├── UnknownName               a name that nothing is registered under
│   ├── PluginError               a plugin that is missing, broken or in conflict
│   ├── DialogError               messages that the prompt format has no place for
│   ├── ContextOverflow           the prompt and the tokens asked for exceed the context
│   └── AdapterError              an adapter folder that cannot be served
├── ModelError                 3  the base model could not be brought or loaded
│   └── HubError                  the model hub: unreachable, gated, no such repository
├── AddressError               4  the address to listen on is taken or not allowed
├── QueueFull                  1  too many requests are waiting; try again
└── EngineError                1  a generation failed, or the engine is closed or dead
    └── OutOfMemory               a generation that the device has no memory for; others go on
"""

import difflib
from collections.abc import Iterable


class QlorachatError(Exception):
    """The base of all our errors; `str(error)` is one line for people."""

    exit_code = 1


class UsageError(QlorachatError):
    """What the caller asked for cannot be; `param` names the option or field at fault."""

    exit_code = 2

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ConfigError(UsageError):
    """An option, environment variable or config file that is wrong."""


class UnknownName(UsageError):
    """A name that nothing is registered under: says the nearest name and the known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name = kind, name
        super().__init__(
            f"The {kind} `{name}` does not exist{suggest(name, known)}{hint}",
            param=kind,
        )


class PluginError(UsageError):
    """A plugin that is missing, broken or in conflict with another."""


class DialogError(UsageError):
    """Messages that the prompt format has no place for, or that would forge its control text."""


class ContextOverflow(UsageError):
    """The prompt and the tokens asked for exceed the context; counts are in tokens."""

    def __init__(self, prompt_tokens: int, max_tokens: int, context_length: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.context_length = context_length
        super().__init__(
            f"The prompt has {prompt_tokens} tokens and {max_tokens} more were asked for, but the "
            f"context holds {context_length}: shorten the messages, lower max_tokens, or allow "
            "overflow='drop_oldest_turns'.",
            param="messages",
        )


class AdapterError(UsageError):
    """An adapter folder that cannot be served: which file, what is wrong, what to do."""


class ModelError(QlorachatError):
    """The base model could not be brought or loaded."""

    exit_code = 3


class HubError(ModelError):
    """The model hub: unreachable, gated, or without such a repository."""


class AddressError(QlorachatError):
    """The address to listen on is taken or not allowed."""

    exit_code = 4


class QueueFull(QlorachatError):
    """Too many requests are waiting; the caller may try again."""


class EngineError(QlorachatError):
    """A generation failed, or the engine is closed or dead."""


class OutOfMemory(EngineError):
    """A generation that the device has no memory for; the engine serves others on."""


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: its nearest match, else all that is known."""
    names = sorted(known)
    if close := difflib.get_close_matches(name, names, n=1):
        return f"; did you mean `{close[0]}`?"
    if not names:
        return "; none is known."
    return f"; known: {', '.join(names)}."
