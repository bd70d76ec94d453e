"""From a configuration to a model that is ready to serve; the common beginning of our backends."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlorachat.adapters import check_header
from qlorachat.checkpoints import linear_shapes, load_model, locate, read_tokenizer
from qlorachat.config import EngineConfig
from qlorachat.protocols import ModelInfo, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A loaded model, its tokenizer, and what a backend says of it."""

    model: "PreTrainedModel"
    tokenizer: Tokenizer
    info: ModelInfo


def open_model(config: EngineConfig) -> OpenedModel:
    """Bring, check and load; adapter folders are held against the base's shapes first."""
    assert config.model is not None, "ChatEngine settles the base model"
    checkpoint = locate(config.model, revision=config.revision, offline=config.offline)
    shapes = linear_shapes(checkpoint)
    for folder in config.adapters.values():
        check_header(Path(folder), shapes=shapes, base_name=checkpoint.name)
    tokenizer = read_tokenizer(checkpoint.folder)
    if not (stop_ids := checkpoint.end_tokens(tokenizer)):
        log.warning(
            "%s names no end token: its answers run to max_tokens; put eos_token_id into its "
            "config.json",
            checkpoint.name,
        )
    loaded = load_model(checkpoint, device=config.device, quantization=config.quantization)
    info = ModelInfo(
        name=checkpoint.name,
        context_length=checkpoint.context_length,
        vocab_size=loaded.model.get_input_embeddings().weight.shape[0],
        stop_ids=stop_ids,
        sampling=checkpoint.generation,
        chat_template=checkpoint.chat_template,
        shapes=shapes,
        device=loaded.device,
        dtype=loaded.dtype,
        quantization=loaded.quantization,
        memory_bytes=loaded.memory_bytes,
    )
    return OpenedModel(loaded.model, tokenizer, info)
