"""Take the README's pictures: the real page with the demo model answering, in both languages.

Needs Chromium and playwright; writes docs/images/ui-en.png and docs/images/ui-ja.png.
"""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, expect, sync_playwright

from qlorachat import ChatEngine
from qlorachat_gradio.plugin import GradioFrontend, GradioOptions

IMAGES = Path(__file__).with_name("images")
QUESTION = "What is the capital of France?"
PICTURES = {"ui-en.png": "en-US", "ui-ja.png": "ja-JP"}


def main() -> None:
    """Write every picture."""
    IMAGES.mkdir(exist_ok=True)
    with ChatEngine() as engine, page_of(engine) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name, locale in PICTURES.items():
            picture(browser, url, locale, IMAGES / name)


@contextmanager
def page_of(engine: ChatEngine) -> Iterator[str]:
    """The engine's page, served until the block ends."""
    frontend, options, stop = GradioFrontend(), GradioOptions(port=7877), threading.Event()
    frontend.prepare(options)
    thread = threading.Thread(target=frontend.serve, args=(engine, options, stop))
    thread.start()
    try:
        yield f"http://{options.host}:{options.port}/"
    finally:
        stop.set()
        thread.join()


def picture(browser: Browser, url: str, locale: str, path: Path) -> None:
    """Ask the question in a tab of that locale and photograph the answer."""
    tab = browser.new_page(
        locale=locale, viewport={"width": 1120, "height": 600}, device_scale_factor=2
    )
    tab.goto(url)
    tab.locator("#message textarea").fill(QUESTION)
    tab.locator("#send").click()
    expect(tab.get_by_test_id("bot").last).to_contain_text("Paris", timeout=120_000)
    expect(tab.locator("#send")).to_be_visible(timeout=120_000)
    tab.mouse.move(0, 0)
    tab.wait_for_timeout(500)  # the button's colour fades
    tab.screenshot(path=path)
    tab.close()


if __name__ == "__main__":
    main()
