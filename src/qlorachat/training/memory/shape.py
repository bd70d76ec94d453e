"""What of a base model decides the memory of its training: known from its files, no weight read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from qlorachat.checkpoints import Checkpoint, linear_shapes
from qlorachat.checkpoints.architecture import build_skeleton, read_config
from qlorachat.checkpoints.memory import NF4_BYTES
from qlorachat.checkpoints.quantization import estimate_memory, plan_quantization
from qlorachat.config import QuantizationChoice


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder of Llama's kind: its sizes, and which of its linear layers are in 4 bit."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab_size: int
    linear: Mapping[str, tuple[int, int]]  # see linear_shapes
    quantized: frozenset[str]  # of those
    base_bytes: int  # of all weights, as loaded

    @classmethod
    def of(cls, checkpoint: Checkpoint, quantization: QuantizationChoice) -> Self:
        """The shape of a checkpoint as it will be loaded. Raises ModelError."""
        skeleton = build_skeleton(read_config(checkpoint))
        config = skeleton.config.get_text_config()
        linear = linear_shapes(checkpoint)
        plan = plan_quantization(checkpoint, skeleton, quantization)
        stored = "quantization_config" in checkpoint.config
        heads = config.num_attention_heads
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
            linear=linear,
            quantized=frozenset(filter(_is_in_layer, linear)) if stored else plan.quantized,
            base_bytes=estimate_memory(checkpoint, quantization),
        )

    def in_nf4(self) -> Self:
        """The same model with every linear layer but the output's in NF4."""
        chosen = frozenset(filter(_is_in_layer, self.linear))
        weights = sum(self._weights(name) for name in chosen - self.quantized)
        return replace(
            self, quantized=chosen, base_bytes=round(self.base_bytes - weights * (2 - NF4_BYTES))
        )

    def targets(self, names: Sequence[str] | None) -> list[tuple[int, int]]:
        """(out, in) of the modules that get an adapter: so named, or all in the layers."""
        if names is None:
            return [shape for name, shape in self.linear.items() if _is_in_layer(name)]
        return [shape for name, shape in self.linear.items() if name.rpartition(".")[2] in names]

    @property
    def largest_quantized(self) -> int:
        """Weights of the largest 4-bit layer; 0 where there is none."""
        return max(map(self._weights, self.quantized), default=0)

    def _weights(self, name: str) -> int:
        outputs, inputs = self.linear[name]
        return outputs * inputs


def _is_in_layer(module: str) -> bool:
    return any(part.isdecimal() for part in module.split("."))
