"""A LoRA adapter as the backends take it: every number checked, every name a plain one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qlorachat.adapters.card import AdapterCard
from qlorachat.adapters.config import AdapterConfig
from qlorachat.adapters.targets import TargetRules
from qlorachat.adapters.weights import WeightsHeader

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoraSettings:
    """How the tensors act; modules are concrete names of the base model, patterns are resolved."""

    rank: int  # of modules that rank_pattern does not name
    alpha: float  # of modules that alpha_pattern does not name
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    target_modules: tuple[str, ...]
    rank_pattern: Mapping[str, int]  # module -> rank, exact names
    alpha_pattern: Mapping[str, float]  # module -> alpha, exact names
    modules_to_save: tuple[str, ...]
    base_model_name_or_path: str | None
    revision: str | None
    bias: str = "none"

    @classmethod
    def resolve(
        cls, config: AdapterConfig, rules: TargetRules, header: WeightsHeader
    ) -> "LoraSettings":
        """The settings of the modules that the file has weights for."""
        modules = tuple(sorted(header.lora))
        ranks = {module: rules.rank_of(module) for module in modules}
        alphas = {module: rules.alpha_of(module) for module in modules}
        return cls(
            rank=config.r,
            alpha=config.lora_alpha,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            fan_in_fan_out=config.fan_in_fan_out,
            target_modules=modules,
            rank_pattern=_others_than(config.r, ranks),
            alpha_pattern=_others_than(config.lora_alpha, alphas),
            modules_to_save=tuple(sorted({weight.module for weight in header.saved})),
            base_model_name_or_path=config.base_model_name_or_path or None,
            revision=config.revision or None,
        )

    def scale_of(self, module: str) -> float:
        """The factor of B A x: alpha / rank, with rsLoRA alpha / sqrt(rank) (arXiv:2312.03732)."""
        rank = self.rank_pattern.get(module, self.rank)
        alpha = self.alpha_pattern.get(module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def peft_config(self) -> dict[str, Any]:
        """Arguments of peft.LoraConfig that give the same adapter, free of patterns and code."""
        return {
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "fan_in_fan_out": self.fan_in_fan_out,
            "bias": self.bias,
            "target_modules": list(self.target_modules),
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "modules_to_save": list(self.modules_to_save) or None,
        }


def _others_than(default: float, values: dict[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType({module: it for module, it in values.items() if it != default})


@dataclass(frozen=True, eq=False)
class Adapter:
    """A checked adapter: what a backend needs, and nothing that it would have to check again."""

    path: Path
    sha256: str  # of the settings that act and the tensors; not of the folder's name
    settings: LoraSettings
    peft_config: dict[str, Any]  # for peft.LoraConfig
    tensors: Mapping[str, "torch.Tensor"]  # PEFT's key -> tensor on the CPU, as in the file
    card: AdapterCard | None
    warnings: tuple[str, ...]  # one line each

    @property
    def largest_rank(self) -> int:
        """Of any module."""
        return max([self.settings.rank, *self.settings.rank_pattern.values()])

    def matrices(self, module: str) -> "tuple[torch.Tensor, torch.Tensor] | None":
        """A (rank, in) and B (out, rank) of a base module; None where the adapter has none."""
        prefix = f"base_model.model.{module}"
        if f"{prefix}.lora_A.weight" not in self.tensors:
            return None
        return self.tensors[f"{prefix}.lora_A.weight"], self.tensors[f"{prefix}.lora_B.weight"]

    @property
    def exclusive(self) -> bool:
        """DoRA and modules_to_save change more than a sum: one at a time, by transformers only."""
        return self.settings.use_dora or bool(self.settings.modules_to_save)
