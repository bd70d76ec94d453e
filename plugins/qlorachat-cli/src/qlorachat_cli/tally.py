"""What the answers of this run cost, and the lines that say so."""

from dataclasses import dataclass, replace

from qlorachat import FinishReason, ModelInfo, Reply
from qlorachat_cli.texts import Texts


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts over every answer since the start."""

    answers: int = 0
    tokens: int = 0
    decode: float = 0.0  # seconds from the first to the last token, over all answers
    last: Reply | None = None

    def after(self, reply: Reply) -> "Tally":
        """With one more answer."""
        return replace(
            self,
            answers=self.answers + 1,
            tokens=self.tokens + reply.usage.completion_tokens,
            decode=self.decode + reply.timings.decode,
            last=reply,
        )

    @property
    def tokens_per_second(self) -> float:
        """The mean decode rate: each answer's first token is not counted, nor the wait for it."""
        return (self.tokens - self.answers) / self.decode if self.decode > 0 else 0.0


def speed_lines(reply: Reply, info: ModelInfo, texts: Texts) -> str:
    """Tokens, seconds, rate and cause; then whether the answer was cut or the dialog shortened."""
    usage, timings = reply.usage, reply.timings
    speed = texts["speed"].format(
        tokens=usage.completion_tokens,
        seconds=timings.first_token + timings.decode,
        rate=timings.tokens_per_second,
        reason=texts[reply.finish_reason],
    )
    lines = [speed]
    if reply.finish_reason is FinishReason.LENGTH:
        lines.append(_cut(usage.prompt_tokens, usage.completion_tokens, info, texts))
    if usage.dropped_messages:
        lines.append(texts["dropped"].format(count=len(usage.dropped_messages)))
    return "\n".join(lines)


def describe_model(key: str, info: ModelInfo, texts: Texts) -> str:
    """The line `key` about the model: its name, device, quantization and memory."""
    return texts[key].format(
        model=info.name,
        device=info.device,
        quantization=f" · {info.quantization}" if info.quantization else "",
        memory=f"{info.memory_bytes / 2**20:.0f} MiB",
    )


def tally_lines(tally: Tally, info: ModelInfo, adapter: str | None, texts: Texts) -> str:
    """What /stats shows."""
    lines = [
        describe_model("stats.model", info, texts),
        texts["stats.adapter"].format(name=adapter or texts["base"]),
    ]
    if tally.last:
        lines += _answer_lines(tally, tally.last, info, texts)
    return "\n".join(lines)


def _answer_lines(tally: Tally, last: Reply, info: ModelInfo, texts: Texts) -> list[str]:
    usage, timings = last.usage, last.timings
    return [
        texts["stats.context"].format(
            used=usage.prompt_tokens + usage.completion_tokens, context=info.context_length
        ),
        texts["stats.answers"].format(
            answers=tally.answers, tokens=tally.tokens, rate=tally.tokens_per_second
        ),
        texts["stats.last"].format(
            tokens=usage.completion_tokens,
            first=timings.first_token,
            rate=timings.tokens_per_second,
        ),
    ]


def _cut(prompt_tokens: int, tokens: int, info: ModelInfo, texts: Texts) -> str:
    if prompt_tokens + tokens >= info.context_length:
        return texts["full"].format(context=info.context_length)
    return texts["cut"].format(tokens=tokens, more=2 * tokens)
