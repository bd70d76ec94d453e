"""A transformers model with PEFT adapters attached, un-merged; not thread-safe, as PEFT isn't."""

from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from qlorachat.adapters import Adapter
from qlorachat.errors import AdapterError, EngineError, OutOfMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AdaptedModel:
    """The base model, with any number of adapters of which at most one is active."""

    def __init__(self, base: "PreTrainedModel") -> None:
        self._base = base
        self._peft: PeftModel | None = None  # from the first adapter on
        self._attached: set[str] = set()

    @property
    def config(self) -> Any:
        """The transformers config of the base."""
        return self._base.config

    @property
    def device(self) -> torch.device:
        device: torch.device = self._base.device
        return device

    def attach(self, adapter: Adapter) -> None:
        """Put an adapter's weights beside the base's; it is known by its content hash."""
        name = adapter.sha256
        if name in self._attached:
            return
        try:
            wrong = self._add(adapter)
            if wrong:
                raise AdapterError(
                    f"{adapter.path}: PEFT misses or does not expect these tensors: "
                    f"{', '.join(wrong[:5])}."
                )
        except torch.OutOfMemoryError:
            self._remove(name)
            torch.cuda.empty_cache()
            raise OutOfMemory(
                f"{adapter.path}: there is no memory left for this adapter."
            ) from None
        except BaseException:
            self._remove(name)
            raise
        self._attached.add(name)

    def detach(self, sha256: str) -> None:
        """Free an adapter's weights; one that is not attached is ignored."""
        if self._peft is None or sha256 not in self._attached:
            return
        self._attached.remove(sha256)
        self._remove(sha256)

    def _add(self, adapter: Adapter) -> list[str]:
        """With the names of tensors that it lacks or has too many."""
        name = adapter.sha256
        config = LoraConfig(**adapter.peft_config, inference_mode=True)
        if self._peft is None:
            self._peft = PeftModel(self._base, config, adapter_name=name)
        else:
            self._peft.add_adapter(name, config)
        result = set_peft_model_state_dict(self._peft, dict(adapter.tensors), adapter_name=name)
        missing = [key for key in result.missing_keys if f".{name}." in key]
        return [*missing, *result.unexpected_keys]

    def _remove(self, name: str) -> None:
        """Also what an `_add` that failed has left."""
        if self._peft is not None and name in self._peft.peft_config:
            self._peft.delete_adapter(name)
        for module in self._base.modules():
            if isinstance(module, LoraLayer):
                module.delete_adapter(name)

    def activate(self, sha256: str | None, scale: float) -> None:
        """Make one adapter, at `scale` times its trained strength, or the bare base answer."""
        if sha256 is None:
            if self._peft is not None:
                self._peft.base_model.disable_adapter_layers()
            return
        if self._peft is None or sha256 not in self._attached:
            raise EngineError(f"The adapter {sha256[:12]} is not loaded.")
        self._peft.base_model.enable_adapter_layers()
        self._peft.set_adapter(sha256, inference_mode=True)
        for module in self._peft.modules():
            if isinstance(module, LoraLayer) and sha256 in module.scaling:
                module.set_scale(sha256, scale)

    def logits(self, ids: torch.Tensor, cache: Any, *, every: bool = False) -> torch.Tensor:
        """Logits of new ids of shape (1, tokens): of the last position, (1, vocabulary), or of
        `every` one, (tokens, vocabulary)."""
        keep = 0 if every else 1  # transformers keeps all for 0
        output = self._base(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=keep)
        logits: torch.Tensor = output.logits[0]
        return logits
