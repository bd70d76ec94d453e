"""What one pass of training takes while it runs, in bytes: all that grows with its tokens.

The counts are of what autograd saves in a Llama layer of transformers 5.24 with PEFT 0.21 under
16-bit autocast; attention is SDPA, whose scores are never written out.
"""

from dataclasses import dataclass

from qlorachat.training.config import TrainConfig
from qlorachat.training.loss import CHUNK
from qlorachat.training.memory.shape import ModelShape

_HALF, _FLOAT = 2, 4  # bytes

# float32: the log-probabilities, their gradient and the logits' gradient
_LOGIT = 3 * _FLOAT

# of the MLP's width, in 16 bit: what a layer's backward pass holds beside what was saved
_BACKWARD_TENSORS = 6


def checkpoints_layers(config: TrainConfig, device_type: str) -> bool:
    """Whether layers are computed twice; on a card they are, where nothing else was asked for."""
    asked = config.gradient_checkpointing
    return device_type != "cpu" if asked is None else asked


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward and backward pass over `rows` rows of `tokens` tokens each."""

    shape: ModelShape
    config: TrainConfig
    rows: int
    tokens: int
    device_type: str

    @property
    def stored(self) -> int:
        """Kept from the forward pass on: each layer's input, or all that its backward needs."""
        if checkpoints_layers(self.config, self.device_type):
            return self.shape.layers * self._all_tokens * self.shape.hidden_size * _HALF
        return self.shape.layers * self._saved_in_layer()

    @property
    def one_layer(self) -> int:
        """While one layer's backward pass runs: its gradients, and all of it if computed again."""
        width = self.shape.intermediate_size * _HALF
        working = _BACKWARD_TENSORS * width * self._all_tokens + self._weights()
        if checkpoints_layers(self.config, self.device_type):
            return working + self._saved_in_layer()
        return working

    @property
    def logits(self) -> int:
        """Of one chunk, when every token is an answer's."""
        return min(CHUNK, self._all_tokens) * self.shape.vocab_size * _LOGIT

    @property
    def is_plain(self) -> bool:
        """Whether our own layer of LoRA runs rather than PEFT's, which keeps more."""
        config = self.config
        return bool(self.shape.quantized) and not config.dropout and not config.dora

    @property
    def _all_tokens(self) -> int:
        return self.rows * self.tokens

    def _saved_in_layer(self) -> int:
        shape = self.shape
        # under a mask SDPA gets each key and value once for every head that reads it
        keys = shape.heads if self.config.packing else shape.kv_heads
        norms = 2 * _FLOAT * shape.hidden_size
        attention = 2 * _HALF * (shape.heads + keys) * shape.head_size + _FLOAT * shape.heads
        mlp = 3 * _HALF * shape.intermediate_size
        mask = _HALF * self.tokens if self.config.packing else 0
        return self._all_tokens * (norms + attention + mlp + mask + self._saved_by_lora())

    def _saved_by_lora(self) -> int:
        """Bytes a token in the adapters of one layer."""
        targets = self.shape.targets(self.config.targets)
        inputs, outputs = (sum(sizes) // self.shape.layers for sizes in _columns(targets))
        ranks = self.config.rank * len(targets) // self.shape.layers
        shared = min(inputs, 2 * self.shape.hidden_size + self.shape.intermediate_size)
        if self.is_plain:
            return _HALF * (shared + ranks)
        # PEFT makes 32-bit copies of inputs on a CPU and beside unquantized layers, one a module
        copies = self.device_type == "cpu" or not self.shape.quantized
        kept = _HALF * (inputs if copies or self.config.dropout else shared)
        mask = (_FLOAT if self.device_type == "cpu" else 1) * inputs if self.config.dropout else 0
        magnitudes = (1 if copies else 2) * _FLOAT * outputs if self.config.dora else 0
        return kept + mask + magnitudes + _HALF * ranks

    def _weights(self) -> int:
        """The largest weight that is written out; with DoRA its products and an identity too."""
        if not self.config.dora:
            return _HALF * self.shape.largest_quantized
        targets = self.shape.targets(self.config.targets)
        return max(4 * _HALF * out * inside + _FLOAT * inside**2 for out, inside in targets)


def _columns(targets: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """(ins, outs)"""
    return [inside for _, inside in targets], [out for out, _ in targets]
