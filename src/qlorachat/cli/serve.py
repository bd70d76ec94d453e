"""`qlorachat serve`: one engine, any number of frontends, ended by one signal."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from pydantic import Field

from qlorachat.cli.settings import (
    PREFIX,
    EngineSettings,
    Parser,
    file_values,
    parse,
    plugin_host,
)
from qlorachat.errors import ConfigError, EngineError, QlorachatError
from qlorachat.listed import Listed, listed
from qlorachat.protocols import Frontend

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # a wait without a limit would keep signals from being handled


class ServeSettings(EngineSettings):
    """Serve one engine through one or more frontends, until Ctrl-C."""

    frontend: Listed = Field(
        default_factory=list, description="which frontend to serve; may be repeated"
    )


def serve(arguments: Sequence[str]) -> None:
    """Run the command."""
    host = plugin_host()
    known = host.frontends()
    frontends = [host.frontend(name) for name in _frontend_names(arguments)]
    settings = parse(
        ServeSettings,
        arguments,
        command="serve",
        frontends=frontends,
        known_tables=list(known),
        epilog=_epilog(list(known.values()), frontends),
    )
    if not frontends:
        names = " | ".join(sorted(known)) or "NAME; none is installed yet (qlorachat-gradio, …)"
        raise ConfigError(f"Say which frontend to serve: --frontend {names}.")
    served = [(frontend, getattr(settings, frontend.name)) for frontend in frontends]
    for frontend, options in served:
        frontend.prepare(options)
    from qlorachat.chat import ChatEngine  # deferred: torch takes seconds, wrong options none

    with ChatEngine(settings.engine_config(), plugins=host) as engine:
        _run(engine, served, _stop_on_signals())  # until here Ctrl-C leaves at once


def _run(engine: Any, served: Sequence[tuple[Frontend[Any], Any]], stop: threading.Event) -> None:
    """Each frontend on a thread of its own; the first that fails or leaves ends the others."""
    failures: list[QlorachatError] = []

    def run(frontend: Frontend[Any], options: Any) -> None:
        try:
            frontend.serve(engine, options, stop)
        except QlorachatError as error:
            failures.append(error)
        except BaseException as error:
            log.exception("the frontend %s failed", frontend.name)
            failures.append(EngineError(f"A frontend failed: {error}"))
        finally:
            stop.set()

    threads = [
        threading.Thread(target=run, args=pair, name=f"qlorachat-{pair[0].name}", daemon=True)
        for pair in served
    ]
    for thread in threads:
        thread.start()
    while not stop.wait(POLL_SECONDS):
        pass
    for thread in threads:
        while thread.is_alive():
            thread.join(POLL_SECONDS)
    if failures:
        raise failures[0]


def _stop_on_signals() -> threading.Event:
    """Set by the first SIGINT or SIGTERM; the second ends the process at once."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            sys.stderr.flush()
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.set()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop


def _frontend_names(arguments: Sequence[str]) -> list[str]:
    """What --frontend, its variable or the file says: it decides which other options there are."""
    finder = Parser(add_help=False, allow_abbrev=False)
    finder.add_argument("--frontend", action="append")
    flags = finder.parse_known_args(list(arguments))[0].frontend
    unflagged = os.environ.get(f"{PREFIX}FRONTEND", file_values(arguments).get("frontend"))
    said = listed(",".join(flags) if flags else unflagged)
    names = [name for name in said if isinstance(name, str)] if isinstance(said, list) else []
    if len(set(names)) < len(names):
        raise ConfigError("Each --frontend may be named once.")
    return names


def _epilog(known: Sequence[Frontend[Any]], chosen: Sequence[Frontend[Any]]) -> str:
    if chosen:
        return ""
    names = "; ".join(f"{frontend.name}: {frontend.summary}" for frontend in known)
    return (
        f"Frontends installed: {names or 'none'}. "
        "`qlorachat serve --frontend NAME --help` shows the options of one."
    )
