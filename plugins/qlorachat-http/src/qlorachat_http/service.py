"""What all requests share: the engine, the names of its models, and whether it is ending."""

import asyncio
from contextlib import suppress
from pathlib import Path
from time import time
from typing import Any

from qlorachat import ChatEngine
from qlorachat_http.errors import no_model, unavailable
from qlorachat_http.plugin import HttpOptions

BASE = "__base__"  # the base model's id where the server has a default adapter
POLL_SECONDS = 0.05


class Service:
    """One engine behind one server; lives on the server's event loop."""

    def __init__(self, engine: ChatEngine, options: HttpOptions) -> None:
        self.engine = engine
        self.options = options
        self.models = ModelNames(engine, options.default_adapter)
        self.ending = asyncio.Event()  # set when answers under way must end
        self.draining = False  # set when no new request is taken
        self.active = 0  # requests that generate; written by Generations

    def check_available(self) -> None:
        """503 while the server is ending or when the engine is dead."""
        if self.draining:
            raise unavailable("The server is shutting down.", "draining")
        if not self.engine.alive:
            raise unavailable("The engine is dead: start the server again.", "engine_dead")

    async def drain(self, seconds: float) -> None:
        """Take no more requests, let those under way end, and end the rest after `seconds`."""
        self.draining = True
        await self._idle(seconds)
        self.ending.set()
        await self._idle(1.0)  # for the last events to be written

    async def _idle(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.active:  # noqa: ASYNC110  a count, no event
                    await asyncio.sleep(POLL_SECONDS)


class ModelNames:
    """Model ids: the base, each adapter, and `base:adapter`."""

    def __init__(self, engine: ChatEngine, default_adapter: str | None) -> None:
        self._engine = engine
        self._default = default_adapter
        self._created = int(time())
        self.base = _public_name(engine.info.name)

    def adapter(self, model: str) -> str | None:
        """The adapter that a model id selects, None for the base; 404 for an unknown id."""
        adapters = self._engine.adapters
        if model in adapters:
            return model
        if model == self.base:
            return self._default
        if model == BASE and self._default is not None:
            return None
        name = model.removeprefix(f"{self.base}:")
        if name == model or name not in adapters:
            raise no_model(model)
        return name

    def reserved(self, name: str) -> bool:
        """Whether the name is one of the base's."""
        return name in (self.base, BASE)

    def cards(self) -> dict[str, dict[str, Any]]:
        """Every model by id, as GET /v1/models shows it; no path of the server is in one."""
        ids = [self.base, *([BASE] if self._default is not None else [])]
        base = {name: self._card(name, None) for name in ids}
        return base | {name: self._card(name, self.base) for name in self._engine.adapters}

    def _card(self, name: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "qlorachat",
            "root": self.base if name == BASE else name,
            "parent": parent,
            "max_model_len": self._engine.info.context_length,
        }


def _public_name(name: str) -> str:
    """A hub repository's full name, a folder's last part: callers learn no path of the server."""
    path = Path(name)
    return path.resolve().name if path.exists() or path.is_absolute() else name
