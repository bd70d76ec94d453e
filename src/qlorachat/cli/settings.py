"""Flags, environment, file and defaults of a command, in that order, from one declaration."""

import argparse
import logging
import os
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    CliSuppress,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from qlorachat.config import EngineConfig, explain
from qlorachat.errors import ConfigError, suggest
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


def _listed(value: object) -> object:
    """Flags and the environment give one string, with a comma between items; files give a list."""
    return value.split(",") if isinstance(value, str) else value


class EngineSettings(EngineConfig, CommandSettings):  # type: ignore[misc]  # their model_config
    """What every command that loads a model understands."""

    adapters: CliSuppress[dict[str, str]] = Field(default_factory=dict)
    adapter: Annotated[list[str], NoDecode, BeforeValidator(_listed)] = Field(
        default_factory=list,
        description="[NAME=]PATH of an adapter, a folder or a hub repository; may be repeated; "
        "the name defaults to the folder's",
    )

    def engine_config(self) -> EngineConfig:
        """The engine's part of the settings; `--adapter` adds to the file's [adapters]."""
        values = {name: getattr(self, name) for name in EngineConfig.model_fields}
        values["adapters"] = {**self.adapters, **dict(map(_named_adapter, self.adapter))}
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
    values = _file_values(arguments, skip=set(known_tables) - set(chosen))

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
        raise ConfigError(_explain_cli(str(error), model)) from None
    except ValidationError as error:
        raise ConfigError(explain(error, model)) from None


def plugin_host() -> PluginHost:
    """The installed plugins that QLORACHAT_LOAD_PLUGINS and _DISABLED_PLUGINS leave."""
    load = os.environ.get(f"{PREFIX}LOAD_PLUGINS")
    disabled = os.environ.get(f"{PREFIX}DISABLED_PLUGINS", "")
    return create_manager(load=None if load is None else _words(load), disabled=_words(disabled))


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[,\s]+", text) if word]


def _named_adapter(argument: str) -> tuple[str, str]:
    name, equals, path = argument.partition("=")
    return (name, path) if equals else (Path(argument).resolve().name, argument)


def _file_values(arguments: Sequence[str], skip: set[str]) -> dict[str, Any]:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
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


class _Parser(argparse.ArgumentParser):
    """Complains by raising, so that a mistake is one line like every other."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def _parser(command: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    return _Parser(
        prog=f"qlorachat {command}",
        usage=f"qlorachat {command} [options]",
        description=summary,
        epilog=epilog or None,
        formatter_class=_Help,
        allow_abbrev=False,
    )


def _explain_cli(message: str, model: type[BaseModel]) -> str:
    """argparse's complaint as one line, with the nearest flag."""
    if match := re.search(r"unrecognized arguments: (\S+)", message):
        word = match.group(1)
        flags = {f"--{name.replace('_', '-')}" for name in _flat_names(model)}
        return f"There is no option `{word}`{suggest(word.split('=')[0], flags)}"
    return message.removeprefix("error parsing CLI: ").rstrip(".") + "."


def _flat_names(model: type[BaseModel]) -> set[str]:
    """Every option's name; a table's options with and without its name."""
    names: set[str] = set()
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            inner = set(field.annotation.model_fields)
            names |= inner | {f"{name}_{option}" for option in inner}
        else:
            names.add(field.alias or name)
    return names


def _warn_of_unknown_variables(model: type[BaseModel], known_tables: Sequence[str]) -> None:
    known = {name.upper() for name in _flat_names(model)} | HOST_VARIABLES
    tables = tuple(f"{name.upper()}_" for name in known_tables)
    for variable in os.environ:
        name = variable.removeprefix(PREFIX)
        if name != variable and name not in known and not name.startswith(tables):
            near = suggest(variable, {PREFIX + other for other in known})
            print(f"qlorachat: {variable} means nothing here{near}", file=sys.stderr)
