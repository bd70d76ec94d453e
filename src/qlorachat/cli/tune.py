"""`qlorachat tune`: the kernels of NF4 products measured on the card at hand."""

from collections.abc import Sequence

from pydantic import Field

from qlorachat.cli.settings import CommandSettings, parse
from qlorachat.config import DEMO_MODEL


class TuneSettings(CommandSettings):
    """Measure how a model's NF4 products run best on this card, and keep that."""

    model: str = Field(DEMO_MODEL, description="base model, a folder or a hub repository")
    revision: str | None = Field(None, description="branch, tag or commit of the hub repository")
    device: str = Field("cuda", description="cuda or cuda:N")
    offline: bool = Field(False, description="never ask the hub; use what is on disk")


def tune(arguments: Sequence[str]) -> None:
    """Run the command."""
    settings = parse(TuneSettings, arguments, command="tune")
    from qlorachat.checkpoints import linear_shapes, locate
    from qlorachat.checkpoints.load import resolve_device  # torch takes seconds, wrong options none
    from qlorachat.tuning import tune as measure

    device = resolve_device(settings.device)
    checkpoint = locate(
        settings.model, revision=settings.revision, offline=settings.offline, weights=False
    )
    lines = measure(linear_shapes(checkpoint), device)
    print(f"{checkpoint.name} on {device}")
    print(f"{'weight':<15}{'rows':>6}{'before':>12}{'after':>12}{'blocks':>8}")
    for each in lines:
        weight = f"{each.shape[0]} x {each.shape[1]}"
        times = f"{each.before:>9.1f} us{each.after:>9.1f} us"
        print(f"{weight:<15}{each.rows:>6}{times}{each.blocks or 'as is':>8}", flush=True)
