"""The page on a socket: a Gradio app behind its guard, run by uvicorn until told to stop."""

import asyncio
import logging
import socket
import webbrowser
from threading import Event

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from qlorachat import ChatEngine
from qlorachat.listening import is_loopback
from qlorachat_gradio.guard import LOOPBACK_NAMES, Guard
from qlorachat_gradio.look import CSS, theme
from qlorachat_gradio.page import I18N, build_page
from qlorachat_gradio.plugin import GradioOptions

GRACE = 1  # seconds that open connections get when the page closes: browsers hold theirs for good

log = logging.getLogger("qlorachat.gradio")


class Server(uvicorn.Server):
    """A uvicorn that says where the page is and ends with an event."""

    def __init__(self, config: uvicorn.Config, options: GradioOptions, stop: Event) -> None:
        super().__init__(config)
        self._options, self._stop = options, stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets, "the page is served on a bound socket"
        _announce(_url(self._options.host, sockets[0].getsockname()[1]), self._options.open_browser)

    async def on_tick(self, counter: int) -> bool:
        if self._stop.is_set():
            # what it would report from here on are the open pages that it hangs up on
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        return self._stop.is_set() or await super().on_tick(counter)


def serve(engine: ChatEngine, options: GradioOptions, listener: socket.socket, stop: Event) -> None:
    """Serve the page on a listening socket until `stop` is set."""
    asyncio.run(_serve(engine, options, listener, stop))


async def _serve(
    engine: ChatEngine, options: GradioOptions, listener: socket.socket, stop: Event
) -> None:
    # within a loop, for outside of one gradio makes loops that nobody closes
    app = build_app(engine, options)
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=GRACE,
        ws="none",
        proxy_headers=False,  # any caller on this machine could write them
    )
    await Server(config, options, stop).serve([listener])


def build_app(engine: ChatEngine, options: GradioOptions) -> ASGIApp:
    """The page as an ASGI app: no share link, no API documents, no files, nothing remembered."""
    page = build_page(engine, title=options.title, concurrency=options.concurrency)
    page.queue(max_size=options.queue_size)
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        app_kwargs={"openapi_url": None},
        theme=theme(),
        css=CSS,
        i18n=I18N,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        show_error=False,
    )
    return Guard(
        app,
        hosts=(*LOOPBACK_NAMES, options.host) if is_loopback(options.host) else None,
        user=options.user,
        password=options.password.get_secret_value() if options.password else None,
    )


def _announce(url: str, open_browser: bool) -> None:
    log.info("the chat page is at %s", url)
    if open_browser:
        webbrowser.open(url)


def _url(host: str, port: int) -> str:
    """Where this machine's browser finds the page."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  a name to replace
    return f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"
