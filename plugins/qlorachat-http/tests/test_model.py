"""The demo model answers OpenAI's client, streamed and not, with the same words."""

import os
from collections.abc import Callable

import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

from qlorachat import ChatEngine
from qlorachat.errors import ModelError

Serve = Callable[..., str]


@pytest.mark.model
def test_the_capital_of_france(serve: Serve) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        engine = ChatEngine("smollm2", offline=True)
    except ModelError as error:
        pytest.skip(str(error))
    with openai.OpenAI(base_url=f"{serve(engine)}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        question = ChatCompletionUserMessageParam(
            role="user", content="What is the capital of France?"
        )
        whole = client.chat.completions.create(
            model=model, messages=[question], temperature=0, max_tokens=24
        )
        chunks = client.chat.completions.create(
            model=model, messages=[question], temperature=0, max_tokens=24, stream=True
        )
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert "Paris" in streamed
    assert whole.choices[0].message.content == streamed
