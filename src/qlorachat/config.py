"""What an engine is opened with: frozen, checked once; the declaration behind flags and files."""

from dataclasses import fields, replace
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlorachat.errors import ConfigError, suggest
from qlorachat.tokens import SamplingParams

T = TypeVar("T", bound=BaseModel)

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

QuantizationChoice = Literal["auto", "nf4", "16bit"]
BackendChoice = Literal["auto", "paged", "transformers"]
CacheChoice = Literal["auto", "int8"]
Overflow = Literal["error", "drop_oldest_turns"]
Tags = Literal["refuse", "allow"]


class BaseModelConfig(BaseModel):
    """Which base model, and how it is loaded, to serve or to train."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(
        None, description="base model, a folder or a hub repository; default: the demo model"
    )
    revision: str | None = Field(None, description="branch, tag or commit of the hub repository")
    offline: bool = Field(False, description="never ask the hub; use what is on disk")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    quantization: QuantizationChoice = Field(
        "auto",
        description="auto: as the checkpoint asks, else nf4; nf4: every linear layer in NF4 with "
        "double quantization; 16bit: none",
    )


class EngineConfig(BaseModelConfig):
    """How an engine is opened; every field is a flag, an environment variable and a file key."""

    model: str | None = Field(
        None,
        description="base model, a folder or a hub repository; default: the one that the first "
        "adapter names, else the demo model",
    )
    adapters: dict[str, str] = Field(
        default_factory=dict, description="adapter name -> folder or hub repository"
    )
    backend: BackendChoice = Field(
        "auto",
        description="paged: many requests and adapters at once, Llama family; transformers: any "
        "architecture, one request at a time; auto: paged wherever it can serve",
    )
    memory: str | None = Field(
        None, description="what the engine may take, such as 12GiB or 0.8; default: nearly all"
    )
    kv_cache: CacheChoice = Field(
        "auto",
        description="keys and values; auto: in the model's 16 bit; int8: in 8, nearly twice as "
        "many tokens in the same memory, answers about as exact",
    )
    max_sequences: int = Field(64, ge=1, le=128, description="requests that run at once")
    max_adapters: int = Field(8, ge=1, le=64, description="adapters on the device at once")
    template: str | None = Field(None, description="prompt format; default: the checkpoint's own")
    system: str | None = Field(None, description="system prompt for dialogs that bring none")
    overflow: Overflow = Field(
        "error", description="what to do with a dialog longer than the context"
    )
    tags: Tags = Field(
        "refuse", description="messages that hold the format's control text, such as [INST]"
    )
    max_queue: int = Field(64, ge=1, description="requests that may wait; one more is refused")

    # Defaults of a request, in place of the checkpoint's own; ranges as in SamplingParams
    temperature: float | None = Field(None, description="0: always the likeliest token")
    top_p: float | None = Field(None, description="only the likeliest tokens up to this share")
    top_k: int | None = Field(None, description="only this many of the likeliest tokens")
    min_p: float | None = Field(None, description="only tokens this likely beside the likeliest")
    repetition_penalty: float | None = Field(None, description="above 1: repeat less")
    max_tokens: int | None = Field(None, description="the longest answer, in tokens")
    seed: int | None = Field(None, description="the same seed gives the same answer")

    def sampling(self, checkpoint: SamplingParams) -> SamplingParams:
        """The checkpoint's defaults with what is set here in their place."""
        ours = {field.name: getattr(self, field.name, None) for field in fields(SamplingParams)}
        return replace(checkpoint, **{name: v for name, v in ours.items() if v is not None})


def check(model: type[T], values: dict[str, Any]) -> T:
    """`model(**values)`, or a ConfigError of one line that names the key, nearest name included."""
    try:
        return model(**values)
    except ValidationError as error:
        raise ConfigError(explain(error, model)) from None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first of pydantic's findings as one line in our words."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"There is no option `{key}`{suggest(key, model.model_fields)}"
    return f"The option `{key}` is {first['input']!r}: {first['msg']}."
