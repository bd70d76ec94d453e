"""`qlorachat export`: an adapter and its base become one model for other programs."""

from collections.abc import Sequence

from pydantic import Field

from qlorachat.cli.settings import CommandSettings, parse, plugin_host
from qlorachat.config import QuantizationChoice
from qlorachat.errors import ConfigError


class ExportSettings(CommandSettings):
    """Merge an adapter into its base in 16 bit, and check that it still answers the same."""

    adapter: str | None = Field(None, description="the adapter, a folder or a hub repository")
    merged: str | None = Field(None, description="the merged model's folder, made by this command")
    gguf: str | None = Field(None, description="a file for llama.cpp, made beside it")
    data: str | None = Field(
        None,
        description="held-out rows to check with: .json, .jsonl, .csv, .parquet, or a hub data "
        "set; default: prompts of our own",
    )
    model: str | None = Field(None, description="base model; default: the adapter's own")
    revision: str | None = Field(None, description="branch, tag or commit of the hub repository")
    quantization: QuantizationChoice = Field(
        "auto",
        description="of the base under the adapter; auto: as the adapter's card says, else as the "
        "base's files ask, else nf4",
    )
    template: str | None = Field(None, description="prompt format; default: the adapter's own")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    offline: bool = Field(False, description="never ask the hub; use what is on disk")
    overwrite: bool = Field(False, description="replace what is at --merged and --gguf")
    check: bool = Field(True, description="ask the adapter and the merged model the same")


def export(arguments: Sequence[str]) -> None:
    """Run the command."""
    settings = parse(ExportSettings, arguments, command="export")
    if settings.adapter is None or settings.merged is None:
        raise ConfigError("Give the adapter and the new model's folder: --adapter A --merged DIR.")
    host = plugin_host()
    from qlorachat.training.export.export import (
        export_merged,  # torch takes seconds, wrong options none
    )

    print(
        export_merged(
            **settings.model_dump(exclude={"config"}),
            plugins=host,
        )
    )
