"""One answer in the making: token events in, deltas and a reply out; knows nothing of threads."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from qlorachat.detokenize import TextStream
from qlorachat.errors import EngineError
from qlorachat.messages import Delta, Reply, Timings, TokenLogprob, Usage
from qlorachat.protocols import Tokenizer
from qlorachat.tokens import FinishReason, RequestRecord, TokenEvent, TokenRequest


@dataclass(frozen=True, slots=True)
class Dropped:
    """Old turns left out to fit the context: their place in the dialog, and their tokens."""

    messages: tuple[int, ...] = ()
    tokens: int = 0


NOTHING_DROPPED = Dropped()


class Generation:
    """The state of one request from its submission to its end."""

    def __init__(
        self,
        request: TokenRequest,
        tokenizer: Tokenizer,
        *,
        submitted: float,  # seconds of time.perf_counter
        stop: tuple[str, ...] = (),
        dropped: Dropped = NOTHING_DROPPED,
        adapter: str | None = None,
        on_stop: Callable[[], None],  # the answer is complete before the backend knows
        on_finish: Callable[["Generation"], None],
    ) -> None:
        self.request = request
        self.adapter = adapter
        self.finish_reason: FinishReason | None = None
        self.done = False
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer, stop)
        self._dropped = dropped
        self._on_stop, self._on_finish = on_stop, on_finish
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._unsent: list[TokenLogprob] = []
        self._submitted = submitted
        self._first = self._last = math.nan
        self._completion_tokens = 0
        self.prompt_logprobs: tuple[float, ...] = ()

    def feed(self, event: TokenEvent) -> Delta | None:
        """What is new to show after one event, if it has not ended; raises the event's error."""
        if self.done:
            return None
        if event.error is not None:
            self._end(None)
            raise event.error
        text = self._take(event) if event.token_id is not None else ""
        if self._text.stopped:
            self._on_stop()
            self._end(FinishReason.STOP)
        elif event.finish is not None:
            text += self._text.flush()
            self._end(event.finish)
        return self._delta(text)

    def close(self) -> None:
        """End the answer where it is."""
        if not self.done:
            self._on_stop()
            self._end(FinishReason.ABORTED)

    def reply(self) -> Reply:
        """The answer as far as it came; EngineError when the generation failed or goes on."""
        if self.finish_reason is None:
            raise EngineError("There is no reply: the generation failed or has not ended.")
        return Reply(
            text="".join(self._pieces),
            finish_reason=self.finish_reason,
            usage=Usage(
                prompt_tokens=len(self.request.prompt),
                completion_tokens=self._completion_tokens,
                prompt_tokens_dropped=self._dropped.tokens,
                dropped_messages=self._dropped.messages,
            ),
            timings=self.timings,
            adapter=self.adapter,
            logprobs=tuple(self._logprobs),
        )

    @property
    def timings(self) -> Timings:
        started = self._completion_tokens > 0
        return Timings(
            first_token=self._first - self._submitted if started else 0.0,
            decode=self._last - self._first if started else 0.0,
            completion_tokens=self._completion_tokens,
        )

    def record(self, model: str) -> RequestRecord:
        """What observers learn of this request."""
        return RequestRecord(
            request_id=self.request.request_id,
            model=model,
            adapter=self.adapter,
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.request.prompt),
            completion_tokens=self._completion_tokens,
            first_token=self.timings.first_token,
            decode=self.timings.decode,
        )

    def _take(self, event: TokenEvent) -> str:
        assert event.token_id is not None
        self._last = event.time
        if self._completion_tokens == 0:
            self._first, self.prompt_logprobs = event.time, event.prompt_logprobs
        self._completion_tokens += 1
        if event.finish is FinishReason.STOP:  # the end-of-turn token is no text
            return ""
        if event.logprob is not None:
            self._unsent.append(self._logprob(event.token_id, event.logprob, event.top))
        return self._text.push(event.token_id)

    def _logprob(
        self, token_id: int, logprob: float, top: tuple[tuple[int, float], ...]
    ) -> TokenLogprob:
        decode = self._tokenizer.decode
        return TokenLogprob(
            decode([token_id]), logprob, tuple((decode([other]), value) for other, value in top)
        )

    def _delta(self, text: str) -> Delta | None:
        if not text and not (self.done and self._unsent):
            return None
        delta = Delta(text, tuple(self._unsent))
        self._pieces.append(text)
        self._logprobs += self._unsent
        self._unsent = []
        return delta

    def _end(self, reason: FinishReason | None) -> None:
        self.done = True
        self.finish_reason = reason
        self._on_finish(self)
