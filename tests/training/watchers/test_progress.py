"""What a run says in the terminal; time is the test's own."""

import io
from contextlib import suppress

import pytest
from rich.console import Console

from qlorachat.training.history import Chat, Evaluation, History, Step
from qlorachat.training.watchers.progress import Pace, Progress, SmoothLoss


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def step(number: int, *, loss: float = 2.0, memory: int = 2**30) -> Step:
    return Step(number, 0.0, loss, 1e-4, 1.0, 0, 0.0, memory)


def lines(file: io.StringIO) -> list[str]:
    return file.getvalue().splitlines()


def plain(clock: Clock, tokens: list[int]) -> tuple[Progress, io.StringIO]:
    file = io.StringIO()
    return Progress(Console(file=file), total_steps=len(tokens), tokens=tokens, clock=clock), file


def train(progress: Progress, clock: Clock, seconds: float, *numbers: int) -> None:
    for number in numbers:
        clock.wait(seconds)
        progress.update(step(number))


def test_pace_knows_nothing_before_the_second_step(clock: Clock) -> None:
    pace = Pace(clock)
    assert pace.rate is None
    clock.wait(60)  # a first step warms up
    pace.step(100)
    assert pace.rate is None
    assert pace.left(100) is None


def test_pace_is_of_tokens_in_the_latest_steps(clock: Clock) -> None:
    pace = Pace(clock)
    pace.step(1)
    for tokens, seconds in [(1000, 1)] * 5 + [(300, 2), (100, 2)] * 10:
        clock.wait(seconds)
        pace.step(tokens)
    assert pace.rate == pytest.approx(100)
    assert pace.left(500) == pytest.approx(5)


def test_pauses_lengthen_the_time_left_but_not_the_steps(clock: Clock) -> None:
    pace = Pace(clock)
    clock.wait(500)
    pace.pause()  # before the first step: will not come again
    for _ in range(4):
        clock.wait(1)
        pace.step(100)
    clock.wait(2)
    pace.pause()
    assert pace.rate == pytest.approx(100)
    assert pace.left(200) == pytest.approx(2 + 2 * 200 / 400)


def test_time_left_runs_down_while_a_step_lasts(clock: Clock) -> None:
    pace = Pace(clock)
    for _ in range(2):
        clock.wait(10)
        pace.step(100)
    assert pace.left(300) == pytest.approx(30)
    clock.wait(8)
    assert pace.left(300) == pytest.approx(22)
    clock.wait(100)
    assert pace.left(300) == 0


def test_a_clock_that_stands_still_gives_no_rate(clock: Clock) -> None:
    pace = Pace(clock)
    pace.step(100)
    pace.step(100)
    assert pace.left(100) is None


def test_smooth_loss_begins_at_the_first_and_follows() -> None:
    smooth = SmoothLoss()
    assert smooth.value is None
    smooth.add(3.0)
    assert smooth.value == 3.0
    for _ in range(100):
        smooth.add(1.0)
    assert smooth.value == pytest.approx(1.0, abs=1e-3)


def test_time_left_goes_by_tokens_not_by_steps(clock: Clock) -> None:
    progress, file = plain(clock, [100, 100, 100, 6000, 6000])
    with progress:
        train(progress, clock, 10, 1, 2, 3)
    assert lines(file)[-1] == "step 3/5: loss 2.0000 · 10 tokens/s · 20 min left · peak 1.00 GiB"


def test_plain_lines_are_rare_and_the_last_is_said(clock: Clock) -> None:
    progress, file = plain(clock, [100] * 30)
    with progress:
        train(progress, clock, 1, *range(1, 31))
    said = [line.split(":")[0] for line in lines(file)]
    assert said == ["step 1/30", "step 11/30", "step 21/30", "step 30/30"]
    assert "… tokens/s · … left" in lines(file)[0]
    assert "\x1b" not in file.getvalue()


def test_an_interrupted_run_says_where_it_stands(clock: Clock) -> None:
    progress, file = plain(clock, [100] * 30)
    with progress, suppress(KeyboardInterrupt):
        train(progress, clock, 1, 1, 2, 3)
        raise KeyboardInterrupt
    assert lines(file)[-1].startswith("step 3/30")


def test_a_resumed_run_begins_where_it_stopped(clock: Clock) -> None:
    progress, file = plain(clock, [100, 100, 500, 700, 1000])
    with progress:
        train(progress, clock, 5, 3, 4)
    assert lines(file)[-1].startswith("step 4/5: loss 2.0000 · 140 tokens/s · 7 s left")


def test_a_long_line_is_one_line(clock: Clock) -> None:
    file = io.StringIO()
    console = Console(file=file, width=40)
    with Progress(console, total_steps=1, tokens=[100], clock=clock) as progress:
        train(progress, clock, 1, 1)
        progress.note("[bold]a note[/bold] that is longer than forty columns\x1b[31m")
    assert len(lines(file)) == 2
    assert "[bold]a note[/bold]" in lines(file)[1]
    assert "\x1b" not in lines(file)[1]


def test_peak_memory_is_of_all_steps(clock: Clock) -> None:
    progress, file = plain(clock, [100, 100])
    with progress:
        progress.update(step(1, memory=3 * 2**30))
        progress.update(step(2, memory=2**30))
    assert "peak 3.00 GiB" in lines(file)[-1]


def test_chats_are_shown_in_full_and_harmless(clock: Clock) -> None:
    answer = "ずんだもんなのだ。" * 40
    progress, file = plain(clock, [100])
    with progress:
        progress.chats([Chat(0, "[red]誰?", "\x1b[31mAI", answer)])
        progress.saved(History())
    shown = file.getvalue()
    assert "before the first step" in shown
    assert "[red]誰?" in shown
    assert "\x1b" not in shown
    assert shown.count("ず") == 40


def test_evaluations_are_lines(clock: Clock) -> None:
    progress, file = plain(clock, [100])
    with progress:
        progress.evaluated(Evaluation(50, 1.23456))
    assert lines(file) == ["step 50: evaluation loss 1.2346"]


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": "xterm"})


def test_a_terminal_has_one_live_picture(clock: Clock, terminal: Console) -> None:
    with Progress(terminal, total_steps=3, tokens=[100, 100, 200], clock=clock) as progress:
        train(progress, clock, 10, 1, 2)
        with terminal.capture() as captured:
            terminal.print(progress._picture())
        train(progress, clock, 20, 3)
    picture = captured.get()
    assert "2/3" in picture
    assert "loss 2.0000 · 10 tokens/s · 20 s left · peak 1.00 GiB" in picture
    file = terminal.file
    assert isinstance(file, io.StringIO)
    assert "3/3" in file.getvalue()
    assert "step 3/3:" not in file.getvalue()  # no plain lines beside it
    assert file.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is back


def test_a_resumed_run_goes_on_where_it_was(clock: Clock, terminal: Console) -> None:
    tokens = [100, 100, 200]
    with Progress(terminal, total_steps=3, tokens=tokens, done=2, clock=clock) as progress:
        with terminal.capture() as captured:
            terminal.print(progress._picture())
        train(progress, clock, 20, 3)
    assert "2/3" in captured.get()


def test_stderr_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total_steps=1, tokens=[100]) as progress:
        progress.update(step(1))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 1/1" in captured.err
