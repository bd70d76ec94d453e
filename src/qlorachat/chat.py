"""ChatEngine: dialogs in, answers out; everything between people's text and the engine's tokens."""

import itertools
import logging
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from types import TracebackType
from typing import Any, Self, Unpack

from qlorachat.adapters import Adapter, base_model_of, read_adapter
from qlorachat.config import (
    DEMO_MODEL,
    EngineConfig,
    Tags,
    check,
)
from qlorachat.errors import (
    AdapterError,
    ConfigError,
    DialogError,
    UnknownName,
)
from qlorachat.generation import NOTHING_DROPPED, Dropped, Generation
from qlorachat.loaded_adapter import LoadedAdapter, check_adapter_name, differences
from qlorachat.messages import Message, Reply, Score, parse_messages
from qlorachat.options import (
    ChatOptions,
    EngineOptions,
    adapter_scale,
    check_options,
    request_sampling,
    stop_strings,
)
from qlorachat.overflow import drop_oldest_turns, fit_context
from qlorachat.plugins import PluginHost, create_manager
from qlorachat.protocols import Backend, ModelInfo, Template
from qlorachat.streams import AsyncChatStream, ChatStream, CompareStream, Sink
from qlorachat.templates import Prompt, TemplateChoice, build_prompt, check_template_name
from qlorachat.tokens import SamplingParams, TokenEvent, TokenRequest

log = logging.getLogger(__name__)

Dialog = str | Prompt | Iterable[Message | Mapping[str, object]]


class ChatEngine:
    """One base model and its adapters, for any number of threads and async callers.

    Closed once nothing refers to it or to a stream of it any more.

    >>> with ChatEngine("smollm2") as engine:  # doctest: +SKIP
    ...     print(engine.chat("What is the capital of France?").text)
    """

    def __init__(
        self,
        model: str | Path | EngineConfig | None = None,
        *,
        plugins: PluginHost | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        """Load `model` (a folder, a hub repository or an EngineConfig) and its adapters.

        Without a model: the base that the first adapter names, else the demo model. Raises
        ModelError, AdapterError or ConfigError; nothing stays loaded then.
        """
        self.plugins = plugins or create_manager()
        self.config = _resolve(_config(model, options), self.plugins)
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._adapters: dict[str, LoadedAdapter] = {}
        self._content_locks: dict[str, threading.Lock] = {}  # by content hash
        check_template_name(self.config.template, self.plugins.templates())
        self.config.sampling(SamplingParams())  # a wrong number is said before the model loads
        self._backend = self.plugins.open_backend(self.config)
        try:
            sampling = self.config.sampling(self._backend.info.sampling)
            self._info = replace(self._backend.info, sampling=sampling)
            self._choice = TemplateChoice(
                self.plugins.templates(),
                model_name=self.info.name,
                chat_template=self.info.chat_template,
                tokenizer=self._backend.tokenizer,
            )
            for name, folder in self.config.adapters.items():
                self._attach(name, Path(folder), replace=False)
        except BaseException:
            self._backend.close()
            raise
        self._when_dropped = weakref.finalize(self, _close_apart, self._backend)
        self._when_dropped.atexit = False

    def chat(self, messages: Dialog, **options: Unpack[ChatOptions]) -> Reply:
        """The whole answer to a dialog, a question or a rendered prompt."""
        with self.stream(messages, **options) as stream:
            for _ in stream:
                pass
            return stream.reply

    def stream(self, messages: Dialog, **options: Unpack[ChatOptions]) -> ChatStream:
        """The answer as it comes; raises here, before any delta, what is wrong with the request."""
        return ChatStream(lambda sink: self._start(messages, options, sink))

    def astream(self, messages: Dialog, **options: Unpack[ChatOptions]) -> AsyncChatStream:
        """As `stream`, for `async for`; nothing blocks the event loop."""
        return AsyncChatStream(lambda sink: self._start(messages, options, sink))

    def compare(
        self,
        messages: Dialog,
        *,
        adapters: Sequence[str | None],
        **options: Unpack[ChatOptions],
    ) -> CompareStream:
        """Every adapter's answer (None: the base's) as they come, of one batch where there is one.

        Iterate for (adapter, delta); `replies` has the whole answers by adapter.
        """
        dialog = _parse(messages)
        starts = {
            name: partial(self._start, dialog, ChatOptions(**{**options, "adapter": name}))
            for name in adapters
        }
        return CompareStream(starts)

    def score(self, prompt: str | Prompt, *, adapter: str | None = None) -> Score:
        """How likely the model finds a text, token by token; a string is taken without a format."""
        text = self.raw(prompt) if isinstance(prompt, str) else prompt
        sampling = replace(self.info.sampling, temperature=0.0, max_tokens=1)
        fit_context(sampling, len(text.ids), self.info.context_length, asked=True)
        events: SimpleQueue[TokenEvent] = SimpleQueue()
        generation = None
        while generation is None:
            loaded = self._adapter(adapter)
            generation = self._submit(text, sampling, loaded, {}, events.put, scored=True)
        while not generation.done:
            generation.feed(events.get())
        decode = self._backend.tokenizer.decode
        return Score(
            tokens=tuple(decode([token]) for token in text.ids),
            logprobs=generation.prompt_logprobs,
        )

    def render(
        self,
        messages: str | Iterable[Message | Mapping[str, object]],
        *,
        adapter: str | None = None,
        tags: Tags | None = None,
    ) -> Prompt:
        """The prompt that a dialog becomes: its text and its token ids."""
        loaded = self._adapter(adapter)
        dialog = self._with_system(parse_messages(messages), loaded)
        return self._render(dialog, self._template(loaded), tags or self.config.tags)

    def raw(self, text: str) -> Prompt:
        """Plain text as a prompt without any chat format, for completion."""
        tokenizer = self._backend.tokenizer
        ids, _ = tokenizer.encode(text)
        start = [tokenizer.control_tokens[tokenizer.bos_token or ""]] if tokenizer.adds_bos else []
        if not start and not ids:
            raise DialogError("The prompt is empty: there is nothing to complete.", param="prompt")
        return Prompt(text, (*start, *ids), (False,) * (len(start) + len(ids)))

    def load_adapter(self, name: str, reference: str | Path, *, replace: bool = False) -> None:
        """Bring, check and attach an adapter while others stream; `replace` allows a taken name."""
        if name in self._adapters and not replace:
            raise AdapterError(f"The adapter name `{name}` is in use; pass replace=True.")
        folder = self.plugins.locate_adapter(str(reference), offline=self.config.offline)
        self._attach(name, folder, replace=replace)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that use it end first."""
        with self._lock:
            if name not in self._adapters:
                raise UnknownName("adapter", name, self._adapters)
            loaded = self._adapters.pop(name)
        self._release(loaded)

    @property
    def adapters(self) -> dict[str, LoadedAdapter]:
        """The loaded adapters by name."""
        with self._lock:
            return dict(self._adapters)

    @property
    def info(self) -> ModelInfo:
        """The base model: its name, context length, defaults, device and memory."""
        return self._info

    @property
    def alive(self) -> bool:
        """False once the engine is closed or its thread has died."""
        return self._backend.alive

    def close(self) -> None:
        """End every request and free the memory; twice is fine."""
        self._when_dropped.detach()
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    # From a request to its generation

    def _start(self, messages: Dialog, options: ChatOptions, sink: Sink) -> Generation:
        check_options(options)
        wanted = request_sampling(self.info.sampling, options)
        dialog = _parse(messages)
        generation = None
        while generation is None:  # where an adapter is replaced meanwhile, its successor answers
            loaded = self._adapter(options.get("adapter"))
            prompt, dropped = self._prompt(dialog, loaded, options)
            sampling = fit_context(
                wanted, len(prompt.ids), self.info.context_length, asked="max_tokens" in options
            )
            generation = self._submit(prompt, sampling, loaded, options, sink, dropped)
        return generation

    def _submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        loaded: LoadedAdapter | None,
        options: ChatOptions,
        sink: Sink,
        dropped: Dropped = NOTHING_DROPPED,
        scored: bool = False,
    ) -> Generation | None:
        """None if the adapter is not the loaded one of its name any more."""
        self._check_ids(prompt, sampling)
        request = TokenRequest(
            request_id=next(self._ids),
            prompt=tuple(prompt.ids),
            sampling=sampling,
            stop_ids=self.info.stop_ids,
            adapter=loaded.adapter.sha256 if loaded else None,
            adapter_scale=adapter_scale(options),
            prompt_logprobs=scored,
        )
        generation = Generation(
            request,
            self._backend.tokenizer,
            submitted=perf_counter(),
            stop=stop_strings(options),
            dropped=dropped,
            adapter=loaded.name if loaded else None,
            on_stop=lambda: self._backend.abort(request.request_id),
            on_finish=lambda ended: self.plugins.request_finished(ended.record(self.info.name)),
        )
        with self._lock:
            if loaded is None or self._adapters.get(loaded.name) is loaded:
                self._backend.submit(request, sink)
                return generation
        return None

    def _check_ids(self, prompt: Prompt, sampling: SamplingParams) -> None:
        """An id that the model does not have would end the engine, not the request."""
        size = self.info.vocab_size
        if not prompt.ids:
            raise DialogError("The prompt is empty.", param="prompt")
        if wrong := [token for token in prompt.ids if not 0 <= token < size]:
            raise DialogError(
                f"The prompt has the token id {wrong[0]}; the model's are 0 to {size - 1}.",
                param="prompt",
            )
        sampling.check_vocabulary(size)

    def _prompt(
        self,
        dialog: Prompt | Sequence[Message],
        loaded: LoadedAdapter | None,
        options: ChatOptions,
    ) -> tuple[Prompt, Dropped]:
        if isinstance(dialog, Prompt):
            return dialog, NOTHING_DROPPED
        template = self._template(loaded)
        tags = options.get("tags", self.config.tags)

        def render(dialog: Sequence[Message]) -> Prompt:
            return self._render(self._with_system(dialog, loaded), template, tags)

        prompt = render(dialog)
        if options.get("overflow", self.config.overflow) == "drop_oldest_turns":
            # unasked, an answer may be as long as the default, in a quarter of the context
            usual = min(self.info.sampling.max_tokens, self.info.context_length // 4)
            room = self.info.context_length - options.get("max_tokens", usual)
            return drop_oldest_turns(dialog, prompt, render, room)
        return prompt, NOTHING_DROPPED

    def _render(self, dialog: Sequence[Message], template: Template, tags: Tags) -> Prompt:
        return build_prompt(template, dialog, self._backend.tokenizer, tags=tags)

    def _with_system(
        self, dialog: Sequence[Message], loaded: LoadedAdapter | None
    ) -> Sequence[Message]:
        system = self.config.system
        if system is None and loaded:
            system = loaded.system
        if system is None or any(message.role == "system" for message in dialog):
            return dialog
        return (Message("system", system), *dialog)

    def _template(self, loaded: LoadedAdapter | None) -> Template:
        return self._choice.choose(self.config.template, loaded.template if loaded else None)

    def _adapter(self, name: str | None) -> LoadedAdapter | None:
        if name is None:
            return None
        with self._lock:
            if name not in self._adapters:
                raise UnknownName("adapter", name, self._adapters)
            return self._adapters[name]

    # Adapters and opening

    def _attach(self, name: str, folder: Path, *, replace: bool) -> None:
        check_adapter_name(name)
        shapes = self.info.shapes or None  # a backend that can't tell is not held against any
        adapter = read_adapter(folder, shapes=shapes, base_name=self.info.name)
        check_template_name(
            adapter.card.template if adapter.card else None, self.plugins.templates()
        )
        for warning in (*adapter.warnings, *differences(adapter, self.info, self.config)):
            log.warning("adapter %s: %s", name, warning)
        loaded = LoadedAdapter(name, adapter)
        with self._changing(adapter):
            self._backend.load_adapter(adapter)
            with self._lock:
                old = self._adapters.get(name)
                refused = old is not None and not replace
                if not refused:
                    self._adapters[name] = loaded
        if refused:
            self._release(loaded)
            raise AdapterError(f"The adapter name `{name}` is in use.")
        if old is not None:
            self._release(old)

    def _release(self, loaded: LoadedAdapter) -> None:
        """Detach weights that no name refers to any more."""
        sha256 = loaded.adapter.sha256
        with self._changing(loaded.adapter):
            with self._lock:
                used = any(other.adapter.sha256 == sha256 for other in self._adapters.values())
            if not used:
                self._backend.unload_adapter(sha256)

    def _changing(self, adapter: Adapter) -> threading.Lock:
        """To be held by who loads or unloads these weights: who loads them again waits until they
        are gone, and requests for other adapters never."""
        with self._lock:
            return self._content_locks.setdefault(adapter.sha256, threading.Lock())


def _close_apart(backend: Backend) -> None:
    """Whichever thread this is, it may be the backend's own, or hold its lock."""
    threading.Thread(target=backend.close, name="qlorachat-close", daemon=True).start()


def _parse(messages: Dialog) -> Prompt | tuple[Message, ...]:
    return messages if isinstance(messages, Prompt) else parse_messages(messages)


def _resolve(config: EngineConfig, plugins: PluginHost) -> EngineConfig:
    """The config with every adapter brought to a local folder, and the base model settled."""
    for name in config.adapters:
        check_adapter_name(name)
    folders = {
        name: str(plugins.locate_adapter(reference, offline=config.offline))
        for name, reference in config.adapters.items()
    }
    model, revision = config.model, config.revision
    if model is None and folders:
        model, named_revision = base_model_of(Path(next(iter(folders.values()))))
        revision = revision or named_revision
    if model is None:
        model = DEMO_MODEL
    return config.model_copy(update={"adapters": folders, "model": model, "revision": revision})


def _config(model: str | Path | EngineConfig | None, options: EngineOptions) -> EngineConfig:
    if isinstance(model, EngineConfig):
        if options:
            raise ConfigError("Pass an EngineConfig or single options, not both.")
        return model
    values: dict[str, Any] = {**options, "model": None if model is None else str(model)}
    adapters: object = options.get("adapters", {})
    if not isinstance(adapters, Mapping):
        raise ConfigError(f"adapters maps names to folders, not {adapters!r}.", param="adapters")
    values["adapters"] = {name: str(path) for name, path in adapters.items()}
    return check(EngineConfig, values)
