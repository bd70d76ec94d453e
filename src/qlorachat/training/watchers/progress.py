"""A run in the terminal: one live line where there is one, plain lines elsewhere."""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from math import inf
from time import perf_counter
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlorachat.training.history import Chat, Evaluation, History, Step
from qlorachat.training.wording import duration, printable, size

_WINDOW = 20  # steps that the recent rate is of
_MEMORY_OF_LOSS = 0.9  # the weight of the past in the smoothed loss
_SILENCE = 10.0  # seconds between plain lines
_UNKNOWN = "…"


class Pace:
    """How fast a run goes: lately in its steps, and what the pauses between them cost over all."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = clock()
        self._steps: deque[tuple[int, float]] = deque(maxlen=_WINDOW)  # tokens, seconds
        self._tokens = 0
        self._paused = 0.0

    def step(self, tokens: int) -> None:
        """A step of so many tokens has ended. The first one warms up and does not count."""
        seconds = self._lap()
        if self._tokens:
            self._steps.append((tokens, seconds))
        self._tokens += tokens

    def pause(self) -> None:
        """Something else than a step has ended: an evaluation, chats, a checkpoint."""
        seconds = self._lap()
        if self._tokens:
            self._paused += seconds

    @property
    def rate(self) -> float | None:
        """Tokens a second in the latest steps; None before there are enough."""
        seconds = sum(seconds for _, seconds in self._steps)
        return sum(tokens for tokens, _ in self._steps) / seconds if seconds > 0 else None

    def left(self, tokens: int) -> float | None:
        """Seconds that so many tokens will take from now, pauses included as they were so far."""
        if self.rate is None:
            return None
        needed = tokens * (1 / self.rate + self._paused / self._tokens)
        return max(0.0, needed - (self._clock() - self._last))

    def _lap(self) -> float:
        before, self._last = self._last, self._clock()
        return self._last - before


class SmoothLoss:
    """A running mean of losses that forgets old ones."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, loss: float) -> None:
        """One step's loss."""
        self._sum = _MEMORY_OF_LOSS * self._sum + loss
        self._weight = _MEMORY_OF_LOSS * self._weight + 1

    @property
    def value(self) -> float | None:
        """The mean, None before the first."""
        return self._sum / self._weight if self._weight else None


class Progress:
    """Watches a run from the inside of `with`, and shows it."""

    def __init__(
        self,
        console: Console | None = None,
        *,
        total_steps: int,
        tokens: Sequence[int],
        done: int = 0,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """`tokens` has every step's, of which `done` came in earlier parts of the run.

        `console` is stderr by default, `clock` counts seconds.
        """
        assert len(tokens) == total_steps, "a step without its tokens"
        self._console = console or Console(stderr=True)
        self._trained = (0, *accumulate(tokens))  # tokens, after each step
        self._clock = clock
        self._pace = Pace(clock)
        self._loss = SmoothLoss()
        self._step = done
        self._memory = 0
        self._said = (done, -inf)  # the last plain line's step and time
        self._live = (
            Live(get_renderable=self._picture, console=self._console, refresh_per_second=4)
            if self._console.is_terminal and not self._console.is_dumb_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._said[0] != self._step:
            self._say()

    def update(self, step: Step) -> None:
        """A step has ended."""
        self._pace.step(self._trained[step.step] - self._trained[step.step - 1])
        self._loss.add(step.loss)
        self._step = step.step
        self._memory = max(self._memory, step.memory)
        due = self._clock() - self._said[1] >= _SILENCE or self._left == 0
        if self._live is None and due:
            self._say()

    def evaluated(self, evaluation: Evaluation) -> None:
        """The held-out rows have been judged."""
        self._pace.pause()
        self._print(Text(f"step {evaluation.step}: evaluation loss {evaluation.loss:.4f}", "bold"))

    def chats(self, chats: list[Chat]) -> None:
        """The sample chats have been held."""
        self._pace.pause()
        self._console.print(chat_table(chats))

    def saved(self, history: History) -> None:
        """A checkpoint has been written, which took time."""
        self._pace.pause()

    def note(self, text: str) -> None:
        """Something that people should know."""
        self._print(Text(printable(text), "yellow"))

    def _say(self) -> None:
        self._said = (self._step, self._clock())
        self._print(Text(f"step {self._steps}: {self._numbers}"))

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=self._live is None)

    def _picture(self) -> Group:
        """The bar, which goes by tokens since steps differ, above the numbers."""
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        total = self._trained[-1]
        bar.add_row(ProgressBar(total, self._trained[self._step]), Text(self._steps))
        return Group(bar, Text(self._numbers))

    @property
    def _steps(self) -> str:
        return f"{self._step}/{len(self._trained) - 1}"

    @property
    def _left(self) -> int:
        """Tokens still to train."""
        return self._trained[-1] - self._trained[self._step]

    @property
    def _numbers(self) -> str:
        loss, rate = self._loss.value, self._pace.rate
        left = self._pace.left(self._left)
        parts = (
            f"loss {_UNKNOWN if loss is None else f'{loss:.4f}'}",
            f"{_UNKNOWN if rate is None else f'{rate:,.0f}'} tokens/s",
            f"{_UNKNOWN if left is None else duration(left)} left",
            f"peak {size(self._memory) if self._memory else _UNKNOWN}",
        )
        return " · ".join(parts)


def chat_table(chats: Sequence[Chat]) -> Table:
    """The base's answers beside the adapter's, in full."""
    step = chats[0].step if chats else 0
    table = Table(
        title=f"Sample chats after step {step}" if step else "Sample chats before the first step",
        title_justify="left",
        expand=True,
        show_lines=True,
    )
    for name, ratio in (("prompt", 2), ("base", 3), ("adapter", 3)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for chat in chats:
        table.add_row(*(Text(printable(text)) for text in (chat.prompt, chat.base, chat.answer)))
    return table
