"""The page in a real browser, on a real engine whose model is a function."""

import itertools
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from pydantic import SecretStr

from qlorachat.testing import FakeBackend, fake_engine
from qlorachat.tokens import TokenRequest

Serve = Callable[..., str]
Visit = Callable[..., Page]

pytestmark = pytest.mark.browser


def ask(page: Page, text: str) -> None:
    page.locator("#message textarea").fill(text)
    page.locator("#send").click()


def set_number(page: Page, label: str, value: str) -> None:
    number = page.get_by_label(label)
    expect(number).to_be_editable()
    for _ in range(10):  # while the page still loads, it sets what is preset
        number.fill(value)
        number.press("Tab")
        page.wait_for_timeout(200)
        if number.input_value() == value:
            break
    expect(number).to_have_value(value)


def answers(page: Page) -> list[str]:
    return page.get_by_test_id("bot").all_inner_texts()


def questions(page: Page) -> list[str]:
    return page.get_by_test_id("user").all_inner_texts()


def expect_answered(page: Page, text: str) -> None:
    expect(page.get_by_test_id("bot").last).to_have_text(text)
    expect(page.locator("#send")).to_be_visible()


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def endless(request: TokenRequest, prompt: str) -> str:
    return "ha " * 5000


def turns(request: TokenRequest, prompt: str) -> str:
    """How many questions the prompt holds, and the last one."""
    *_, last = re.findall(r"user\n(.*?)\n?(?=assistant\n)", prompt, re.DOTALL)
    return f"{prompt.count('user' + chr(10))}: {last}"


def test_a_question_is_answered_as_it_comes(serve: Serve, visit: Visit) -> None:
    backend = FakeBackend(lambda request, prompt: "one two **three**", delay=0.2)
    with fake_engine(backend) as engine:
        page = visit(serve(engine))
        ask(page, "Count!")
        # some beginning of it, before there is all of it
        beginning = re.compile(r"^o(?!ne two three\s*$)")
        expect(page.get_by_test_id("bot").last).to_have_text(beginning)
        expect(page.locator("#stop")).to_be_visible()
        expect_answered(page, "one two three")
        assert page.locator("#message textarea").input_value() == ""
        expect(page.locator("#status")).to_have_text(
            re.compile(r"18 tokens · [\d.]+ s · [\d.]+ tokens/s")
        )


def test_stop_ends_the_model_and_keeps_what_was_said(serve: Serve, visit: Visit) -> None:
    backend = FakeBackend(endless, delay=0.02)
    with fake_engine(backend) as engine:
        page = visit(serve(engine))
        ask(page, "Laugh!")
        expect(page.get_by_test_id("bot").last).to_contain_text("ha ha")
        assert backend.running == 1
        page.locator("#stop").click()
        until(lambda: backend.running == 0)
        expect(page.locator("#send")).to_be_visible()
        expect(page.locator("#status")).to_have_text("Stopped.")
        assert "ha ha" in answers(page)[-1]


def test_stop_ends_a_model_that_has_said_nothing_yet(serve: Serve, visit: Visit) -> None:
    backend = FakeBackend(delay=2)
    with fake_engine(backend) as engine:
        page = visit(serve(engine))
        ask(page, "Think!")
        page.locator("#stop").click()
        expect(page.locator("#send")).to_be_visible()
        expect(page.locator("#status")).to_have_text("Stopped.")
        until(lambda: backend.running == 0)
        assert questions(page) == ["Think!"]


def test_a_closed_tab_ends_the_model(serve: Serve, visit: Visit) -> None:
    backend = FakeBackend(endless, delay=0.02)
    with fake_engine(backend) as engine:
        page = visit(serve(engine))
        ask(page, "Laugh!")
        expect(page.get_by_test_id("bot").last).to_contain_text("ha ha")
        page.close()
        until(lambda: backend.running == 0)


def test_the_page_ends_though_somebody_reads_it(
    serve: Serve, visit: Visit, pages: ExitStack
) -> None:
    backend = FakeBackend(endless, delay=0.02)
    with fake_engine(backend) as engine:
        page = visit(serve(engine))
        ask(page, "Laugh!")
        expect(page.get_by_test_id("bot").last).to_contain_text("ha ha")
        pages.close()
        until(lambda: backend.running == 0)


def test_the_dialog_goes_on(serve: Serve, visit: Visit) -> None:
    with fake_engine(FakeBackend(turns)) as engine:
        page = visit(serve(engine))
        ask(page, "first")
        expect_answered(page, "1: first")
        page.locator("#message textarea").fill("second")
        page.keyboard.press("Enter")
        expect_answered(page, "2: second")


def test_retry_undo_edit_and_clear(serve: Serve, visit: Visit) -> None:
    calls = itertools.count(1)

    def numbered(request: TokenRequest, prompt: str) -> str:
        return f"#{next(calls)} {turns(request, prompt)}"

    with fake_engine(FakeBackend(numbered)) as engine:
        page = visit(serve(engine))
        ask(page, "first")
        expect_answered(page, "#1 1: first")
        ask(page, "second")
        expect_answered(page, "#2 2: second")

        page.get_by_role("button", name="Retry").last.click()
        expect_answered(page, "#3 2: second")
        assert [answer.strip() for answer in answers(page)] == ["#1 1: first", "#3 2: second"]

        page.get_by_role("button", name="Undo").last.click()
        expect(page.get_by_test_id("bot")).to_have_count(1)
        expect(page.locator("#message textarea")).to_have_value("second")

        page.get_by_role("button", name="Edit").first.click()
        page.locator("#chat textarea").fill("other")
        page.get_by_role("button", name="Submit").click()
        expect_answered(page, "#4 1: other")
        assert questions(page) == ["other"]

        page.get_by_role("button", name="Clear").first.click()
        expect(page.get_by_test_id("bot")).to_have_count(0)
        ask(page, "again")
        expect_answered(page, "#5 1: again")


def test_visitors_share_no_history(serve: Serve, visit: Visit) -> None:
    with fake_engine(FakeBackend(turns)) as engine:
        url = serve(engine)
        one, two = visit(url), visit(url)
        ask(one, "mine")
        expect_answered(one, "1: mine")
        ask(two, "yours")
        expect_answered(two, "1: yours")
        ask(one, "mine again")
        expect_answered(one, "2: mine again")
        assert questions(two) == ["yours"]


def test_a_refused_message_is_explained_and_not_lost(serve: Serve, visit: Visit) -> None:
    with fake_engine(FakeBackend(turns, context_length=300)) as engine:
        page = visit(serve(engine))
        ask(page, "hello")
        expect_answered(page, "1: hello")
        long = "word " * 100
        ask(page, long)
        expect(page.get_by_test_id("toast-body")).to_contain_text("the context holds 300")
        expect(page.locator("#message textarea")).to_have_value(long)
        expect(page.locator("#send")).to_be_visible()
        assert questions(page) == ["hello"]


def test_an_answer_that_breaks_off_stays(serve: Serve, visit: Visit) -> None:
    backend = FakeBackend(endless, delay=0.02)
    with fake_engine(backend) as engine:
        page = visit(serve(engine))
        ask(page, "Laugh!")
        expect(page.get_by_test_id("bot").last).to_contain_text("ha ha")
        backend.fail("The model fell over <b>hard</b>.")
        expect(page.get_by_test_id("toast-body")).to_contain_text("fell over <b>hard</b>")
        expect(page.locator("#send")).to_be_visible()
        assert "ha ha" in answers(page)[-1]


def test_a_cut_answer_says_so(serve: Serve, visit: Visit) -> None:
    with fake_engine(FakeBackend(endless)) as engine:
        page = visit(serve(engine))
        page.get_by_text("Sampling").click()
        set_number(page, "Max tokens", "7")
        ask(page, "Laugh!")
        expect_answered(page, "ha ha h")
        expect(page.locator("#status")).to_contain_text("cut at max_tokens (7)")


def test_settings_reach_the_model(serve: Serve, visit: Visit) -> None:
    seen: list[TokenRequest] = []

    def answer(request: TokenRequest, prompt: str) -> str:
        seen.append(request)
        return prompt

    with fake_engine(FakeBackend(answer)) as engine:
        page = visit(serve(engine))
        page.get_by_label("System prompt").fill("Rhyme.")
        page.get_by_text("Sampling").click()
        set_number(page, "number input for Temperature", "1.25")
        set_number(page, "Seed", "42")
        ask(page, "Sing!")
        expect(page.get_by_test_id("bot").last).to_contain_text("Rhyme.")
        expect(page.locator("#send")).to_be_visible()
        assert (seen[0].sampling.temperature, seen[0].sampling.seed) == (1.25, 42)
        assert seen[0].sampling.top_p == engine.info.sampling.top_p


def test_an_adapter_is_chosen_by_name_and_strength(
    serve: Serve, visit: Visit, make_adapter: Callable[..., Path]
) -> None:
    def adapter(request: TokenRequest, prompt: str) -> str:
        return f"{bool(request.adapter)} {request.adapter_scale}"

    backend = FakeBackend(adapter)
    backend.info = replace(backend.info, shapes={"model.layers.0.self_attn.q_proj": (4, 4)})
    with fake_engine(backend, adapters={"zundamon": make_adapter("zundamon", 4, 4)}) as engine:
        page = visit(serve(engine))
        menu = page.get_by_role("combobox", name="Adapter")
        expect(menu).to_have_value("zundamon")
        set_number(page, "number input for Strength", "1.5")
        ask(page, "Who?")
        expect_answered(page, "True 1.5")

        menu.click()
        page.get_by_role("option", name="base model").click()
        expect(page.get_by_label("number input for Strength")).to_be_hidden()
        ask(page, "Who?")
        expect_answered(page, "False 1.5")

        engine.load_adapter("late", make_adapter("late", 4, 4))
        engine.unload_adapter("zundamon")
        menu.click()
        page.get_by_role("option", name="zundamon").click()
        ask(page, "Who?")
        expect(page.get_by_test_id("toast-body")).to_contain_text("“zundamon” is no longer loaded")
        page.reload()
        expect(menu).to_have_value("late")
        ask(page, "Who?")
        expect_answered(page, "True 1.0")


def test_answers_cannot_bring_script_into_the_page(serve: Serve, visit: Visit) -> None:
    attack = (
        "safe<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    )
    with fake_engine(FakeBackend(lambda request, prompt: attack)) as engine:
        page = visit(serve(engine))
        ask(page, attack)
        expect(page.get_by_test_id("bot").last).to_contain_text("safe")
        expect(page.locator("#send")).to_be_visible()
        assert page.title() == "qlorachat"
        assert page.locator("#chat [onerror], #chat script").count() == 0


@pytest.mark.parametrize(
    ("locale", "send", "system", "base"),
    [
        ("ja-JP", "送信", "システムプロンプト", "ベースモデル（アダプターなし）"),
        ("fr-FR", "Send", "System prompt", "base model (no adapter)"),
    ],
)
def test_the_browser_decides_the_language(
    serve: Serve, visit: Visit, locale: str, send: str, system: str, base: str
) -> None:
    with fake_engine() as engine:
        page = visit(serve(engine), locale)
        expect(page.locator("#send")).to_have_text(send)
        expect(page.get_by_label(system)).to_be_visible()
        expect(page.locator("#settings input").first).to_have_value(base)
        assert "__i18n__" not in page.content().split("</script>")[-1]


def test_a_visitor_with_the_password_chats(serve: Serve, visit: Visit) -> None:
    with fake_engine() as engine:
        url = serve(engine, password=SecretStr("秘密"))
        page = visit(url, http_credentials={"username": "user", "password": "秘密"})
        ask(page, "hello")
        expect_answered(page, "hello")


def test_the_page_calls_nobody_else(serve: Serve, visit: Visit) -> None:
    with fake_engine() as engine:
        url = serve(engine)
        page = visit(url)
        called: list[str] = []
        page.on("request", lambda request: called.append(request.url))
        page.reload()
        ask(page, "hello")
        expect_answered(page, "hello")
        assert called
        assert [address for address in called if not address.startswith((url, "data:"))] == []


def test_the_page_fits_a_phone(serve: Serve, visit: Visit) -> None:
    with fake_engine() as engine:
        page = visit(serve(engine), "ja-JP", viewport={"width": 360, "height": 740})
        ask(page, "とても長い質問です。" * 20)
        expect(page.locator("#send")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        box = page.locator("#ask").bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= 740
