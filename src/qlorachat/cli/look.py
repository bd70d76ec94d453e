"""Commands that look and change nothing: plugins, render, check."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from qlorachat.cli.settings import CommandSettings, parse, plugin_host, read_stdin
from qlorachat.config import DEMO_MODEL
from qlorachat.errors import AdapterError, ConfigError, DialogError
from qlorachat.messages import Message, parse_messages
from qlorachat.plugins import PluginRow


class PluginsSettings(CommandSettings):
    """List the installed plugins: what each offers, and what is wrong with a broken one."""

    as_json: bool = Field(False, alias="json", description="as JSON")


class RenderSettings(CommandSettings):
    """Read messages as JSON from stdin; print the prompt as JSON with its text and token ids."""

    model: str = Field(
        DEMO_MODEL, description="a folder or a hub repository; only its tokenizer is used"
    )
    revision: str | None = Field(None, description="branch, tag or commit of the hub repository")
    template: str | None = Field(None, description="prompt format; default: the checkpoint's own")
    tags: Literal["refuse", "allow"] = Field("refuse", description="control text in messages")
    offline: bool = Field(False, description="never ask the hub; use what is on disk")


class CheckSettings(CommandSettings):
    """Say all that would be refused or warned of when an adapter is loaded."""

    adapter: CliPositionalArg[str] = Field(description="a folder or a hub repository")
    model: str | None = Field(None, description="hold it against this base model's shapes")
    revision: str | None = Field(None, description="branch, tag or commit of the base model")
    offline: bool = Field(False, description="never ask the hub; use what is on disk")


def plugins(arguments: Sequence[str]) -> None:
    """Run `qlorachat plugins`."""
    settings = parse(PluginsSettings, arguments, command="plugins")
    rows = plugin_host().rows()
    if settings.as_json:
        print(json.dumps([asdict(row) for row in rows], ensure_ascii=False, indent=2))
        return
    for row in rows:
        print(_plugin_line(row))


def render(arguments: Sequence[str]) -> None:
    """Run `qlorachat render`."""
    settings = parse(RenderSettings, arguments, command="render")
    messages = _read_messages(read_stdin())
    # deferred: transformers takes seconds to import, wrong options and messages none
    from qlorachat.checkpoints import locate, read_tokenizer
    from qlorachat.templates import TemplateChoice, build_prompt

    checkpoint = locate(
        settings.model, revision=settings.revision, offline=settings.offline, weights=False
    )
    tokenizer = read_tokenizer(checkpoint.folder)
    choice = TemplateChoice(
        plugin_host().templates(),
        model_name=checkpoint.name,
        chat_template=checkpoint.chat_template,
        tokenizer=tokenizer,
    )
    prompt = build_prompt(choice.choose(settings.template), messages, tokenizer, tags=settings.tags)
    print(json.dumps({"text": prompt.text, "ids": list(prompt.ids)}, ensure_ascii=False))


def check(arguments: Sequence[str]) -> None:
    """Run `qlorachat check`; AdapterError when something would be refused."""
    settings = parse(CheckSettings, arguments, command="check")
    folder = plugin_host().locate_adapter(settings.adapter, offline=settings.offline)
    # deferred: torch takes seconds to import, wrong options none
    from qlorachat.adapters import inspect_adapter
    from qlorachat.checkpoints import linear_shapes, locate

    shapes, name = None, None
    if settings.model is not None:
        base = locate(
            settings.model, revision=settings.revision, offline=settings.offline, weights=False
        )
        shapes, name = linear_shapes(base), base.name
    inspection = inspect_adapter(folder, shapes=shapes, base_name=name)
    print(inspection)
    errors = [finding for finding in inspection.findings if finding.level == "error"]
    if errors:
        raise AdapterError(f"{folder} would be refused: {len(errors)} errors.")


def _plugin_line(row: PluginRow) -> str:
    origin = f"{row.distribution or 'no distribution'} {row.version}".strip()
    if row.error:
        return f"{row.name:<12} {origin:<28} BROKEN: {row.error}"
    offers = [f"frontend {name}" for name in row.frontends]
    offers += [f"template {name}" for name in row.templates]
    return f"{row.name:<12} {origin:<28} {', '.join(offers) or ', '.join(row.hooks)}"


def _read_messages(text: str) -> tuple[Message, ...]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DialogError(f"stdin is no JSON: {error}.") from None
    if isinstance(value, dict):
        value = value.get("messages")
    if not isinstance(value, list):
        raise ConfigError(
            'stdin holds a JSON list of messages: [{"role": "user", "content": "…"}].'
        )
    return parse_messages(value)
