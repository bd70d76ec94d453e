"""A 4-bit linear layer with LoRA as one step of autograd, where PEFT takes a dozen.

y = x W^T + s (x A^T) B^T. Forward and backward each add the low-rank part inside a matrix product,
so that no output is copied, scaled or summed in a pass of its own; W is dequantized in each and
kept by none. A and B are float32 and take part in the dtype of x.
"""

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch.nn.functional import linear


class LoraLinear4bit(PeftLinear4bit):
    """PEFT's layer with its forward pass replaced where it is the plain formula above."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., in) -> (..., out); PEFT's own way with dropout, DoRA, or without gradients."""
        (name, *others) = self.active_adapters
        if others or args or kwargs or not self._is_plain(name):
            output: torch.Tensor = super().forward(x, *args, **kwargs)
            return output
        base: Linear4bit = self.get_base_layer()
        dtype = torch.get_autocast_dtype(x.device.type)
        product: torch.Tensor = _LoraProduct.apply(
            x.to(dtype),
            base.weight,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )
        return product if base.bias is None else product + base.bias.to(dtype)

    def _is_plain(self, name: str) -> bool:
        return (
            torch.is_grad_enabled()
            and torch.is_autocast_enabled(self.get_base_layer().weight.device.type)
            and not self.disable_adapters
            and not self.merged
            and name in self.lora_A
            and name not in self.lora_variant
            and isinstance(self.lora_dropout[name], torch.nn.Identity)
        )


class _LoraProduct(torch.autograd.Function):
    """See the module; W is a bitsandbytes weight (out, in), A (rank, in), B (out, rank)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Any,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.flatten(0, -2)
            low = linear(rows, a.to(x.dtype))  # (rows, rank)
            output = linear(rows, _dequantized(weight, x.dtype))
            output.addmm_(low, b.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(rows, low, a, b)
        ctx.weight, ctx.scale = weight, scale
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low, a, b = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            gradient = gradients[0].flatten(0, -2).to(rows.dtype)
            into_low = gradient @ (b * ctx.scale).to(rows.dtype)  # (rows, rank)
            for_a = (into_low.T @ rows).to(a.dtype)
            for_b = (gradient.T @ low).to(b.dtype) * ctx.scale
            for_x = None
            if ctx.needs_input_grad[0]:
                for_x = gradient @ _dequantized(ctx.weight, rows.dtype)
                for_x.addmm_(into_low, a.to(rows.dtype))
                for_x = for_x.view(*gradients[0].shape[:-1], rows.shape[-1])
        return for_x, None, for_a, for_b, None


def _dequantized(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    """A bitsandbytes 4-bit weight (out, in) written out."""
    dense: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return dense.to(dtype)
