"""The hooks of the entry-point group `qlorachat`: the whole plugin interface on one screen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pluggy

from qlorachat.config import EngineConfig
from qlorachat.protocols import Backend, Frontend, Template
from qlorachat.tokens import RequestRecord

hookspec = pluggy.HookspecMarker("qlorachat")
hookimpl = pluggy.HookimplMarker("qlorachat")


@hookspec
def register_frontends(register: Callable[[Frontend[Any]], None]) -> None:
    """Offer ways for people to reach an engine."""


@hookspec
def register_templates(register: Callable[[Template], None]) -> None:
    """Offer prompt formats, by name."""


@hookspec(firstresult=True)
def open_backend(config: EngineConfig) -> Backend | None:
    """Open the place where tokens are made; None passes to the next plugin."""


@hookspec(firstresult=True)
def locate_adapter(reference: str, offline: bool) -> Path | None:
    """Bring an adapter to a local folder; None passes to the next plugin."""


@hookspec
def request_finished(record: RequestRecord) -> None:
    """Observe a finished request; called off the decode loop."""
