"""report.html: whole, self-contained, harmless, and readable in every state of a run."""

import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rcParams
from playwright.sync_api import Browser, Page, sync_playwright

from qlorachat.training.config import TrainConfig
from qlorachat.training.history import Chat, Evaluation, History, Step
from qlorachat.training.memory.plan import MemoryPlan, Part
from qlorachat.training.watchers.charts import rolling, step_rates
from qlorachat.training.watchers.report import ReportData, render_report, write_report

GIB = 2**30
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}"
PLAN = MemoryPlan(
    "cuda",
    11 * GIB,
    (
        Part("base weights", 4 * GIB, 4 * GIB),
        Part("adapter and gradients", GIB, GIB),
        Part("activations", 1 * GIB, 3 * GIB),
    ),
)


def history(steps: int) -> History:
    return History(
        [
            Step(n, n / 10, 1 + 2 / n, 2e-4 * n / steps, 0.5, 100 * n, 2.0 * n, 6 * GIB + n)
            for n in range(1, steps + 1)
        ],
        [Evaluation(0, 4.0), Evaluation(10, 1.75), Evaluation(20, 1.9375)],
        [
            Chat(0, "誰?", "AIです。", "AIです。"),
            Chat(0, "Hello", "Hi", "Hi"),
            Chat(20, "誰?", "AIです。", "ぼくなのだ。"),
            Chat(20, "Hello", "Hi", ""),
        ],
    )


def summary(**changes: object) -> ReportData:
    whole = ReportData(
        title="zundamon",
        base_model="some/base",
        written=datetime(2025, 11, 25, 2, 14, tzinfo=UTC),
        finished=True,
        total_steps=30,
        settings=TrainConfig().model_dump(),
        data={"rows": "1,234", "bad rows": "5"},
        history=history(30),
        plan=PLAN,
        card="Some Card",
        card_memory=12 * GIB,
        versions={"torch": "2.13.0"},
    )
    return replace(whole, **changes)  # type: ignore[arg-type]  # fields by name


class Reader(HTMLParser):
    """The tags of a page, its ids, and what its attributes point to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.targets: list[str] = []
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
            if name in {"src", "href", "xlink:href", "action", "data", "srcset"}:
                self.targets.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)


def texts(page: str) -> str:
    """What is read on a page, spaces evened out."""
    body = page[page.index("<body>") :]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_headline_numbers() -> None:
    read = texts(render_report(summary()))
    for expected in (
        "30 of 30",
        "3.00",
        f"{1 + (2 / 29 + 2 / 30) / 2:.4f}",
        "1.7500 after step 10",
        "1 min",
        "50 3,000 tokens",
        "6.00 GiB of 12.00 GiB",
        "Finished",
        "some/base",
        "Some Card",
        "1,234",
        "2.13.0",
        "Loss 損失",
    ):
        assert expected in read


def test_every_setting_is_there() -> None:
    read = texts(render_report(summary()))
    for name in TrainConfig.model_fields:
        assert f" {name} " in read
    assert "&#34;\\n\\n&#34;" in read  # the separator, which nobody would see bare


def test_nothing_is_loaded_from_anywhere() -> None:
    page = render_report(summary())
    reader = Reader(page)
    assert not reader.tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert all(target.startswith("#") for target in reader.targets)
    assert not reader.handlers
    assert not re.search(r"url\((?!#)|@import", page)
    assert "default-src 'none'" in page


def test_ids_are_unique_and_references_lead_somewhere() -> None:
    page = render_report(summary())
    reader = Reader(page)
    assert set(reader.ids.values()) == {1}
    referred = {target[1:] for target in reader.targets} | set(re.findall(r"url\(#(\w+)\)", page))
    assert referred <= reader.ids.keys()


def test_other_peoples_text_stays_text() -> None:
    chats = [Chat(step, EVIL, EVIL, EVIL) for step in (0, 10)]
    page = render_report(
        summary(
            title=EVIL,
            base_model=EVIL,
            card=EVIL,
            settings={EVIL: EVIL},
            data={EVIL: EVIL},
            versions={EVIL: EVIL},
            history=replace(history(3), chats=chats),
            plan=MemoryPlan("cpu", None, (Part(EVIL, 1),)),
        )
    )
    reader = Reader(page)
    assert not reader.tags.keys() & {"script", "img"}
    assert not reader.handlers
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 12
    assert "49" not in texts(page).replace("{{ 7 * 7 }}", "")


def test_charts_take_the_pages_colours() -> None:
    page = render_report(summary())
    assert "stroke: var(--first)" in page
    assert not re.search(r"(stroke|fill): #", page)


def test_the_same_summary_gives_the_same_page() -> None:
    before = dict(rcParams)
    page = render_report(summary())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rcParams, "lines.linewidth", 9.0)  # a user's own style changes nothing
        assert render_report(summary()) == page
    assert dict(rcParams) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"history": History(), "total_steps": 0, "settings": {}, "data": {}, "versions": {}},
        {"history": History(evaluations=[Evaluation(0, 3.0)]), "finished": False},
        {"history": history(1), "total_steps": 1},
        {"history": history(2), "finished": False},
        {"history": replace(history(30), evaluations=[], chats=[])},
        {"history": History([Step(1, 0.0, 0.0, 0.0, math.inf, 0, 0.0, 0)])},
        {"card_memory": None, "plan": MemoryPlan("cpu", None, ())},
        {"plan": MemoryPlan("cpu", None, (Part("base weights", 0), Part("logits", 5)))},
        {"total_steps": 300, "finished": False},
    ],
)
def test_every_state_of_a_run_has_a_page(changes: dict[str, object]) -> None:
    page = render_report(summary(**changes))
    assert not re.search(r"\b(nan|inf|none)\b", texts(page), re.IGNORECASE)
    assert not re.search(r"\b(nan|inf)\b", page, re.IGNORECASE)
    assert ("Not finished" in page) == (changes.get("finished") is False)


def test_chats_are_by_prompt_and_the_latest_is_first() -> None:
    read = texts(render_report(summary()))
    order = [
        "誰?",
        "AIです。",
        "Adapter after step 20",
        "ぼくなのだ。",
        "Earlier",
        "before the first step",
        "Hello",
    ]
    for each in order:
        _, found, read = read.partition(each)
        assert found, f"no {each} after those before it"
    assert "nothing" in read  # the empty answer


def test_bars_add_up_to_the_total() -> None:
    page = render_report(summary())
    bars = re.findall(r'class="bar (\w+)" style="margin-left: ([\d.]+)%; width: ([\d.]+)%', page)
    measured = [(float(start), float(width)) for kind, start, width in bars if kind == "measured"]
    assert measured == [(0, 50), (50, 12.5), (62.5, 37.5)]
    predicted = [(float(start), float(width)) for kind, start, width in bars if kind != "measured"]
    assert predicted == [(0, 50), (50, 12.5), (62.5, 12.5)]


def test_bars_of_parts_that_never_meet_stay_within_the_total() -> None:
    plan = MemoryPlan("cuda", None, (Part("one layer", 3 * GIB), Part("logits", 4 * GIB)))
    page = render_report(summary(plan=plan))
    bars = re.findall(r"margin-left: ([\d.]+)%; width: ([\d.]+)%", page)
    assert bars == [("0.00", "75.00"), ("0.00", "100.00")]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, summary(finished=False))
    write_report(path, summary(title="half \ud800"))
    page = path.read_text("utf-8")
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert "<h1>half ?</h1>" in page
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.mkdir()
    with pytest.raises(OSError, match=re.escape(path.name)):
        write_report(path, summary())
    assert list(tmp_path.iterdir()) == [path]


def test_rolling_means_shrink_towards_the_ends() -> None:
    assert rolling(np.array([]), np.mean).tolist() == []
    assert rolling(np.array([3.0]), np.mean).tolist() == [3.0]
    assert rolling(np.array([1.0, 2.0, 6.0]), np.mean).tolist() == [1.5, 3.0, 4.0]
    assert rolling(np.arange(400.0), np.mean)[20:380].tolist() == pytest.approx(range(20, 380))


def test_rates_are_between_steps() -> None:
    run = [(1, 200, 2.0), (2, 300, 2.0), (3, 600, 6.0)]  # step, tokens, seconds
    made = [Step(n, 0, 0, 0, 0, tokens, seconds, 0) for n, tokens, seconds in run]
    steps, rates = step_rates(made)
    assert steps == [1, 3]
    assert rates.tolist() == [100.0, 75.0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no Chromium at {CHROMIUM}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_report(browser: Browser, path: Path, width: int, theme: str) -> Page:
    page = browser.new_page(
        viewport={"width": width, "height": 800},
        color_scheme="dark" if theme == "dark" else "light",
    )
    page.goto(path.as_uri())
    return page


@pytest.mark.browser
def test_readable_on_phone_and_desk_in_both_themes(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    long = "https://example.org/" + "x" * 300
    chats = [Chat(0, long, long, long), Chat(9, long, EVIL, long)]
    write_report(path, summary(title=long, history=replace(history(30), chats=chats)))
    papers = set()
    for width in (360, 390, 700, 1280):
        for theme in ("light", "dark"):
            page = open_report(browser, path, width, theme)
            assert page.evaluate("document.documentElement.scrollWidth") == width
            papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            columns = page.evaluate(
                "getComputedStyle(document.querySelector('.answers')).gridTemplateColumns"
            )
            assert len(columns.split()) == (1 if width <= 700 else 2)
            shown = page.locator(".drawing svg:visible")
            assert shown.count() == 4
            ticks = shown.first.locator("text")
            assert ticks.first.evaluate("text => text.getBoundingClientRect().height") > 10
            page.close()
    assert len(papers) == 2
