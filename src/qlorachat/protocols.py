"""The plugs: what a frontend, a backend, a prompt format and a tokenizer must offer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import BaseModel

from qlorachat.messages import Message
from qlorachat.tokens import SamplingParams, TokenEvent, TokenRequest

if TYPE_CHECKING:
    from qlorachat.adapters import Adapter
    from qlorachat.chat import ChatEngine

O = TypeVar("O", bound=BaseModel, contravariant=True)  # noqa: E741  a frontend's options model


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered prompt.

    `control` pieces are one control token by its name (`<s>`, `<|im_end|>`); all others are plain
    text, in which a control token's name means nothing. `trained` pieces are what a model learns
    to say: the answers and the token that ends them. Text behind a control token that begins with
    a `first` piece is encoded as the start of a text.
    """

    text: str
    control: bool = False
    trained: bool = False
    first: bool = False


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a backend says of the model it serves."""

    name: str
    context_length: int  # tokens, prompt and answer together
    vocab_size: int
    stop_ids: frozenset[int]  # tokens that end an answer
    sampling: SamplingParams = field(default_factory=SamplingParams)  # the checkpoint's defaults
    chat_template: str | None = None  # the checkpoint's own Jinja source
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    # linear module -> (out_features, in_features): what an adapter can be attached to
    device: str = "cpu"
    dtype: str = ""
    quantization: str = ""
    memory_bytes: int = 0  # weights on the device


class Tokenizer(Protocol):
    """Text to ids and back. Text is always plain text: no control token comes out of `encode`."""

    @property
    def bos_token(self) -> str | None: ...
    @property
    def eos_token(self) -> str | None: ...
    @property
    def pad_token(self) -> str | None: ...
    @property
    def unk_token(self) -> str | None: ...
    @property
    def adds_bos(self) -> bool:
        """Whether plain text starts with the BOS token for this model."""
        ...

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Every control token by name."""
        ...

    def encode(
        self, text: str, *, after: str | None = None, before: str | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of plain text, and for each the (start, end) characters it covers.

        after, before: the control tokens beside it, some of which take blanks of the text. After
        none it is the start of a text, before which some vocabularies put a space.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole answer: control tokens left out, nothing cleaned up.

        Bytes that are no UTF-8 become U+FFFD, as in `bytes.decode(errors="replace")`, and leave
        their neighbours whole: more ids only ever add text, or complete a last U+FFFD.
        """
        ...


class Template(Protocol):
    """A prompt format. `render` raises DialogError for a dialog that it has no place for."""

    name: str
    summary: str
    reserved: Sequence[str]  # plain text that the format reads as control; refused in messages
    models: Sequence[str]  # fnmatch patterns of base models whose card documents this format

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        """The dialog as segments.

        With `add_generation_prompt` it ends with a user turn and the model is to answer; without,
        it ends with the assistant's turn and is complete, as training sees it.
        """
        ...


class Frontend(Protocol[O]):
    """A way for people to reach an engine: registered as an instance by a plugin.

    `options` is a pydantic model: the one declaration behind the frontend's flags, its table in
    the config file, its environment variables and its --help.
    """

    name: str  # the word after --frontend
    summary: str
    options: type[Any]

    def prepare(self, options: O) -> None:
        """Before the model loads: bind the port, refuse what can't work."""
        ...

    def serve(self, engine: "ChatEngine", options: O, stop: Event) -> None:
        """Serve until `stop` is set. The host owns the engine and the signals; `chat` calls this
        on the main thread, `serve` on a thread for each frontend."""
        ...


class Backend(Protocol):
    """Where tokens are made: the narrow waist. Methods may be called from any thread."""

    @property
    def info(self) -> ModelInfo: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def alive(self) -> bool:
        """False once the loop has died or `close` was called."""
        ...

    def submit(self, request: TokenRequest, sink: Callable[[TokenEvent], None]) -> None:
        """Queue a request; `sink` must never block and gets every event of it, in order.

        Raises QueueFull or EngineError; nothing is sent to the sink then.
        """
        ...

    def abort(self, request_id: int) -> None:
        """End a request within one token; unknown and finished ids are ignored."""
        ...

    def load_adapter(self, adapter: "Adapter") -> None:
        """Attach a checked adapter, known from then on by its content hash; blocks until done."""
        ...

    def unload_adapter(self, sha256: str) -> None:
        """Detach; requests that use it end first. Blocks until done."""
        ...

    def close(self) -> None:
        """End every request with an error, stop the thread, free the memory; twice is fine."""
        ...
