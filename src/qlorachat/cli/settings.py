"""Flags, environment, file and defaults of a command, in that order, from one declaration."""

import argparse
import io
import logging
import os
import re
import sys
import tomllib
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    CliSuppress,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from qlorachat.config import EngineConfig, explain
from qlorachat.errors import ConfigError, DialogError, suggest
from qlorachat.listed import Listed
from qlorachat.plugins import PluginHost, create_manager
from qlorachat.protocols import Frontend

log = logging.getLogger(__name__)

PREFIX = "QLORACHAT_"
HOST_VARIABLES = {"CACHE", "CONFIG", "DISABLED_PLUGINS", "LOAD_PLUGINS"}


class CommandSettings(BaseSettings):
    """What every command understands."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="_",
        env_nested_max_split=1,
        extra="forbid",
        frozen=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        cli_kebab_case=True,
    )

    config: str | None = Field(None, description="a TOML file with options, under their names here")


S = TypeVar("S", bound=CommandSettings)


class EngineSettings(EngineConfig, CommandSettings):  # type: ignore[misc]  # their model_config
    """What every command that loads a model understands."""

    adapters: CliSuppress[dict[str, str]] = Field(default_factory=dict)
    adapter: Listed = Field(
        default_factory=list,
        description="[NAME=]PATH of an adapter, a folder or a hub repository; may be repeated; "
        "the name defaults to the folder's",
    )

    def engine_config(self) -> EngineConfig:
        """The engine's part of the settings; `--adapter` adds to the file's [adapters]."""
        values = {name: getattr(self, name) for name in EngineConfig.model_fields}
        values["adapters"] = {**self.adapters, **_named_adapters(self.adapter)}
        return EngineConfig(**values)


def parse(
    settings: type[S],
    arguments: Sequence[str],
    *,
    command: str,
    frontends: Sequence[Frontend[Any]] = (),
    known_tables: Sequence[str] = (),
    epilog: str = "",
) -> S:
    """The settings of one command line; prints help and leaves for --help.

    Each frontend's options are a table of its name: in the file `[http] port`, in the environment
    QLORACHAT_HTTP_PORT, as flags --http-port and, with one frontend, --port. Tables of
    `known_tables` (frontends that are not served now) may stand in the file.
    """
    chosen = {frontend.name: frontend for frontend in frontends}
    values = file_values(arguments, skip=set(known_tables) - set(chosen))

    class Layered(settings):  # type: ignore[misc, valid-type]
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return env_settings, InitSettingsSource(settings_cls, init_kwargs=values)

    tables: dict[str, Any] = {
        name: (
            frontend.options,
            Field(default_factory=frontend.options, description=frontend.summary),
        )
        for name, frontend in chosen.items()
    }
    model = cast(type[S], create_model(command, __base__=Layered, **tables))
    _warn_of_unknown_variables(model, known_tables)
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(
            model,
            cli_parse_args=list(arguments),
            cli_prog_name=f"qlorachat {command}",
            cli_shortcuts=_shortcuts(chosen),
            root_parser=_parser(command, settings.__doc__ or "", epilog),
        )
        return model(_cli_settings_source=source)
    except SettingsError as error:
        raise ConfigError(f"{error}.") from None
    except ValidationError as error:
        raise ConfigError(explain(error, model)) from None


def read_stdin() -> str:
    """All of stdin, in UTF-8 or else in the console's encoding; DialogError for neither."""
    data = sys.stdin.buffer.read()
    for encoding in ("utf-8", sys.stdin.encoding):
        with suppress(UnicodeDecodeError):
            return io.TextIOWrapper(io.BytesIO(data), encoding).read()
    raise DialogError("stdin is no text in UTF-8: convert it first.")


def plugin_host() -> PluginHost:
    """The installed plugins that QLORACHAT_LOAD_PLUGINS and _DISABLED_PLUGINS leave."""
    load = os.environ.get(f"{PREFIX}LOAD_PLUGINS")
    disabled = os.environ.get(f"{PREFIX}DISABLED_PLUGINS", "")
    return create_manager(load=None if load is None else _words(load), disabled=_words(disabled))


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[,\s]+", text) if word]


def _named_adapters(arguments: Sequence[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or "/" in name or "\\" in name:  # `=` may stand in a path as well
            name, path = Path(argument).resolve().name, argument
        if not path:
            raise ConfigError(f"The adapter `{argument}` has no path: --adapter {name}=PATH.")
        if name in named:
            raise ConfigError(
                f"Two adapters are called `{name}`, {named[name]} and {path}: give one another "
                "name, as in --adapter NAME=PATH."
            )
        named[name] = path
    return named


def file_values(arguments: Sequence[str], skip: Collection[str] = ()) -> dict[str, Any]:
    """What the file of --config or QLORACHAT_CONFIG says, without the tables in `skip`."""
    finder = Parser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=os.environ.get(f"{PREFIX}CONFIG"))
    path = finder.parse_known_args(list(arguments))[0].config
    if path is None:
        return {}
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The config file {path} can't be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The config file {path} is no TOML: {error}.") from None
    named = {name.replace("-", "_"): value for name, value in values.items()}
    return {name: value for name, value in named.items() if name not in skip}


def _shortcuts(frontends: dict[str, Frontend[Any]]) -> dict[str, str | list[str]]:
    shortcuts: dict[str, str | list[str]] = {}
    for name, frontend in frontends.items():
        for option in frontend.options.model_fields:
            flag = option.replace("_", "-")
            long = f"{name}-{flag}"
            shortcuts[f"{name}.{flag}"] = [flag, long] if len(frontends) == 1 else long
    return shortcuts


class _Help(argparse.HelpFormatter):
    """Plain words: no dotted names, no Python types, no default that is none."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = [flag for flag in action.option_strings if "." not in flag]
        names = ", ".join(shown or action.option_strings)
        if action.nargs == 0 or not action.option_strings:
            return super()._format_action_invocation(action) if not shown else names
        return f"{names} {self._value(action)}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return re.sub(r" \(default(: None|:\s*|: \[\]| factory: \w+)\)", "", action.help or "")

    def _value(self, action: argparse.Action) -> str:
        metavar = str(action.metavar or "")
        return metavar if metavar.startswith("{") else "VALUE"


class Parser(argparse.ArgumentParser):
    """Complains by raising, so that a mistake is one line like every other."""

    def error(self, message: str) -> NoReturn:
        if match := re.search(r"unrecognized arguments: (\S+)", message):
            word = match.group(1)
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = suggest(word.split("=")[0], (flag for flag in flags if "." not in flag))
            raise ConfigError(f"There is no option `{word}`{near}")
        raise ConfigError(message.rstrip(".") + ".")


def _parser(command: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    return Parser(
        prog=f"qlorachat {command}",
        usage=f"qlorachat {command} [options]",
        description=summary,
        epilog=epilog or None,
        formatter_class=_Help,
        allow_abbrev=False,
    )


def _variables(model: type[BaseModel]) -> set[str]:
    """Every option as a variable without PREFIX; a table's options with its name."""
    names = set(HOST_VARIABLES)
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names |= {f"{name}_{option}".upper() for option in field.annotation.model_fields}
        else:
            names.add((field.alias or name).upper())
    return names


def _warn_of_unknown_variables(model: type[BaseModel], known_tables: Sequence[str]) -> None:
    known = _variables(model)
    tables = tuple(f"{name.upper()}_" for name in known_tables)
    for variable in os.environ:
        name = variable.removeprefix(PREFIX)
        if name != variable and name not in known and not name.startswith(tables):
            tabled = {other for other in known if other.endswith(f"_{name}")}
            near = suggest(variable, {PREFIX + other for other in tabled or known})
            print(f"qlorachat: {variable} means nothing here{near}", file=sys.stderr)
