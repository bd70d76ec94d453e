"""Chat with 4-bit Llama-style models and LoRA adapters, and train them; imports no torch itself."""

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
    from qlorachat.training.config import TrainConfig
    from qlorachat.training.export.export import export_merged
    from qlorachat.training.run import TrainResult, train

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
    "TrainConfig": "training.config",
    "TrainResult": "training.run",
    "Usage": "messages",
    "export_merged": "training.export.export",
    "hookimpl": "hookspecs",
    "train": "training.run",
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
    "TrainConfig",
    "TrainResult",
    "Usage",
    "export_merged",
    "hookimpl",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qlorachat' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qlorachat.{_HOMES[name]}"), name)
