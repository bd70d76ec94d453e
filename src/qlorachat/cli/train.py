"""`qlorachat train`: a data set becomes an adapter."""

from collections.abc import Sequence

from pydantic import Field

from qlorachat.cli.settings import CommandSettings, parse, plugin_host
from qlorachat.config import check
from qlorachat.errors import QlorachatError
from qlorachat.training.config import TrainConfig


class TrainSettings(TrainConfig, CommandSettings):  # type: ignore[misc]  # their model_config
    """Train a LoRA adapter on a 4-bit base: plans memory, shows progress, survives a kill."""

    resume: bool = Field(False, description="go on with the run in --output")
    overwrite: bool = Field(False, description="replace what is in --output")
    dry_run: bool = Field(False, description="stop after the plan, before the first step")

    def train_config(self) -> TrainConfig:
        """The run's part of the settings, of what was said."""
        said = self.model_fields_set & TrainConfig.model_fields.keys()
        return check(TrainConfig, {name: getattr(self, name) for name in said})


class Interrupted(QlorachatError):
    """A run that Ctrl-C ended, saved; how to go on was said."""

    exit_code = 130


def train(arguments: Sequence[str]) -> None:
    """Run the command."""
    settings = parse(TrainSettings, arguments, command="train")
    config = settings.train_config()
    host = plugin_host()
    try:
        from qlorachat.training.run import train as run  # torch takes seconds, wrong options none
    except ModuleNotFoundError as error:
        raise QlorachatError(
            f"Training needs the package {error.name}: pip install 'qlorachat[train]'."
        ) from None
    result = run(
        config,
        resume=settings.resume,
        overwrite=settings.overwrite,
        dry_run=settings.dry_run,
        plugins=host,
    )
    if result is not None and not result.finished:
        raise Interrupted(f"interrupted and saved after step {result.steps}.")
