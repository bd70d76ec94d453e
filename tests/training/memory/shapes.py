"""Shapes of the Llama-2 models, without files."""

from qlorachat.training.memory.shape import ModelShape

VOCABULARY = 32000


def llama(hidden: int, intermediate: int, layers: int, heads: int) -> ModelShape:
    """A Llama-2 in 16 bit."""
    linear: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        for name in "qkvo":
            linear[f"model.layers.{layer}.self_attn.{name}_proj"] = (hidden, hidden)
        for name in ("gate", "up"):
            linear[f"model.layers.{layer}.mlp.{name}_proj"] = (intermediate, hidden)
        linear[f"model.layers.{layer}.mlp.down_proj"] = (hidden, intermediate)
    linear |= {"lm_head": (VOCABULARY, hidden), "model.embed_tokens": (hidden, VOCABULARY)}
    norms = (2 * layers + 1) * hidden
    return ModelShape(
        hidden_size=hidden,
        intermediate_size=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_size=128,
        vocab_size=VOCABULARY,
        linear=linear,
        quantized=frozenset(),
        base_bytes=2 * (sum(out * inside for out, inside in linear.values()) + norms),
    )


LLAMA_7B = llama(4096, 11008, 32, 32)
LLAMA_13B = llama(5120, 13824, 40, 40)
