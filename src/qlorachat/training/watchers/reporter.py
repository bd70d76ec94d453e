"""Keeps report.html up to date while a run goes on."""

import logging
from datetime import datetime
from importlib.metadata import version
from time import monotonic

import psutil
import torch

from qlorachat import __version__
from qlorachat.checkpoints import LoadedModel
from qlorachat.training.history import Chat, Evaluation, History, Step
from qlorachat.training.memory.plan import MemoryPlan
from qlorachat.training.preparation import Preparation
from qlorachat.training.run_folder import RunFolder
from qlorachat.training.watchers.report import ReportData, write_report

log = logging.getLogger(__name__)

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")

_PAUSE = 30.0  # seconds between two reports of a run that goes on: drawing one takes part of one


class Reporter:
    """Watches a run and writes its report with its checkpoints."""

    def __init__(
        self, folder: RunFolder, prepared: Preparation, loaded: LoadedModel, plan: MemoryPlan
    ) -> None:
        self._folder = folder
        self._prepared = prepared
        self._plan = plan
        self._card, self._card_memory = _device(loaded.device)
        self._next = 0.0  # when it is due again, by the clock of `monotonic`

    def update(self, step: Step) -> None:
        pass  # the history comes with `saved`

    def evaluated(self, evaluation: Evaluation) -> None:
        pass

    def chats(self, chats: list[Chat]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def saved(self, history: History) -> None:
        if monotonic() >= self._next:
            self.write(history, finished=False)
            self._next = monotonic() + _PAUSE

    def end(self, history: History, *, finished: bool) -> None:
        """The last report; one that cannot be written is a warning."""
        try:
            self.write(history, finished=finished)
        except OSError as error:
            log.warning("the report %s could not be written: %s", self._folder.report, error)

    def write(self, history: History, *, finished: bool) -> None:
        """The report of the run so far. Raises OSError."""
        prepared = self._prepared
        write_report(
            self._folder.report,
            ReportData(
                title=self._folder.output.resolve().name,
                base_model=prepared.checkpoint.name,
                written=datetime.now().astimezone(),
                finished=finished,
                total_steps=len(prepared.data.schedule.steps),
                settings=prepared.config.model_dump(),
                data=_counts(prepared),
                history=history,
                plan=self._plan,
                card=self._card,
                card_memory=self._card_memory,
                versions=versions(),
            ),
        )


def versions() -> dict[str, str]:
    """Of the libraries that training hangs on."""
    return {"qlorachat": __version__, **{name: version(name) for name in _LIBRARIES}}


def _counts(prepared: Preparation) -> dict[str, str]:
    samples, held_out = prepared.samples, prepared.held_out
    bad = len(prepared.rows.bad) + len(samples.bad) + len(held_out.bad)
    return {
        "data": prepared.rows.name,
        "rows": f"{len(prepared.rows.rows) + len(prepared.rows.bad):,}",
        "bad rows, left out": f"{bad:,}",
        "samples": f"{len(samples.samples):,}",
        "held out": f"{len(held_out.samples):,}",
        "tokens": f"{samples.tokens:,}",
        "trained tokens": f"{samples.trained_tokens:,}",
        "cut": f"{samples.truncated:,}",
    }


def _device(name: str) -> tuple[str, int | None]:
    """What people call the device, and its memory in bytes."""
    if name == "cpu":
        total: int = psutil.virtual_memory().total
        return "CPU", total
    card = torch.cuda.get_device_properties(name)
    return card.name, card.total_memory
