"""The frontend `batch`: one question a line in, one JSON object a line out, in the same order."""

import json
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

from pydantic import BaseModel, Field

from qlorachat import ChatEngine, Frontend, hookimpl
from qlorachat.errors import ConfigError, QlorachatError


class BatchOptions(BaseModel):
    """The one declaration behind --input, [batch] input in the file, and QLORACHAT_BATCH_INPUT."""

    input: Path = Field(Path("questions.txt"), description="a text file, one question a line")
    output: Path = Field(Path("answers.jsonl"), description="the answers, one JSON object a line")
    adapter: str | None = Field(None, description="name of the adapter that answers")


class BatchFrontend:
    """Answers a whole file and leaves."""

    name = "batch"
    summary = "answer a file of questions"
    options = BatchOptions

    def prepare(self, options: BatchOptions) -> None:
        """Refuse what can't work before the model loads."""
        if not options.input.is_file():
            raise ConfigError(f"There is no file {options.input}: give one with --input.")
        if options.output.exists():
            raise ConfigError(f"{options.output} exists already: move it, or name another.")

    def serve(self, engine: ChatEngine, options: BatchOptions, stop: Event) -> None:
        """One question at a time, until the file or the host's patience ends."""
        questions = options.input.read_text(encoding="utf-8").splitlines()
        with options.output.open("x", encoding="utf-8") as output:
            for question in filter(None, map(str.strip, questions)):
                if stop.is_set():
                    return
                row = {"question": question, **answer(engine, question, options.adapter)}
                print(json.dumps(row, ensure_ascii=False), file=output, flush=True)


def answer(engine: ChatEngine, question: str, adapter: str | None) -> dict[str, str]:
    """The answer, or in its place what was wrong with the question."""
    try:
        reply = engine.chat(question, adapter=adapter)
    except QlorachatError as error:
        return {"error": str(error)}
    return {"answer": reply.text, "finish_reason": reply.finish_reason}


@hookimpl
def register_frontends(register: Callable[[Frontend[Any]], None]) -> None:
    register(BatchFrontend())
