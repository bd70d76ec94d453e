"""What keeps an adapter from being served, by its config and header and the base it is to join."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import eq
from pathlib import Path
from typing import Literal

from qlorachat.adapters.card import AdapterCard
from qlorachat.adapters.config import AdapterConfig
from qlorachat.adapters.folder import CARD, CONFIG, first_five, plain
from qlorachat.adapters.targets import TargetRules, is_saved_by
from qlorachat.adapters.weights import PREFIX, Weight, WeightsHeader

Shapes = Mapping[str, tuple[int, int]]  # module -> (out_features, in_features)


@dataclass(frozen=True)
class Finding:
    """One thing about an adapter that its user must know; an error keeps it from being served."""

    level: Literal["error", "warning"]
    message: str  # one line: which file, what is wrong, what was expected, what to do


@dataclass(frozen=True)
class HeaderCheck:
    """The config against the header, and both against the base model; no shapes, no base."""

    config: AdapterConfig
    rules: TargetRules
    header: WeightsHeader
    shapes: Shapes

    def findings(self) -> Iterator[Finding]:
        """All that is wrong, the most telling first; AdapterError for a pattern that is wrong."""
        yield from self._keys()
        yield from self._lora_shapes()
        yield from self._base_model()
        yield from self._saved_modules()

    def _keys(self) -> Iterator[Finding]:
        yield from self._error(
            "trains a LoRA on an embedding, which is not supported",
            (it.key for it in self.header.weights if it.part.startswith("lora_embedding")),
            "train it on linear layers, as with target_modules='all-linear'",
        )
        yield from self._error(
            "has unexpected keys",
            (it.key for it in self.header.weights if self._is_unexpected(it)),
            f"expected {PREFIX}MODULE.lora_A.weight and .lora_B.weight as PEFT saves them, and "
            "what adapter_config.json names besides",
        )
        if not self.header.lora:
            yield Finding("error", f"{self.header.path} holds no LoRA: save the adapter again.")
        yield from self._error(
            "lacks keys",
            self._missing_parts(),
            "expected lora_A and lora_B, and a magnitude with DoRA, of each module: save it again",
        )
        yield from self._error(
            "has a LoRA on modules that adapter_config.json does not target",
            (module for module in self.header.lora if not self.rules.is_target(module)),
            f"expected those of target_modules, {plain(repr(self.config.target_modules))}",
        )
        if self.header.copies:
            modules = first_five(it.module for it in self.header.copies)
            yield Finding(
                "warning",
                f"{self.header.path} repeats the base model's weights of {modules}, which are not "
                "used: the base model's own are.",
            )

    def _is_unexpected(self, weight: Weight) -> bool:
        if weight.part in ("weight", "bias"):
            entries = self.config.modules_to_save or []
            return not any(is_saved_by(entry, weight.module) for entry in entries)
        is_magnitude = weight.part.startswith("lora_magnitude")
        return not weight.part or (is_magnitude and not self.config.use_dora)

    def _missing_parts(self) -> Iterator[str]:
        names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
        if self.config.use_dora:
            names["lora_magnitude_vector"] = "lora_magnitude_vector"
        for module, parts in self.header.lora.items():
            yield from (f"{PREFIX}{module}.{names[it]}" for it in names if it not in parts)

    def _lora_shapes(self) -> Iterator[Finding]:
        yield from self._error(
            "has a lora_A and lora_B that do not fit together",
            (self._shapes_of(module) for module in self._pairs() if not self._fits_itself(module)),
            "expected [rank, in] and [out, rank]: save the adapter again",
        )
        yield from self._error(
            "has another rank than adapter_config.json says",
            self._wrong_ranks(),
            "expected the config that was saved with these tensors",
        )

    def _pairs(self) -> list[str]:
        return [
            module for module, it in self.header.lora.items() if {"lora_A", "lora_B"} <= it.keys()
        ]

    def _fits_itself(self, module: str) -> bool:
        parts = self.header.lora[module]
        a, b = parts["lora_A"].shape, parts["lora_B"].shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
            return False
        magnitude = parts.get("lora_magnitude_vector")
        return magnitude is None or magnitude.shape == b[:1]

    def _shapes_of(self, module: str) -> str:
        parts = self.header.lora[module]
        return f"{module} ({', '.join(f'{name} {list(it.shape)}' for name, it in parts.items())})"

    def _wrong_ranks(self) -> Iterator[str]:
        for module in filter(self._fits_itself, self._pairs()):
            found = self.header.lora[module]["lora_A"].shape[0]
            expected = self.rules.rank_of(module)
            if found != expected:
                yield f"{module} ({found}, not {expected})"

    def _base_model(self) -> Iterator[Finding]:
        if not self.shapes:
            yield from self._unmatched_targets()
            return
        yield from self._error(
            "has a LoRA on modules that the base model does not have",
            (module for module in self.header.lora if module not in self.shapes),
            "it was made for another base model: serve it with that one",
        )
        yield from self._error(
            "has shapes of another base model",
            self._misfits(),
            "serve it with the base model that it was trained on",
        )
        yield from self._error(
            "lacks the LoRA of modules that adapter_config.json targets",
            self._missing_modules(),
            "expected all of the base model's modules of these names: save the adapter again",
        )

    def _unmatched_targets(self) -> Iterator[Finding]:
        targets = self.config.target_modules
        found = [f".{module}" for module in self.header.lora]
        unmatched = [
            target
            for target in (targets if isinstance(targets, list) else [])
            if not any(module.endswith(f".{target}") for module in found)
        ]
        if unmatched:
            yield Finding(
                "warning",
                f"{self.header.path} has no LoRA on {first_five(unmatched)}, which "
                "adapter_config.json targets: an error if the base model has such modules.",
            )

    def _misfits(self) -> Iterator[str]:
        for module in filter(self._fits_itself, self._pairs()):
            parts = self.header.lora[module]
            found = parts["lora_B"].shape[0], parts["lora_A"].shape[1]
            expected = self.shapes.get(module, found)
            if found != expected:
                yield f"{module} ({_arrow(found)}, not {_arrow(expected)})"

    def _missing_modules(self) -> Iterator[str]:
        if self.config.target_modules is not None:
            absent = (module for module in self.shapes if module not in self.header.lora)
            yield from filter(self.rules.is_target, absent)

    def _saved_modules(self) -> Iterator[Finding]:
        modules = [weight.module for weight in self.header.saved]
        entries = self.config.modules_to_save or []
        yield from self._error(
            "lacks the weights of modules_to_save",
            (it for it in entries if not any(is_saved_by(it, module) for module in modules)),
            "expected whole weights by these names: save the adapter again",
        )
        yield from self._error(
            "has saved modules in shapes of another base model",
            self._saved_misfits(),
            "serve it with the base model that it was trained on, of the same vocabulary",
        )

    def _saved_misfits(self) -> Iterator[str]:
        for weight in self.header.saved:
            base = self.shapes.get(weight.module)
            if base is None:
                continue
            # embeddings and GPT-2's Conv1D keep their weight as (in, out)
            fitting = (base, base[::-1]) if weight.part == "weight" else (base[:1],)
            if weight.shape not in fitting:
                expected = max(fitting, key=lambda it: sum(map(eq, it, weight.shape)))
                yield f"{weight.module}.{weight.part} ({list(weight.shape)}, not {list(expected)})"

    def _error(self, what: str, items: Iterable[str], advice: str) -> Iterator[Finding]:
        known = list(items)
        if known:
            message = f"{self.header.path} {what}: {first_five(known)}; {advice}."
            yield Finding("error", message)


def base_findings(
    folder: Path, config: AdapterConfig, card: AdapterCard | None, base_name: str | None
) -> Iterator[Finding]:
    """A warning for each file that names another base model; only the last part of names counts."""
    named = [(CONFIG, config.base_model_name_or_path), (CARD, card.base_model if card else None)]
    for file, name in named:
        if name and base_name and _short_name(name) != _short_name(base_name):
            yield Finding(
                "warning",
                f"{folder / file} names the base model {plain(name)}, but {plain(base_name)} is "
                "served: answers are right only if they are the same model.",
            )


def _short_name(name: str) -> str:
    """`Org/Name`, a path that ends in Name and the hub's cache folder of it are one model."""
    parts = [part for part in re.split(r"[\\/]", name) if part]
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    return (cached or parts or [name])[-1].lower()


def _arrow(shape: tuple[int, int]) -> str:
    return f"{shape[1]} -> {shape[0]}"
