"""Chat with 4-bit Llama-style models and un-merged LoRA adapters; imports no torch by itself."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlorachat.chat import ChatEngine
    from qlorachat.config import EngineConfig
    from qlorachat.errors import QlorachatError
    from qlorachat.hookspecs import hookimpl
    from qlorachat.messages import Delta, Message, Reply, Score, TokenLogprob, Usage
    from qlorachat.protocols import Backend, Frontend, ModelInfo, Segment, Template, Tokenizer
    from qlorachat.streams import AsyncChatStream, ChatStream, CompareStream
    from qlorachat.tokens import FinishReason, RequestRecord, SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "AsyncChatStream": "streams",
    "Backend": "protocols",
    "ChatEngine": "chat",
    "ChatStream": "streams",
    "CompareStream": "streams",
    "Delta": "messages",
    "EngineConfig": "config",
    "FinishReason": "tokens",
    "Frontend": "protocols",
    "Message": "messages",
    "ModelInfo": "protocols",
    "QlorachatError": "errors",
    "Reply": "messages",
    "Score": "messages",
    "RequestRecord": "tokens",
    "SamplingParams": "tokens",
    "Segment": "protocols",
    "Template": "protocols",
    "TokenLogprob": "messages",
    "Tokenizer": "protocols",
    "Usage": "messages",
    "hookimpl": "hookspecs",
}
__all__ = [
    "AsyncChatStream",
    "Backend",
    "ChatEngine",
    "ChatStream",
    "CompareStream",
    "Delta",
    "EngineConfig",
    "FinishReason",
    "Frontend",
    "Message",
    "ModelInfo",
    "QlorachatError",
    "Reply",
    "RequestRecord",
    "SamplingParams",
    "Score",
    "Segment",
    "Template",
    "TokenLogprob",
    "Tokenizer",
    "Usage",
    "hookimpl",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qlorachat' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qlorachat.{_HOMES[name]}"), name)
