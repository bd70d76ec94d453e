"""The plugin host: broken plugins are named and never fatal, conflicts name both."""

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from pydantic import BaseModel

from qlorachat import ChatEngine, Frontend, hookimpl
from qlorachat.errors import PluginError, UnknownName
from qlorachat.plugins import PluginHost, create_manager


class Options(BaseModel):
    """No options."""


class Example:
    """A frontend that does nothing."""

    name = "example"
    summary = "an example"
    options = Options

    def prepare(self, options: Options) -> None: ...

    def serve(self, engine: ChatEngine, options: Options, stop: Event) -> None: ...


class Good:
    @hookimpl
    def register_frontends(self, register: Callable[[Frontend[Any]], None]) -> None:
        register(Example())


class Raises:
    @hookimpl
    def register_frontends(self, register: Callable[[Frontend[Any]], None]) -> None:
        raise RuntimeError("no luck")


class Nameless:
    @hookimpl
    def register_frontends(self, register: Callable[[object], None]) -> None:
        register("example")


class NamedLikeAnOption:
    @hookimpl
    def register_frontends(self, register: Callable[[Frontend[Any]], None]) -> None:
        frontend = Example()
        frontend.name = "model"
        register(frontend)


class Misspelt:
    @hookimpl
    def register_frontend(self, register: Callable[[Frontend[Any]], None]) -> None: ...


class WrongArguments:
    @hookimpl
    def register_frontends(self, registrar: object) -> None: ...


def errors(host: PluginHost) -> dict[str, str | None]:
    return {row.name: row.error for row in host.rows()}


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        (Raises(), "no luck"),
        (Nameless(), "no name: str"),
        (NamedLikeAnOption(), "`model`"),
        (Misspelt(), "register_frontend"),
        (WrongArguments(), "registrar"),
    ],
)
def test_a_broken_plugin_costs_the_others_nothing(plugin: object, said: str) -> None:
    host = create_manager(load=())
    host.register(plugin, "broken", "qlorachat-broken", "1.0")
    host.register(Good(), "good")
    assert set(host.frontends()) == {"example"}
    assert said in (errors(host)["broken"] or "")
    assert errors(host)["good"] is None
    with pytest.raises(PluginError, match="broken"):
        host.frontend("broken")


def test_two_plugins_offering_one_name_is_an_error_that_names_both() -> None:
    host = create_manager(load=())
    host.register(Good(), "first")
    host.register(Good(), "second")
    with pytest.raises(PluginError, match="first and second"):
        host.frontends()


def test_one_object_under_two_names_serves_under_the_first() -> None:
    host, plugin = create_manager(load=()), Good()
    host.register(plugin, "good")
    host.register(plugin, "again")
    assert set(host.frontends()) == {"example"}
    assert errors(host)["good"] is None
    assert "the plugin good" in (errors(host)["again"] or "")


def test_an_unknown_frontend_says_what_to_install() -> None:
    host = create_manager(load=())
    host.register(Good(), "good")
    with pytest.raises(UnknownName, match=r"did you mean `example`.*qlorachat-exmple"):
        host.frontend("exmple")


def test_entry_points_that_fail_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails_to_import.py").write_text("raise ImportError('a missing part')\n")
    (tmp_path / "exits_on_import.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "fails_to_begin.py").write_text("class Plugin:\n    __init__ = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    host = create_manager(load=())
    host.load(EntryPoint("fails", "fails_to_import", "qlorachat"))
    host.load(EntryPoint("gone", "no_such_module_at_all", "qlorachat"))
    host.load(EntryPoint("exits", "exits_on_import", "qlorachat"))
    host.load(EntryPoint("unbegun", "fails_to_begin:Plugin", "qlorachat"))
    assert "SystemExit: 3" in (errors(host)["exits"] or "")
    assert "TypeError" in (errors(host)["unbegun"] or "")
    assert "a missing part" in (errors(host)["fails"] or "")
    assert "no_such_module_at_all" in (errors(host)["gone"] or "")
    assert host.templates()


def test_a_plugin_that_hangs_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hangs_on_import.py").write_text("import time\ntime.sleep(3600)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("qlorachat.plugins.LOAD_SECONDS", 0.2)
    host = create_manager(load=())
    host.load(EntryPoint("hangs", "hangs_on_import", "qlorachat"))
    assert "longer" in (errors(host)["hangs"] or "")


def test_an_empty_load_list_loads_no_entry_point() -> None:
    assert [row.name for row in create_manager(load=()).rows()] == ["builtin"]
    assert "http" not in [row.name for row in create_manager(disabled=["http"]).rows()]


def test_importing_the_package_and_listing_plugins_imports_nothing_heavy() -> None:
    script = (
        "import sys, qlorachat.plugins\n"
        "qlorachat.plugins.create_manager().frontends()\n"
        "print(sorted({'torch', 'gradio', 'transformers', 'fastapi'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
