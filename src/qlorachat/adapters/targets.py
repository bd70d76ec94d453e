"""Which modules a config means, as PEFT 0.21 reads it; its regular expressions run on a clock.

The rules are those of `check_target_module_exists` and `get_pattern_key` in PEFT. A pattern out of
a downloaded file can be made to run for hours, and `re` has no time limit, so `regex` matches here
and PEFT is later given plain names only.
"""

import re
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import regex  # type: ignore[import-untyped]

from qlorachat.adapters.config import AdapterConfig
from qlorachat.adapters.folder import plain
from qlorachat.errors import AdapterError

N = TypeVar("N", int, float)

_SECONDS = 5.0  # for all matching of one config; sane patterns take milliseconds
_MAX_PATTERN = 4096  # characters
_PLAIN_NAME = re.compile(r"[\w.]+")


class TargetRules:
    """The config's answers about module names; AdapterError for a pattern that is wrong or slow."""

    def __init__(self, config: AdapterConfig, path: Path) -> None:
        self._config = config
        self._path = path  # of the config's file, for messages
        self._seconds_left = _SECONDS

    def rank_of(self, module: str) -> int:
        """The rank that the config gives to `module`."""
        return self._by_pattern(self._config.rank_pattern or {}, module, self._config.r)

    def alpha_of(self, module: str) -> float:
        """The alpha that the config gives to `module`."""
        return self._by_pattern(self._config.alpha_pattern or {}, module, self._config.lora_alpha)

    def is_target(self, module: str) -> bool:
        """Whether the config puts a LoRA on the linear `module`."""
        if self._is_excluded(module):
            return False
        targets = self._config.target_modules
        if targets is None:
            return True
        if targets == "all-linear":  # every layer's; the output layer is in no list of layers
            return self._layer_index(module, []) is not None
        if isinstance(targets, str):
            return self._fullmatch(targets, module) is not None
        if module in targets:
            return True
        return any(_is_tail(name, module) for name in targets) and self._is_in_layers(module)

    def _is_excluded(self, module: str) -> bool:
        saved = self._config.modules_to_save or []
        if any(f".{name}." in f".{module}." for name in saved):
            return True
        excluded = self._config.exclude_modules or []
        if isinstance(excluded, str):
            return self._fullmatch(excluded, module) is not None
        return any(_is_tail(name, module) for name in excluded)

    def _is_in_layers(self, module: str) -> bool:
        wanted = self._config.layers_to_transform
        if wanted is None or wanted == []:
            return True
        patterns = self._config.layers_pattern or []
        index = self._layer_index(module, [patterns] if isinstance(patterns, str) else patterns)
        return index in (wanted if isinstance(wanted, list) else [wanted])

    def _layer_index(self, module: str, patterns: list[str]) -> int | None:
        """The first number in the name; of one of the module lists `patterns`, if there are any."""
        for pattern in patterns or [r"[^.]+\.[^.]*"]:
            if found := self._fullmatch(rf"(?:.*?\.)??(?:{pattern})\.(?P<index>\d+)\..*", module):
                return int(found["index"])
        return None

    def _by_pattern(self, patterns: Mapping[str, N], module: str, default: N) -> N:
        """The value of the first pattern that covers the end of the module's name."""
        covering = (value for key, value in patterns.items() if self._covers(key, module))
        return next(covering, default)

    def _covers(self, pattern: str, module: str) -> bool:
        if _PLAIN_NAME.fullmatch(pattern):
            return _is_tail(pattern, module)
        return self._fullmatch(rf"(.*\.)?({pattern})", module) is not None

    def _fullmatch(self, pattern: str, name: str) -> Any:
        started = time.monotonic()
        try:
            return _compiled(pattern).fullmatch(name, timeout=max(self._seconds_left, 0.001))
        except TimeoutError:
            reason = "takes too long to match"
        except (regex.error, RecursionError, ValueError) as error:
            reason = f"is not a regular expression ({plain(str(error))})"
        finally:
            self._seconds_left -= time.monotonic() - started
        raise AdapterError(
            f"{self._path}: the pattern {plain(repr(pattern))} {reason}; "
            "name the modules in target_modules instead."
        )


def is_saved_by(entry: str, module: str) -> bool:
    """Whether an entry of modules_to_save covers `module`: its name or a parent's ends in it."""
    parts = module.split(".")
    return any(".".join(parts[:end]).endswith(entry) for end in range(1, len(parts) + 1))


def _is_tail(tail: str, module: str) -> bool:
    return module == tail or module.endswith(f".{tail}")


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
    if len(pattern) > _MAX_PATTERN:
        raise ValueError(f"{len(pattern)} characters, expected {_MAX_PATTERN} at most")
    return regex.compile(pattern)
