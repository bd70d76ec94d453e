"""An NF4 layer on our own kernels: few rows are multiplied as the weights are, many written out."""

from collections.abc import Sequence

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.nn import functional

from qlorachat.kernels import nf4
from qlorachat.kernels.card import why_not_products
from qlorachat.kernels.nf4_matmul import MOST_ROWS, nf4_matmul
from qlorachat.kernels.nf4_write_out import MOST_RANKS, LoraMatrices, nf4_write_out


def why_not(parts: Sequence[Linear4bit]) -> str | None:
    """Why layers that read one input stay with bitsandbytes' kernels; None: they need not."""
    states: list[QuantState] = [part.weight.quant_state for part in parts]
    if reason := why_not_products(parts[0].weight.device):
        return reason
    if any(state.quant_type != "nf4" or state.blocksize != 64 for state in states):
        return "the weights are not in NF4 with blocks of 64"
    if not all(state.nested and state.state2.blocksize == 256 for state in states):
        return "the weights have no double quantization"
    if any(state.shape[1] % 64 or state.shape[0] % 16 for state in states):
        return "a weight's sides are no multiples of 16 and 64"
    if (dtype := parts[0].compute_dtype) != torch.bfloat16:
        return f"it computes in {dtype}, not in bfloat16"
    return None


class Nf4Linear(nn.Module):
    """Outputs of the parts side by side; their bytes, double quantization included, are kept."""

    def __init__(self, parts: Sequence[Linear4bit], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias: torch.Tensor | None = bias.data if bias is not None else None
        quantized = [(part.weight.data, part.weight.quant_state) for part in parts]
        self.weight = nf4.stack(quantized, parts[0].compute_dtype)

    def takes_in(self, lora: LoraMatrices, rows: int) -> bool:
        """Whether an adapter that all rows have is best written out with the weight."""
        return rows > MOST_ROWS and lora.ranks <= MOST_RANKS

    def forward(self, x: torch.Tensor, lora: LoraMatrices | None = None) -> torch.Tensor:
        """(rows, columns) -> (rows, heights). lora: of all rows, where `takes_in` says so."""
        if len(x) > MOST_ROWS:
            return functional.linear(x, nf4_write_out(self.weight, lora), self.bias)
        assert lora is None
        y = nf4_matmul(x, self.weight)
        return y if self.bias is None else y + self.bias
