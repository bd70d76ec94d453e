"""The page: what stands on it and which event each part sets off."""

import html
from dataclasses import dataclass
from typing import Any

import gradio as gr

from qlorachat import ChatEngine
from qlorachat_gradio.answering import Answering, still
from qlorachat_gradio.dialog import Dialog, before_last_question
from qlorachat_gradio.settings import BASE, adapter_menu, sampling_controls
from qlorachat_gradio.texts import TEXTS, language

I18N = gr.I18n(**TEXTS)

# events that only the page itself sets off, and that wait for nobody
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}


def build_page(engine: ChatEngine, *, title: str = "qlorachat", concurrency: int = 8) -> gr.Blocks:
    """A chat page for any number of visitors; `concurrency` of them are answered at a time."""
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        _heading(engine, title)
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=3, min_width=340, elem_id="talk"):
                chat = _chat()
            with gr.Column(scale=1, min_width=280, elem_id="settings"):
                settings = _settings(engine)
        _answer_events(engine, chat, settings, concurrency)
        chat.chatbot.undo(undo, chat.dialog, chat.outputs, **PRIVATE)
        _adapter_events(page, engine, settings["adapter"], settings["adapter_scale"])
    return page


@dataclass(frozen=True, slots=True)
class Chat:
    """The parts that an answer changes, in the order of answering.View."""

    message: gr.Textbox
    chatbot: gr.Chatbot
    dialog: gr.State
    status: gr.Markdown
    send: gr.Button
    stop: gr.Button

    @property
    def outputs(self) -> list[Any]:
        return [self.message, self.chatbot, self.dialog, self.status, self.send, self.stop]


def _heading(engine: ChatEngine, title: str) -> None:
    info = engine.info
    facts = " · ".join(filter(None, [info.name, info.quantization, info.device]))
    gr.HTML(
        f"<h1>{html.escape(title)}</h1><p>{html.escape(facts)}</p>", elem_id="head", padding=False
    )


def _chat() -> Chat:
    chatbot = gr.Chatbot(
        show_label=False,
        height=None,  # what the window leaves it; see look.CSS
        layout="bubble",
        editable="user",
        buttons=["copy", "copy_all"],
        sanitize_html=True,
        allow_tags=False,
        placeholder=I18N("empty"),
        elem_id="chat",
    )
    with gr.Row(elem_id="ask"):
        message = gr.Textbox(
            label=I18N("message"),
            show_label=False,
            container=False,
            lines=1,
            max_lines=8,
            placeholder=I18N("message_hint"),
            autofocus=True,
            scale=8,
            elem_id="message",
        )
        send = gr.Button(I18N("send"), variant="primary", scale=1, min_width=96, elem_id="send")
        stop = gr.Button(
            I18N("stop"), variant="stop", scale=1, min_width=96, visible=False, elem_id="stop"
        )
    status = gr.Markdown(I18N("keys"), elem_id="status")
    return Chat(message, chatbot, gr.State([]), status, send, stop)


def _settings(engine: ChatEngine) -> dict[str, Any]:
    names = [(name, name) for name in engine.adapters]  # what a caller of /chat may name
    adapter = gr.Dropdown(
        [("", BASE), *names], value=BASE, label=I18N("adapter"), info=I18N("adapter_info")
    )
    strength = gr.Slider(
        0,
        2,
        1,
        step=0.05,
        label=I18N("adapter_scale"),
        info=I18N("adapter_scale_info"),
        visible=False,  # until an adapter is chosen
    )
    system = gr.Textbox(
        "",
        lines=3,
        max_lines=10,
        label=I18N("system"),
        placeholder=engine.config.system or I18N("system_hint"),
    )
    drop_oldest = gr.Checkbox(
        engine.config.overflow == "drop_oldest_turns", label=I18N("drop_oldest"), container=False
    )
    with gr.Accordion(I18N("sampling"), open=False):
        sampling = sampling_controls(engine.info.sampling, I18N)
    return {
        "adapter": adapter,
        "adapter_scale": strength,
        "system": system,
        "drop_oldest": drop_oldest,
        **sampling,
    }


def _answer_events(
    engine: ChatEngine, chat: Chat, settings: dict[str, Any], concurrency: int
) -> None:
    """The events that use the model, in one line of waiting visitors, and those that end them."""
    answering = Answering(engine)
    model: dict[str, Any] = {
        "outputs": chat.outputs,
        "inputs_kwargs": settings,
        "concurrency_id": "model",
        "concurrency_limit": concurrency,
        "show_progress": "hidden",
    }
    sent = [chat.message.submit, chat.send.click]
    gr.on(sent, answering.submit, [chat.message, chat.dialog], api_name="chat", **model)
    chat.chatbot.retry(answering.retry, chat.dialog, api_visibility="private", **model)
    chat.chatbot.edit(answering.edit, chat.dialog, api_visibility="private", **model)
    chat.stop.click(answering.stop, None, None, **PRIVATE)
    chat.chatbot.clear(answering.clear, None, chat.outputs, **PRIVATE)


def _adapter_events(page: gr.Blocks, engine: ChatEngine, menu: Any, strength: Any) -> None:
    """The menu is fresh on every visit; the strength shows beside an adapter only."""

    def menu_now(request: gr.Request) -> gr.Dropdown:
        return adapter_menu(engine, language(request.headers.get("accept-language")))

    def strength_for(adapter: str) -> gr.Slider:
        return gr.Slider(visible=adapter != BASE)

    page.load(menu_now, None, menu, **PRIVATE)
    menu.change(strength_for, menu, strength, **PRIVATE)


def undo(dialog: Dialog) -> Any:
    """The page without the last question and its answer; the question is back in the box."""
    kept, message = before_last_question(dialog)
    return still(kept, message=message)
