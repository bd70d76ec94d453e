"""Linear layers that read the same input become one layer; the bytes move, nothing is rounded."""

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise, gemv_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from qlorachat.errors import ModelError
from qlorachat.model.nf4_linear import Nf4Linear, why_not


def fuse(parts: Sequence[nn.Module]) -> nn.Module:
    """One layer whose outputs are the parts' outputs side by side; the parts are used up.

    NF4 stays NF4, byte by byte where our own kernels run (`nf4_linear.why_not`). Elsewhere, since
    under double quantization every weight has an absmax offset of its own and a bitsandbytes call
    takes one, the weight carries its absmax in float32 from here on: exactly the values that were
    decoded before, in 0.047 bytes a parameter more. A single part changes likewise: where
    bitsandbytes falls back to cuBLAS it would decode the absmax in every call.
    """
    if all(isinstance(part, Linear4bit) for part in parts):
        if why_not(parts) is not None:
            return _fuse_nf4(parts)
        layer = Nf4Linear(parts, _fused_bias(parts))
        _use_up(parts)
        return layer.eval()
    if any(isinstance(part, Linear4bit) for part in parts):
        raise ModelError(
            "The model has layers in 4 and in 16 bit that read the same input, which the fast "
            "engine can't serve; start with --backend transformers (in code, "
            "backend='transformers')."
        )
    return _fuse_dense(parts)


def _fuse_dense(parts: Sequence[nn.Module]) -> nn.Module:
    if len(parts) == 1:
        return parts[0]
    weight = torch.cat([_weight(part) for part in parts])
    fused = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    fused.weight = nn.Parameter(weight, requires_grad=False)
    fused.register_parameter("bias", _fused_bias(parts))
    _use_up(parts)
    return fused.eval()


def _fuse_nf4(parts: Sequence[nn.Module]) -> nn.Module:
    states = [_state(part) for part in parts]
    first = states[0]
    rows = sum(state.shape[0] for state in states)
    columns = first.shape[1]
    assert all(state.shape[0] * columns % state.blocksize == 0 for state in states)
    state = QuantState(
        absmax=torch.cat([_float_absmax(state) for state in states]),
        shape=torch.Size((rows, columns)),
        code=first.code,
        blocksize=first.blocksize,
        quant_type=first.quant_type,
        dtype=first.dtype,
    )
    packed = torch.cat([_weight(part).view(-1, 1) for part in parts])
    fused = Linear4bit(
        columns, rows, bias=False, compute_dtype=first.dtype, quant_type="nf4", device="meta"
    )
    fused.weight = Params4bit(
        packed, quant_state=state, quant_type="nf4", bnb_quantized=True, module=fused
    )
    fused.quant_state = state
    fused.register_parameter("bias", _fused_bias(parts))
    _use_up(parts)
    done: nn.Module = fused.eval()
    return done


class PackedLinear(nn.Module):
    """An NF4 layer in the layout of bitsandbytes' CPU kernel, called without detours."""

    def __init__(self, layer: Linear4bit) -> None:
        super().__init__()
        self.bias = layer.bias
        self._weight, self._state = layer.weight.data, layer.weight.quant_state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = gemv_4bit(x, self._weight, state=self._state)
        return y if self.bias is None else y + self.bias


def pack(layer: nn.Module) -> nn.Module:
    """The layer ready to run: on a CPU with AVX512-BF16, bitsandbytes repacks it in its first
    forward pass, which is done here; elsewhere it stays as it is."""
    if not isinstance(layer, Linear4bit) or layer.weight.device.type != "cpu":
        return layer
    with torch.inference_mode():
        layer(torch.zeros(1, layer.in_features, dtype=layer.compute_dtype))
    packed = getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    return PackedLinear(layer) if packed else layer


def _weight(part: nn.Module) -> torch.Tensor:
    weight = part.weight
    assert isinstance(weight, torch.Tensor)
    return weight.data


def _state(part: Any) -> QuantState:
    state: QuantState = part.weight.quant_state
    assert not getattr(state, "packing_format_for_cpu", False), "fuse before the first forward"
    return state


def _float_absmax(state: QuantState) -> torch.Tensor:
    """The float32 absmax of each block of a weight, as bitsandbytes decodes it."""
    absmax: torch.Tensor = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return absmax


def _fused_bias(parts: Sequence[Any]) -> nn.Parameter | None:
    if all(part.bias is None for part in parts):
        return None
    return nn.Parameter(torch.cat([part.bias.data for part in parts]), requires_grad=False)


def _use_up(parts: Sequence[Any]) -> None:
    """No second copy stays in memory."""
    for part in parts:
        part.weight = None
