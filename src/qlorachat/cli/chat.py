"""`qlorachat chat`: a dialog by the frontend `cli`, or one question and its answer alone."""

import sys
from collections.abc import Sequence
from threading import Event

from pydantic import Field
from pydantic_settings import CliPositionalArg

from qlorachat.cli.settings import EngineSettings, parse, plugin_host, read_stdin
from qlorachat.errors import ConfigError
from qlorachat.plugins import PluginHost

FRONTEND = "cli"


class ChatSettings(EngineSettings):
    """Chat in the terminal; with a question, or input from a pipe, print the answer alone."""

    question: CliPositionalArg[str] = Field("", description="answer this and leave")


def chat(arguments: Sequence[str]) -> None:
    """Run the command."""
    host = plugin_host()
    frontends = host.frontends()
    served = [frontends[FRONTEND]] if FRONTEND in frontends else []
    settings = parse(
        ChatSettings, arguments, command="chat", frontends=served, known_tables=list(frontends)
    )
    if settings.question or not sys.stdin.isatty():
        _answer(settings, host)
    else:
        _converse(settings, host)


def _answer(settings: ChatSettings, host: PluginHost) -> None:
    """Print the answer to one question, and nothing else, on stdout."""
    question = settings.question or read_stdin().strip()
    if not question:
        raise ConfigError('There is no question: pass one (qlorachat chat "…") or pipe one in.')
    from qlorachat.chat import ChatEngine  # deferred: torch takes seconds, wrong options none

    with ChatEngine(settings.engine_config(), plugins=host) as engine:
        adapter = next(iter(engine.adapters), None)
        with engine.stream(question, adapter=adapter) as stream:
            for delta in stream:
                print(delta.text, end="", flush=True)
    print(flush=True)


def _converse(settings: ChatSettings, host: PluginHost) -> None:
    """Hand the terminal to the frontend, on this thread and with Ctrl-C left to it."""
    frontend = host.frontend(FRONTEND)
    options = getattr(settings, FRONTEND)
    frontend.prepare(options)
    from qlorachat.chat import ChatEngine  # deferred: torch takes seconds, wrong options none

    with ChatEngine(settings.engine_config(), plugins=host) as engine:
        frontend.serve(engine, options, Event())
