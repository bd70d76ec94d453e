"""The plugin host: loads entry points one by one, names the broken, wraps each hook in a type."""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pluggy

from qlorachat import builtin, hookspecs
from qlorachat.config import EngineConfig
from qlorachat.errors import PluginError, QlorachatError, UnknownName
from qlorachat.protocols import Backend, Frontend, Template
from qlorachat.tokens import RequestRecord

GROUP = "qlorachat"
LOAD_SECONDS = 10.0  # a plugin whose import takes longer counts as broken
# Options of the commands: a frontend's own are a table of its name beside these
OPTIONS = {*EngineConfig.model_fields, "adapter", "config", "frontend", "question"}

log = logging.getLogger(__name__)


class _Named(Protocol):
    name: str


N = TypeVar("N", bound=_Named)


@dataclass(frozen=True, slots=True)
class PluginRow:
    """One line of `qlorachat plugins`."""

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...]
    frontends: tuple[str, ...]
    templates: tuple[str, ...]
    error: str | None


@dataclass(slots=True)
class _Source:
    """Where a plugin came from, and what went wrong with it."""

    name: str
    distribution: str = ""
    version: str = ""
    error: str | None = None


class PluginHost:
    """Registered plugins behind one typed method for each hook."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._sources: dict[str, _Source] = {}

    def register(
        self, plugin: object, name: str, distribution: str = "", version: str = ""
    ) -> None:
        """Add a plugin; one that does not fit the hooks is kept as a broken row instead."""
        source = self._sources[name] = _Source(name, distribution, version)
        if other := self._manager.get_name(plugin):
            _mark(source, PluginError(f"it is the same object as the plugin {other}"))
            return
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except Exception as error:  # whatever a stranger's plugin raises
            self._reject(plugin, source, error)

    def load(self, entry: EntryPoint) -> None:
        """Import an entry point and register what it names."""
        distribution = entry.dist.name if entry.dist else ""
        version = entry.dist.version if entry.dist else ""
        try:
            plugin = _within(LOAD_SECONDS, lambda: _loaded(entry))
        except (Exception, SystemExit) as error:  # whatever a stranger's import raises
            source = self._sources[entry.name] = _Source(entry.name, distribution, version)
            _mark(source, error)
            return
        self.register(plugin, entry.name, distribution, version)

    def frontends(self) -> dict[str, Frontend[Any]]:
        """Every frontend by name; PluginError when two plugins offer one name."""
        return self._collect("frontend", "register_frontends")

    def frontend(self, name: str) -> Frontend[Any]:
        """The frontend of that name, or an error that says how to get it."""
        return self._named("frontend", name, self.frontends())

    def templates(self) -> dict[str, Template]:
        """Every prompt format by name; PluginError when two plugins offer one name."""
        return self._collect("template", "register_templates")

    def open_backend(self, config: EngineConfig) -> Backend:
        """The first backend that a plugin opens for this config."""
        backend: Backend | None = self._manager.hook.open_backend(config=config)
        if backend is None:
            raise PluginError("No plugin opens a backend for this configuration.")
        return backend

    def locate_adapter(self, reference: str, *, offline: bool) -> Path:
        """The local folder of an adapter."""
        path: Path | None = self._manager.hook.locate_adapter(reference=reference, offline=offline)
        if path is None:
            raise PluginError(f"No plugin finds the adapter `{reference}`.")
        return path

    def request_finished(self, record: RequestRecord) -> None:
        """Tell every observer; one that raises is logged and costs the others nothing."""
        for name, plugin in self._manager.list_name_plugin():
            try:
                self._alone(plugin, "request_finished")(record=record)
            except Exception:
                log.exception("plugin %s failed in request_finished", name)

    def rows(self) -> list[PluginRow]:
        """Every plugin, broken ones with their error."""
        return [self._row(source) for source in self._sources.values()]

    def _row(self, source: _Source) -> PluginRow:
        plugin = self._manager.get_plugin(source.name)
        callers = (self._manager.get_hookcallers(plugin) or []) if plugin else []
        offered = {
            hook: tuple(item.name for item in self._offers(source.name, plugin, hook))
            for hook in ("register_frontends", "register_templates")
            if plugin
        }
        return PluginRow(
            name=source.name,
            distribution=source.distribution,
            version=source.version,
            hooks=tuple(sorted(caller.name for caller in callers)),
            frontends=offered.get("register_frontends", ()),
            templates=offered.get("register_templates", ()),
            error=source.error,
        )

    def _collect(self, kind: str, hook: str) -> dict[str, Any]:
        found: dict[str, tuple[Any, str]] = {}
        for plugin_name, plugin in self._manager.list_name_plugin():
            for item in self._offers(plugin_name, plugin, hook):
                if item.name in found:
                    raise PluginError(
                        f"The {kind} `{item.name}` is offered by two plugins, "
                        f"{found[item.name][1]} and {plugin_name}: disable one of them with "
                        "QLORACHAT_DISABLED_PLUGINS."
                    )
                found[item.name] = (item, plugin_name)
        return {name: item for name, (item, _) in found.items()}

    def _offers(self, plugin_name: str, plugin: object, hook: str) -> list[Any]:
        """What one plugin registers through one hook; a plugin that raises becomes a broken row."""
        items: list[Any] = []
        try:
            self._alone(plugin, hook)(register=items.append)
            for item in items:
                _check_name(item, hook)
        except Exception as error:  # whatever a stranger's hook raises
            self._reject(plugin, self._sources[plugin_name], error)
            return []
        return items

    def _alone(self, plugin: object, hook: str) -> pluggy.HookCaller:
        """The hook as one plugin implements it: an exception must not cost the others theirs."""
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        return self._manager.subset_hook_caller(hook, others)

    def _named(self, kind: str, name: str, known: dict[str, N]) -> N:
        if name in known:
            return known[name]
        for source in self._sources.values():
            if source.error and name in (
                source.name,
                source.distribution.removeprefix("qlorachat-"),
            ):
                raise PluginError(
                    f"The {kind} `{name}` can't be used: its plugin {source.name} is broken "
                    f"({source.error})."
                )
        hint = f" To install it: pip install qlorachat-{name}" if kind == "frontend" else ""
        raise UnknownName(kind, name, known, hint)

    def _reject(self, plugin: object, source: _Source, error: Exception) -> None:
        if self._manager.is_registered(plugin):
            self._manager.unregister(plugin)
        _mark(source, error)


def create_manager(
    *, load: Sequence[str] | None = None, disabled: Iterable[str] = ()
) -> PluginHost:
    """A host with our own plugin and the installed ones.

    `load` lists the entry points to load (None: all; empty: none), `disabled` those to leave out.
    """
    host = PluginHost()
    host.register(builtin, "builtin", "qlorachat")
    blocked = set(disabled)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        if entry.name not in blocked and (load is None or entry.name in load):
            host.load(entry)
    return host


def _loaded(entry: EntryPoint) -> object:
    plugin = entry.load()
    return plugin() if isinstance(plugin, type) else plugin


def _check_name(item: object, hook: str) -> None:
    name = getattr(item, "name", None)
    if not isinstance(name, str):
        raise PluginError(f"what it registers has no name: {type(item).__name__}")
    if hook == "register_frontends" and name in OPTIONS:
        raise PluginError(f"its frontend can't be called `{name}`: an option is")


def _mark(source: _Source, error: BaseException) -> None:
    source.error = _describe(error)
    log.warning("plugin %s is broken: %s", source.name, source.error)


def _describe(error: BaseException) -> str:
    """An exception as one line of at most 200 characters."""
    if isinstance(error, QlorachatError):
        return str(error)
    message = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {message}"[:200]


def _within(seconds: float, call: Callable[[], object]) -> object:
    """The result of `call`, or TimeoutError: a plugin that hangs must not hang the host."""
    outcome: list[object] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:  # SystemExit as well: it would end this thread unheard
            failure.append(error)

    thread = threading.Thread(target=run, name="qlorachat-plugin-import", daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not outcome:
        raise TimeoutError(f"its import took longer than {seconds:.0f} s")
    return outcome[0]
