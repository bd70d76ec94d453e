"""The report's charts as inline SVG, whose colours are CSS variables and whose text is the page's.

No chart draws a number that is not finite, and an empty history gives empty axes.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from qlorachat.training.history import History, Step

Numbers = NDArray[np.float64]

# stand-ins that matplotlib takes for colours -> the page's CSS variables
_TEXT, _RULE, _FIRST, _SECOND, _LIMIT = (f"#0000{n:02x}" for n in range(1, 6))
_VARIABLES = {
    _TEXT: "var(--muted)",
    _RULE: "var(--rule)",
    _FIRST: "var(--first)",
    _SECOND: "var(--second)",
    _LIMIT: "var(--limit)",
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # which matplotlib brings, to measure text by
    "font.size": 12,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _TEXT,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "xtick.major.size": 0,
    "xtick.major.pad": 8,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 44  # pixels around the axes
_FAINT = 0.35
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Size:
    """A chart's, in CSS pixels at which its text has the page's size."""

    width: int
    height: int


WIDE, NARROW, SMALL = Size(1080, 320), Size(360, 280), Size(360, 230)


def draw_loss(history: History, total_steps: int, size: Size) -> Markup:
    """Every step's loss, its running mean, and the evaluations, over all steps of the run."""

    def plot(axes: Axes) -> None:
        steps = [step.step for step in history.steps]
        losses = np.array([step.loss for step in history.steps])
        _line(axes, steps, losses, color=_FIRST, linewidth=0.9, alpha=_FAINT)
        _line(axes, steps, rolling(losses, np.mean), color=_FIRST, linewidth=2.2)
        axes.plot(
            [each.step for each in history.evaluations],
            [each.loss for each in history.evaluations],
            color=_SECOND,
            linewidth=1.2,
            marker="o",
            markersize=5,
            clip_on=False,
        )
        _step_axis(axes, total_steps)

    return _draw("loss", size, plot)


def draw_learning_rate(history: History, total_steps: int) -> Markup:
    """The learning rate of every step."""

    def plot(axes: Axes) -> None:
        rates = [step.learning_rate for step in history.steps]
        _line(axes, [step.step for step in history.steps], rates, color=_FIRST, linewidth=2)
        _step_axis(axes, total_steps)
        _from_zero(axes, rates)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: _scientific(rate)))

    return _draw("learning-rate", SMALL, plot)


def draw_rate(history: History, total_steps: int) -> Markup:
    """Tokens a second in every step and the running median, which pauses do not move."""

    def plot(axes: Axes) -> None:
        steps, rates = step_rates(history.steps)
        smooth = rolling(rates, np.median)
        _line(axes, steps, rates, color=_FIRST, linewidth=0.9, alpha=_FAINT)
        _line(axes, steps, smooth, color=_FIRST, linewidth=2)
        _step_axis(axes, total_steps)
        _from_zero(axes, [*smooth, *np.quantile(rates, [0.98])] if len(rates) else [])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: _thousands(rate)))

    return _draw("rate", SMALL, plot)


def draw_memory(history: History, limit: int | None, card: int | None) -> Markup:
    """The peak of every step over time, below what the process may take and what the card has."""

    def plot(axes: Axes) -> None:
        seconds = [step.seconds for step in history.steps]
        unit, name = _time_unit(max(seconds, default=0.0))
        times = [each / unit for each in seconds]
        peaks = [step.memory / _GIB for step in history.steps]
        axes.fill_between(times, peaks, color=_FIRST, alpha=0.12, linewidth=0)
        _line(axes, times, peaks, color=_FIRST, linewidth=2)
        bounds = [each / _GIB for each in (limit, card) if each is not None]
        for bound, dashes in ((limit, (2, 3)), (card, (7, 4))):
            if bound is not None:
                axes.axhline(bound / _GIB, color=_LIMIT, linewidth=1.4, linestyle=(0, dashes))
        axes.set_xlim(0, max(times, default=0.0) or 1.0)
        axes.set_xlabel(name, loc="right")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda time, _: f"{time:g}"))
        _from_zero(axes, [*peaks, *bounds])

    return _draw("memory", SMALL, plot)


def rolling(values: Numbers, reduce: Callable[[Numbers], Any]) -> Numbers:
    """`values` (n,) with each reduced over about a twentieth of them around it, fewer at the ends.

    The last is over the latest fortieth alone.
    """
    half = min(math.ceil(len(values) / 40), max(0, len(values) - 1) // 2)
    places = range(len(values))
    return np.array([reduce(values[max(0, place - half) : place + half + 1]) for place in places])


def step_rates(steps: Sequence[Step]) -> tuple[list[int], Numbers]:
    """Steps and their tokens a second of wall clock; a step that took no time is left out."""
    before = Step(0, 0.0, 0.0, 0.0, 0.0, 0, 0.0, 0)
    timed = [
        (later.step, (later.tokens - earlier.tokens) / (later.seconds - earlier.seconds))
        for earlier, later in pairwise((before, *steps))
        if later.seconds > earlier.seconds
    ]
    return [step for step, _ in timed], np.array([rate for _, rate in timed])


def _draw(name: str, size: Size, plot: Callable[[Axes], None]) -> Markup:
    """The same bytes for the same numbers; ids differ between charts of different names."""
    # how SVG is written is among matplotlib's global settings alone
    with style.context(["default", _STYLE, {"svg.hashsalt": f"{name}-{size.width}"}]):
        figure = Figure(figsize=(size.width / 72, size.height / 72))
        axes = figure.add_axes(
            (
                _LEFT / size.width,
                _BOTTOM / size.height,
                1 - (_LEFT + _RIGHT) / size.width,
                1 - (_TOP + _BOTTOM) / size.height,
            )
        )
        plot(axes)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, min_n_ticks=3))
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    return _inline(file.getvalue())


def _inline(text: str) -> Markup:
    """An SVG file as a part of a page: what is the page's own is taken out of it."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text)  # it would hold for the whole page
    text = re.sub(r' id="[\w.]+_[0-9]+"', "", text)  # the same in every chart; unused
    text = re.sub(r"(\.\d\d)\d+", r"\1", text)  # hundredths of a pixel
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return Markup(text)  # noqa: S704  # drawn from numbers alone


def _line(axes: Axes, x: Sequence[float], y: Sequence[float] | Numbers, **looks: Any) -> None:
    """A line; a single point, which has none, is a dot."""
    axes.plot(x, y, marker="o" if len(x) == 1 else "", **looks)


def _step_axis(axes: Axes, total_steps: int) -> None:
    axes.set_xlim(0, max(1, total_steps))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel("step", loc="right")


def _from_zero(axes: Axes, values: Sequence[float]) -> None:
    axes.set_ylim(0, 1.1 * max(values, default=0.0) or 1.0)


def _time_unit(seconds: float) -> tuple[float, str]:
    """Seconds in the unit that a run of so many is read in, and its name."""
    if seconds < 180:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 3 * 3600 else (3600.0, "hours")


def _scientific(value: float) -> str:
    """2e-4, 1.5e-4, 0."""
    if not value:
        return "0"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _thousands(value: float) -> str:
    """950, 1.5k, 12k."""
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
