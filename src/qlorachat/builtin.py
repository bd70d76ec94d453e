"""Our own plugin, through the common door: prompt formats, a backend, an adapter finder."""

from collections.abc import Callable
from pathlib import Path

from qlorachat import adapters
from qlorachat.config import EngineConfig
from qlorachat.hookspecs import hookimpl
from qlorachat.protocols import Backend, Template
from qlorachat.templates import BUILTIN_TEMPLATES


@hookimpl
def register_templates(register: Callable[[Template], None]) -> None:
    for template in BUILTIN_TEMPLATES:
        register(template)


@hookimpl(trylast=True)
def open_backend(config: EngineConfig) -> Backend:
    # deferred: torch and transformers take seconds to import, and plugins may decide otherwise
    from qlorachat import backends

    return backends.open_backend(config)


@hookimpl(trylast=True)
def locate_adapter(reference: str, offline: bool) -> Path:
    return adapters.locate_adapter(reference, offline)
