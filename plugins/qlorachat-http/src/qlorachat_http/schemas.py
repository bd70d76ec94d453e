"""What a request may say; numbers are numbers, and a misspelt field is an error."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from qlorachat_http.errors import ApiError

MAX_CHOICES = 8  # answers of one request: n, times the prompts of a completion

MAX_OTHER_FIELDS = 64  # that mean nothing here; each is held against the known ones

# Fields of OpenAI's API that are refused, with the values that ask for nothing
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "web_search_options": (None,),
}

# Fields that are passed to the engine under the same name
_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "adapter_scale",
)


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _joined(content: object) -> object:
    """The text of a message given in parts."""
    if not isinstance(content, list):
        return content
    texts = [part["text"] for part in content if _is_text(part)]
    if len(texts) < len(content):
        raise ApiError(
            400,
            "A message's content is text, or a list of parts `{type: text, text: ...}`; images, "
            "audio and files are not supported.",
            code="unsupported_parameter",
            param="messages",
        )
    return "".join(texts)


def _is_text(part: object) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _system(role: object) -> object:
    return "system" if role == "developer" else role


Text = Annotated[str, StringConstraints(min_length=1)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Body(BaseModel):
    """Strict: no text for numbers, no booleans for counts, no NaN; null is as good as absent."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class ChatMessage(Body):
    """One turn; further fields such as `name` mean nothing here."""

    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(_system)]
    content: Annotated[str, BeforeValidator(_joined)]


class StreamOptions(Body):
    """What a stream carries beside the answer."""

    include_usage: bool | None = None


class AdapterChoice(Body):
    """An adapter by name, as llama.cpp's `lora` has it."""

    name: Name | None = None
    id: Name | None = None
    scale: float | None = None


class GenerationBody(Body):
    """What chat and text completions have in common."""

    model: Name
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Annotated[list[StopString] | None, BeforeValidator(_listed)] = Field(None, max_length=4)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    adapter_scale: float | None = None
    drop_oldest_turns: bool | None = None
    lora: list[AdapterChoice] | None = Field(None, max_length=1)

    @model_validator(mode="after")
    def _check_other_fields(self) -> "GenerationBody":
        others = self.model_extra or {}
        for name in UNSUPPORTED.keys() & others.keys():
            if others[name] not in UNSUPPORTED[name]:
                message = f"The parameter `{name}` is not supported."
                raise ApiError(400, message, code="unsupported_parameter", param=name)
        if len(others) > MAX_OTHER_FIELDS:
            message = f"There are more than {MAX_OTHER_FIELDS} parameters unknown here."
            raise ApiError(400, message, code="unknown_parameter")
        for name in others:
            if close := difflib.get_close_matches(name[:64], type(self).model_fields, 1, 0.88):
                raise _misspelt(name[:64], close[0])
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def options(self) -> dict[str, Any]:
        """The engine's options, without the adapter; raises ApiError for what is no token id."""
        options = {name: getattr(self, name) for name in _SAME_NAME}
        options["max_tokens"] = self.max_tokens
        options["logit_bias"] = self.logit_bias and {
            _token_id(key): bias for key, bias in self.logit_bias.items()
        }
        if self.lora and self.lora[0].scale is not None:
            options["adapter_scale"] = self.lora[0].scale
        if self.drop_oldest_turns is not None:
            options["overflow"] = "drop_oldest_turns" if self.drop_oldest_turns else "error"
        return {name: value for name, value in options.items() if value is not None}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def options(self) -> dict[str, Any]:
        """As above, with chat's own words for length and log-probabilities."""
        options = super().options()
        if self.max_completion_tokens is not None:
            options["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        elif self.top_logprobs:
            message = "`top_logprobs` needs `logprobs: true`."
            raise ApiError(400, message, code="invalid_value", param="top_logprobs")
        return options


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[list[Text], BeforeValidator(_listed)] = Field(min_length=1)
    logprobs: int | None = Field(None, ge=0, le=20)

    def options(self) -> dict[str, Any]:
        """As above, with the number of log-probabilities."""
        options = super().options()
        if self.logprobs is not None:
            options["logprobs"] = self.logprobs
        if self.choices * len(self.prompt) > MAX_CHOICES:
            message = f"n times the number of prompts may be {MAX_CHOICES} at most."
            raise ApiError(400, message, code="invalid_value", param="n")
        return options


class LoadAdapterBody(Body):
    """POST /v1/load_lora_adapter."""

    lora_name: Name
    lora_path: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    load_inplace: bool | None = None


class UnloadAdapterBody(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: Name


def _misspelt(name: str, meant: str) -> ApiError:
    shown = name.encode(errors="replace").decode()
    message = f"There is no parameter `{shown}`; did you mean `{meant}`?"
    return ApiError(400, message, code="unknown_parameter", param=shown)


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        message = "`logit_bias` maps token ids, as strings, to numbers."
        raise ApiError(400, message, code="invalid_value", param="logit_bias")
    return int(key)
