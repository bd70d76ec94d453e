"""The model that trains: a frozen 4-bit base with float32 LoRA weights on its linear layers."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn

from qlorachat.adapters import LoraSettings, read_adapter
from qlorachat.checkpoints import (
    Checkpoint,
    LoadedModel,
    keep_as_quantized,
    linear_shapes,
    load_model,
)
from qlorachat.errors import ConfigError, ModelError
from qlorachat.training.config import TrainConfig
from qlorachat.training.fused import fuse_layers
from qlorachat.training.lora_linear import LoraLinear4bit
from qlorachat.training.loss import answer_loss
from qlorachat.training.memory.activations import checkpoints_layers

log = logging.getLogger(__name__)

# what some architectures do to their logits, which the loss does not know of
_CHANGED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class TrainedModel:
    """A PEFT model over a frozen base; what a forward pass means in training stands here."""

    def __init__(self, peft: PeftModel, dtype: torch.dtype) -> None:
        self.peft = peft
        self.dtype = dtype  # of matrix products
        base = peft.get_base_model()
        self._base = base
        self._decoder: nn.Module = base.get_decoder()
        self._head: nn.Module = base.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        device: torch.device = self._base.device
        return device

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name, in a fixed order."""
        return {name: p for name, p in self.peft.named_parameters() if p.requires_grad}

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The summed loss of a batch (see batches.collate), float32; gradients flow from it."""
        with self.computing():
            hidden = self._decoder(
                input_ids=batch["input_ids"].to(self.device),
                position_ids=batch["position_ids"].to(self.device),
                use_cache=False,
            ).last_hidden_state
            return answer_loss(self._head, hidden, batch["labels"])

    def computing(self) -> AbstractContextManager[object]:
        """Matrix products in 16 bit although the adapter's weights are float32."""
        return torch.autocast(self.device.type, self.dtype)

    @contextmanager
    def inference(self, *, adapter: bool = True) -> Iterator[nn.Module]:
        """The transformers model to generate with, or its bare base; training goes on as it was.

        Random numbers drawn inside are not missed outside.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        self.peft.eval()
        try:
            with torch.random.fork_rng(devices), torch.no_grad(), self.computing():
                if adapter:
                    yield self._base
                else:
                    with self.peft.disable_adapter():
                        yield self._base
        finally:
            self.peft.train()


def load_base(checkpoint: Checkpoint, config: TrainConfig) -> LoadedModel:
    """The frozen base, with its bytes kept as quantized: packed, gradients would be wrong."""
    loaded = load_model(checkpoint, device=config.device, quantization=config.quantization)
    keep_as_quantized(loaded.model)
    fuse_layers(loaded.model)
    for name in _CHANGED_LOGITS:
        if getattr(loaded.model.config, name, None) not in (None, 1, 1.0):
            raise ModelError(
                f"`{checkpoint.name}` changes its logits ({name}), which training does not know: "
                "take a Llama-style model."
            )
    return loaded


def attach_adapter(
    loaded: LoadedModel, checkpoint: Checkpoint, config: TrainConfig, init_adapter: Path | None
) -> TrainedModel:
    """New LoRA weights by the config, or those in the folder `init_adapter`, ready to train."""
    torch.manual_seed(config.seed)
    if init_adapter is None:
        peft = _with_lora(loaded, checkpoint, _lora_config(checkpoint, config))
    else:
        peft = _continued(loaded, checkpoint, config, init_adapter)
    if checkpoints_layers(config, loaded.model.device.type):
        # re-entrant checkpointing finds no gradient behind a frozen embedding
        loaded.model.activation_checkpointing_enable({"use_reentrant": False})
    peft.train()
    return TrainedModel(peft, getattr(torch, loaded.dtype))


def _with_lora(loaded: LoadedModel, checkpoint: Checkpoint, settings: LoraConfig) -> PeftModel:
    settings._register_custom_module({Linear4bit: LoraLinear4bit})
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5 for an attribute that is deprecated there
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        peft = get_peft_model(loaded.model, settings)
    # PEFT has put the folder's path there, which means nothing on another machine
    settings.base_model_name_or_path = checkpoint.name
    settings.revision = checkpoint.revision
    return peft


def _lora_config(checkpoint: Checkpoint, config: TrainConfig) -> LoraConfig:
    shapes = linear_shapes(checkpoint)
    names = {module.rpartition(".")[2] for module in shapes} - {"embed_tokens"}
    if unknown := [target for target in config.targets or () if target not in names]:
        raise ConfigError(
            f"`{checkpoint.name}` has no linear layer named {unknown[0]}: choose among "
            f"{', '.join(sorted(names))}.",
            param="targets",
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets or "all-linear",
        use_rslora=config.rslora,
        use_dora=config.dora,
    )


def _continued(
    loaded: LoadedModel, checkpoint: Checkpoint, config: TrainConfig, folder: Path
) -> PeftModel:
    adapter = read_adapter(folder, shapes=linear_shapes(checkpoint), base_name=checkpoint.name)
    for warning in adapter.warnings:
        log.warning("%s", warning)
    _refuse_other_settings(adapter.settings, config, folder)
    settings = LoraConfig(**adapter.peft_config, lora_dropout=config.dropout)
    peft = _with_lora(loaded, checkpoint, settings)
    for parameter in peft.parameters():  # modules_to_save are copies in the base's 16 bit
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    set_peft_model_state_dict(peft, dict(adapter.tensors))
    return peft


def _refuse_other_settings(settings: LoraSettings, config: TrainConfig, folder: Path) -> None:
    """ConfigError for a setting that was asked for and is not the initial adapter's."""
    theirs = {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "rslora": settings.use_rslora,
        "dora": settings.use_dora,
        "targets": None,
    }
    for name in config.model_fields_set & theirs.keys():
        if getattr(config, name) != theirs[name]:
            raise ConfigError(
                f"{name} is {getattr(config, name)}, but the initial adapter {folder} brings its "
                f"own ({theirs[name] or 'its layers'}): leave {name} out.",
                param=name,
            )
