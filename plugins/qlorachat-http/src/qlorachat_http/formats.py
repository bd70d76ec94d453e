"""The JSON of answers, whole and in chunks, in the two shapes of OpenAI's API."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from time import time
from typing import Any, ClassVar
from uuid import uuid4

from qlorachat import FinishReason, Reply, TokenLogprob
from qlorachat_http.generations import Piece

Json = dict[str, Any]

LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity


class ReplyFormat(ABC):
    """One response: the same id and time in all of its chunks."""

    prefix: ClassVar[str]
    object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: str, *, choices: int, logprobs: bool, include_usage: bool) -> None:
        self._head = {"id": self.prefix + uuid4().hex, "created": int(time()), "model": model}
        self._choices = choices  # answers of each prompt
        self._logprobs = logprobs
        self.include_usage = include_usage

    def whole(self, replies: Sequence[Reply]) -> Json:
        """The response that is not streamed."""
        choices = [
            {"index": index, **self._answer(reply), "finish_reason": reply.finish_reason.value}
            for index, reply in enumerate(replies)
        ]
        body = {"object": self.object, "choices": choices, "usage": self._usage(replies)}
        return self._head | body

    def opening(self, index: int) -> Json | None:
        """What a stream says of an answer before its text."""
        return None

    def chunk(self, piece: Piece) -> Json:
        """The chunk of one piece of an answer."""
        return self._chunk(piece.index, self._change(piece), piece.end)

    def usage_chunk(self, replies: Sequence[Reply]) -> Json:
        """The last chunk of a stream that was asked for usage."""
        return self._chunk_head | {"choices": [], "usage": self._usage(replies)}

    @abstractmethod
    def _answer(self, reply: Reply) -> Json:
        """A whole choice, without its index and finish reason."""

    @abstractmethod
    def _change(self, piece: Piece) -> Json:
        """A choice in a chunk, without its index and finish reason."""

    @property
    def _chunk_head(self) -> Json:
        return self._head | {"object": self.chunk_object}

    def _chunk(self, index: int, change: Json, end: FinishReason | None) -> Json:
        choice = {"index": index, **change, "finish_reason": end.value if end else None}
        usage = {"usage": None} if self.include_usage else {}
        return self._chunk_head | {"choices": [choice]} | usage

    def _usage(self, replies: Sequence[Reply]) -> Json:
        """Token counts; a prompt with several answers counts once."""
        prompts = [reply.usage for reply in replies[:: self._choices]]
        prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
        completion_tokens = sum(reply.usage.completion_tokens for reply in replies)
        counts: Json = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        if dropped := sum(usage.prompt_tokens_dropped for usage in prompts):
            counts["prompt_tokens_dropped"] = dropped
            counts["dropped_messages"] = list(prompts[0].dropped_messages)
        return counts


class ChatFormat(ReplyFormat):
    """`chat.completion` and its chunks."""

    prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> Json:
        delta = {"role": "assistant", "content": ""}
        return self._chunk(index, {"delta": delta, "logprobs": None}, None)

    def _answer(self, reply: Reply) -> Json:
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        return {"message": message, "logprobs": self._tokens(reply.logprobs)}

    def _change(self, piece: Piece) -> Json:
        if piece.delta is None:
            return {"delta": {}, "logprobs": None}
        logprobs = self._tokens(piece.delta.logprobs)
        return {"delta": {"content": piece.delta.text}, "logprobs": logprobs}

    def _tokens(self, tokens: Sequence[TokenLogprob]) -> Json | None:
        if not self._logprobs:
            return None
        content = [
            {
                **_token(token.token, token.logprob),
                "top_logprobs": [_token(text, value) for text, value in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}


class CompletionFormat(ReplyFormat):
    """`text_completion`, whole and in chunks."""

    prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, model: str, *, choices: int, logprobs: bool, include_usage: bool) -> None:
        super().__init__(model, choices=choices, logprobs=logprobs, include_usage=include_usage)
        self._offsets: Counter[int] = Counter()  # answer -> characters of its tokens so far

    def _answer(self, reply: Reply) -> Json:
        return {"text": reply.text, "logprobs": self._tokens(reply.logprobs, 0)}

    def _change(self, piece: Piece) -> Json:
        if piece.delta is None:
            return {"text": "", "logprobs": None}
        logprobs = self._tokens(piece.delta.logprobs, self._offsets[piece.index])
        self._offsets[piece.index] += sum(len(token.token) for token in piece.delta.logprobs)
        return {"text": piece.delta.text, "logprobs": logprobs}

    def _tokens(self, tokens: Sequence[TokenLogprob], offset: int) -> Json | None:
        if not self._logprobs:
            return None
        offsets = [offset]
        for token in tokens:
            offsets.append(offsets[-1] + len(token.token))
        return {
            "tokens": [token.token for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {text: _finite(value) for text, value in token.top} for token in tokens
            ],
            "text_offset": offsets[:-1],
        }


def _token(text: str, logprob: float) -> Json:
    """`bytes` is null for a token that is a part of a character."""
    whole = "\ufffd" not in text
    return {
        "token": text,
        "logprob": _finite(logprob),
        "bytes": list(text.encode()) if whole else None,
    }


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
