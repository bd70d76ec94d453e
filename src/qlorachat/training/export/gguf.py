"""A 16-bit Llama checkpoint as one GGUF file, bit for bit; what cannot be exact is refused.

Source of names and values: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs, and
the tables of the gguf package.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
)
from safetensors import safe_open
from transformers import PreTrainedConfig

from qlorachat.checkpoints import Checkpoint
from qlorachat.checkpoints.architecture import read_config
from qlorachat.checkpoints.checkpoint import weight_files
from qlorachat.durable import UNFINISHED, sync
from qlorachat.errors import ConfigError
from qlorachat.training.export.gguf_vocabulary import Vocabulary, read_vocabulary

_Header = tuple[str, tuple[int, ...]]  # transformers' name and the shape


def check_gguf(checkpoint: Checkpoint) -> Vocabulary:
    """The vocabulary to write; reads no weight.

    ConfigError for a model that GGUF's Llama or our knowledge of tokenizers has no place for.
    """
    config = read_config(checkpoint)
    if reason := next(_obstacles(config), None):
        raise ConfigError(
            f"`{checkpoint.name}` cannot be written as GGUF: {reason}. Leave --gguf out and use "
            "llama.cpp's own converter on the merged folder.",
            param="gguf",
        )
    return read_vocabulary(checkpoint.folder, size=config.vocab_size)


def _obstacles(config: PreTrainedConfig) -> Iterator[str]:
    if config.model_type != "llama":
        yield f"its model_type is {config.model_type!r}, not 'llama'"
        return
    if config.hidden_act != "silu":
        yield f"its hidden_act is {config.hidden_act!r}, not 'silu'"
    if config.attention_bias or config.mlp_bias:
        yield "its linear layers have biases"
    if (kind := config.rope_parameters["rope_type"]) != "default":
        yield f"its rotary embedding is scaled ({kind})"


def write_gguf(checkpoint: Checkpoint, file: Path) -> None:
    """Write a bfloat16 checkpoint to `file`: matrices in BF16, norms in F32.

    The file takes its name when it is complete. Raises ConfigError as `check_gguf`, and OSError.
    """
    vocabulary = check_gguf(checkpoint)
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{file.name}{UNFINISHED}", dir=file.parent) as folder:
        temporary = Path(folder) / file.name
        _write(checkpoint, vocabulary, temporary, name=file.stem)
        sync(temporary)
        temporary.replace(file)
    sync(file.parent)


def _write(checkpoint: Checkpoint, vocabulary: Vocabulary, file: Path, *, name: str) -> None:
    config = read_config(checkpoint)
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[MODEL_ARCH.LLAMA])
    try:
        writer.add_type("model")
        writer.add_name(name)
        _add_shape(writer, config)
        vocabulary.add_to(writer)
        _add_headers(writer, checkpoint, config)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight in _weights(checkpoint, config):
            writer.write_tensor_data(weight)
    finally:
        writer.close()


def _add_shape(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _add_headers(writer: GGUFWriter, checkpoint: Checkpoint, config: PreTrainedConfig) -> None:
    """Each tensor's name, shape and type, in the order of `_weights`."""
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for theirs, shape in _headers(checkpoint):
        kind = GGMLQuantizationType.F32 if len(shape) == 1 else GGMLQuantizationType.BF16
        dtype = np.dtype(np.float32 if len(shape) == 1 else np.uint16)
        size = int(np.prod(shape)) * dtype.itemsize
        ours = names.get_name(theirs, try_suffixes=(".weight",))
        assert ours is not None, theirs
        writer.add_tensor_info(ours, shape, dtype, size, raw_dtype=kind)


def _headers(checkpoint: Checkpoint) -> Iterator[_Header]:
    for file in weight_files(checkpoint.folder):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tuple(tensors.get_slice(name).get_shape())


def _weights(checkpoint: Checkpoint, config: PreTrainedConfig) -> Iterator[npt.NDArray[np.generic]]:
    """Norms in float32, matrices as the bits of bfloat16; one tensor in memory at a time."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for file in weight_files(checkpoint.folder):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                weight: torch.Tensor = tensors.get_tensor(name)
                assert weight.dtype == torch.bfloat16, name
                if (part := name.split(".")[-2]) in heads:
                    weight = _permute(weight, heads[part])
                yield (weight.float() if weight.dim() == 1 else weight.view(torch.uint16)).numpy()


def _permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows from transformers' rotary halves to llama.cpp's interleaved order; shape unchanged."""
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)
