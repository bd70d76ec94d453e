"""One box, Submit, and the answer of the adapter in qlora-model/: `gradio examples/main.py`."""

from collections.abc import AsyncIterator
from pathlib import Path

import gradio as gr

from qlorachat import ChatEngine, QlorachatError

FOLDER = Path(__file__).with_name("qlora-model")

if gr.NO_RELOAD:  # `gradio main.py` runs this file again after every change of it
    adapter = FOLDER.name if FOLDER.is_dir() else None
    engine = ChatEngine(adapters={adapter: FOLDER} if adapter else {})  # its base, or the demo
    note = f"{engine.info.name} with the adapter {FOLDER}"
    if adapter is None:
        note = f"The demo model without an adapter: there is no folder {FOLDER}"


async def answer(question: str) -> AsyncIterator[str]:
    """The answer as far as it has come."""
    text = ""
    try:
        async with engine.astream(question, adapter=adapter) as stream:
            async for delta in stream:
                text += delta.text
                yield text
    except QlorachatError as error:
        raise gr.Error(str(error), print_exception=False) from error


demo = gr.Interface(
    answer,
    gr.Textbox(label="Question", lines=3),
    gr.Textbox(label="Answer", lines=10),
    title="qlorachat",
    description=note,
    flagging_mode="never",
    analytics_enabled=False,
)

if __name__ == "__main__":
    demo.launch()
