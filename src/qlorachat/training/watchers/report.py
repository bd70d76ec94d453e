"""report.html: one page that shows a run and needs nothing else, no script, server or network."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qlorachat.durable import write_whole
from qlorachat.training.history import Chat, History
from qlorachat.training.memory.plan import MemoryPlan, Part
from qlorachat.training.watchers.charts import (
    NARROW,
    WIDE,
    draw_learning_rate,
    draw_loss,
    draw_memory,
    draw_rate,
    rolling,
)
from qlorachat.training.wording import duration, size

_UNKNOWN = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """All that a report shows; texts may come from anybody and are shown as text."""

    title: str  # the adapter's name
    base_model: str
    written: datetime
    finished: bool  # False for a report of a run that goes on or was interrupted
    total_steps: int
    settings: Mapping[str, object]
    data: Mapping[str, str]  # label -> value
    history: History
    plan: MemoryPlan
    card: str  # the device's name
    card_memory: int | None  # bytes of the whole card
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Headline:
    """The numbers at the top, as they are read."""

    steps: str
    epochs: str
    loss: str
    best: str
    best_step: int | None
    time: str
    rate: str
    tokens: str
    memory: str


@dataclass(frozen=True, slots=True)
class Charts:
    """The drawings of a history."""

    loss_wide: Markup
    loss_narrow: Markup
    learning_rate: Markup
    rate: Markup
    memory: Markup


@dataclass(frozen=True, slots=True)
class Bar:
    """A part's piece of all memory: where it begins and how wide it is, in percent, and bytes."""

    start: float
    width: float
    text: str


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A part of the plan with its two bars, and the predicted parts that it was measured for."""

    name: str
    predicted: Bar | None
    measured: Bar | None
    within: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Dialog:
    """A prompt, the base's answer, and the adapter's, the latest first, each with its step."""

    prompt: str
    base: str
    answers: list[tuple[int, str]]


def write_report(path: Path, summary: ReportData) -> None:
    """Write the page to `path`, whole or not at all. Raises OSError."""
    page = render_report(summary)
    write_whole(path, page.encode("utf-8", "replace").decode("utf-8"))  # half surrogates: "?"


def render_report(summary: ReportData) -> str:
    """The page as HTML; the same summary gives the same text."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("qlorachat.training.watchers").joinpath("report.html.jinja").read_text("utf-8")
    return environment.from_string(source).render(
        summary=summary,
        headline=_headline(summary.history),
        charts=_charts(summary) if summary.history.steps else None,
        plan=_plan_rows(summary.plan),
        dialogs=_dialogs(summary.history.chats),
        settings={name: _written(value) for name, value in summary.settings.items()},
        size=size,
    )


def _headline(history: History) -> Headline:
    steps, best = history.steps, history.best
    last = steps[-1] if steps else None
    loss = rolling(np.array([step.loss for step in steps]), np.mean)
    return Headline(
        steps=f"{last.step if last else 0:,}",
        epochs=f"{last.epoch if last else 0:.2f}",
        loss=f"{loss[-1]:.4f}" if last else _UNKNOWN,
        best=f"{best.loss:.4f}" if best else _UNKNOWN,
        best_step=best.step if best else None,
        time=duration(last.seconds) if last else _UNKNOWN,
        rate=f"{last.tokens / last.seconds:,.0f}" if last and last.seconds > 0 else _UNKNOWN,
        tokens=f"{last.tokens if last else 0:,}",
        memory=size(max(step.memory for step in steps)) if steps else _UNKNOWN,
    )


def _charts(summary: ReportData) -> Charts:
    history, total = summary.history, summary.total_steps
    return Charts(
        loss_wide=draw_loss(history, total, WIDE),
        loss_narrow=draw_loss(history, total, NARROW),
        learning_rate=draw_learning_rate(history, total),
        rate=draw_rate(history, total),
        memory=draw_memory(history, summary.plan.limit, summary.card_memory),
    )


def _plan_rows(plan: MemoryPlan) -> list[PlanRow]:
    predicted = [part.predicted for part in plan.parts]
    measured = [part.measured for part in plan.parts]
    whole = max(plan.predicted, plan.measured or 0)
    return [
        PlanRow(part.name, first, second, part.within)
        for part, first, second in zip(
            plan.parts,
            _bars(predicted, plan.predicted, whole),
            _bars(measured, plan.measured or 0, whole),
            strict=True,
        )
    ]


def _bars(counts: Iterable[int | None], total: int, whole: int) -> Iterator[Bar | None]:
    """Each begins where the one before it ends, but goes no further than the total.

    The total may be less than the sum, by parts that are never there at one time.
    """
    end = 0
    for count in counts:
        if count is None:
            yield None
            continue
        start = max(0, min(end, total - count))
        yield Bar(_percent(start, whole), _percent(count, whole), size(count))
        end = start + count


def _percent(count: int, whole: int) -> float:
    return 100 * count / whole if whole else 0.0


def _dialogs(chats: Iterable[Chat]) -> list[Dialog]:
    """One for each prompt, in the order of their first appearance."""
    dialogs: dict[str, Dialog] = {}
    for chat in chats:
        dialog = dialogs.setdefault(chat.prompt, Dialog(chat.prompt, chat.base, []))
        dialog.answers.insert(0, (chat.step, chat.answer))
    return list(dialogs.values())


def _written(value: object) -> str:
    """A setting as people write it in a file; a text is bare where nothing in it is invisible."""
    if value is None:
        return _UNKNOWN
    if isinstance(value, str) and value.strip() and value.isprintable():
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
