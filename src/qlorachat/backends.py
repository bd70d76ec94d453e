"""Which of our two backends serves a configuration: the fast one wherever it can."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qlorachat.adapters import Adapter, read_adapter
from qlorachat.checkpoints import locate
from qlorachat.checkpoints.architecture import read_config
from qlorachat.config import EngineConfig
from qlorachat.engine.backend import PagedBackend, unservable
from qlorachat.errors import ConfigError
from qlorachat.model import unsupported
from qlorachat.opening import open_model
from qlorachat.protocols import Backend
from qlorachat.reference import TransformersBackend

log = logging.getLogger(__name__)


def open_backend(config: EngineConfig) -> Backend:
    """Load the model into the backend that the config names or that fits.

    What only transformers can serve is said in one line; ConfigError when `paged` was asked for.
    """
    if config.backend == "transformers":
        return _open_transformers(config)
    adapters = {name: read_adapter(Path(folder)) for name, folder in config.adapters.items()}
    if reason := next(_obstacles(config, adapters), None):
        if config.backend == "paged":
            raise ConfigError(f"The paged backend can't serve this: {reason}.", param="backend")
        log.info("served by transformers, one request at a time: %s", reason)
        return _open_transformers(config)
    return _open_paged(config, [adapter.largest_rank for adapter in adapters.values()])


def _obstacles(config: EngineConfig, adapters: Mapping[str, Adapter]) -> Iterator[str]:
    assert config.model is not None, "ChatEngine settles the base model"
    checkpoint = locate(
        config.model, revision=config.revision, offline=config.offline, weights=False
    )
    if reason := unsupported(read_config(checkpoint)):
        yield f"{checkpoint.name}: {reason}"
    for name, adapter in adapters.items():
        if reason := unservable(adapter):
            yield f"adapter {name}: {reason}"


def _open_transformers(config: EngineConfig) -> TransformersBackend:
    if config.kv_cache != "auto":
        raise ConfigError(
            "transformers keeps keys and values in the model's dtype: leave kv_cache at auto, or "
            "use the paged backend.",
            param="kv_cache",
        )
    if config.memory is not None:
        raise ConfigError(
            "transformers takes the memory that it needs: leave memory out, or use the paged "
            "backend.",
            param="memory",
        )
    return TransformersBackend(open_model(config), max_queue=config.max_queue)


def _open_paged(config: EngineConfig, ranks: Sequence[int]) -> PagedBackend:
    """`ranks` are the adapters' largest: memory is set aside for them."""
    return PagedBackend(
        open_model(config),
        max_queue=config.max_queue,
        max_sequences=config.max_sequences,
        max_adapters=config.max_adapters,
        adapters_expected=min(len(ranks), config.max_adapters),
        adapter_rank=max(ranks, default=16),
        memory=config.memory,
        kv_cache=config.kv_cache,
    )
