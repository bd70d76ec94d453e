"""The child process in which a checkpoint's chat template runs: JSON lines in, JSON lines out.

Started by its path, so it needs nothing of this package: only jinja2. It renders what it is asked
to, within its own limits of memory and output; its parent ends it when it takes too long.
"""

import faulthandler
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY_LIMIT = 512 * 2**20  # bytes of address space
OUTPUT_LIMIT = 4 * 2**20  # characters of one rendering
REASON_LIMIT = 300  # characters of a template's own error message
ORPHAN_LIMIT = 90  # seconds; a parent that lives ends a long rendering much earlier


class Refusal(TemplateError):
    """The template called `raise_exception`: it has no place for this dialog."""


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks answers; here it only renders them."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own declaration

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body, lineno=line)


class PlainNamespace(Namespace):
    """jinja2's namespace without names that Python gives a meaning."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name!r}")
        super().__setitem__(name, value)


def namespace(*args: Any, **kwargs: Any) -> PlainNamespace:
    """What a template calls to make variables that outlive a loop."""
    space = PlainNamespace()
    for name, value in dict(*args, **kwargs).items():
        space[name] = value
    return space


def new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """What a template calls as `dict`, without the methods of the class."""
    return dict(*args, **kwargs)


def raise_exception(message: str) -> NoReturn:
    """What a template calls to refuse a dialog."""
    raise Refusal(message)


def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """The `tojson` filter of chat templates: unlike jinja2's, it escapes no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@lru_cache(maxsize=1)
def compile_template(source: str) -> Template:
    """The template, with the names that transformers documents for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=raise_exception, namespace=namespace, dict=new_dict)
    return environment.from_string(source)


def render(source: str, variables: dict[str, Any]) -> str:
    """One rendering; OverflowError when it is longer than OUTPUT_LIMIT characters."""
    pieces: list[str] = []
    room = OUTPUT_LIMIT
    for piece in compile_template(source).generate(**variables):
        pieces.append(piece)
        room -= len(piece)
        if room < 0:
            raise OverflowError(f"the prompt is longer than {OUTPUT_LIMIT} characters")
    return "".join(pieces)


def answer(request: dict[str, Any]) -> Iterator[dict[str, str]]:
    """For each dialog its `text`, or why there is none: `refused` on purpose, or `failed`."""
    # one moment for all, so that a date is no difference between them
    shared = request["variables"] | {"strftime_now": datetime.now().strftime}
    for messages in request["dialogs"]:
        try:
            yield {"text": render(request["source"], shared | {"messages": messages})}
        except Refusal as refusal:
            yield {"refused": one_line(str(refusal))}
        except Exception as error:
            yield {"failed": one_line(f"{type(error).__name__} {error}")}


def one_line(text: str) -> str:
    """The beginning of the text with its whitespace as single spaces."""
    return " ".join(text[:REASON_LIMIT].split())


def limit_memory() -> None:
    """Cap this process's memory where the platform can; elsewhere the time limit has to do."""
    with suppress(ImportError, ValueError, OSError):
        import resource  # Unix only

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))


@contextmanager
def orphan_limit() -> Iterator[None]:
    """End this process when a rendering outlives a parent that was killed."""
    faulthandler.dump_traceback_later(ORPHAN_LIMIT, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def main() -> None:
    """Say that the process is ready, then answer each line until the input ends."""
    limit_memory()
    send({"ready": True})
    for line in sys.stdin.buffer:
        with orphan_limit():
            send(list(answer(json.loads(line))))


def send(value: Any) -> None:
    """One line of ASCII, so that lone surrogates pass."""
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
