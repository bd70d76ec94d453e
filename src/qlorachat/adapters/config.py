"""adapter_config.json: a whitelist of what is served; nothing in it is imported or executed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, ValidationError

from qlorachat.adapters.folder import CONFIG, contents, find_file, plain, read_object
from qlorachat.errors import AdapterError

ModuleName = Annotated[str, StringConstraints(pattern=r"^\w+(\.\w+)*$")]
Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[int | FiniteFloat, Field(gt=0, le=2**31)]

_FEATURES = {
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "arrow_config": "Arrow routing",
    "corda_config": "CorDA",
    "ensure_weight_tying": "adapters of tied layers",
    "kasa_config": "KaSA",
    "layer_replication": "replicated layers",
    "loftq_config": "LoftQ",
    "lora_bias": "a bias in lora_B",
    "lora_ga_config": "LoRA-GA",
    "megatron_config": "Megatron layers",
    "megatron_core": "another Megatron module",
    "monteclora_config": "Monte Carlo LoRA",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained token embeddings",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
}
# matter in training only, or to whoever writes the file
_WITHOUT_EFFECT = {
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
}
# starting points of training that leave the base model as it is
_PLAIN_STARTS = {"gaussian", "eva", "orthogonal", "mica"}


class AdapterConfig(BaseModel):
    """The keys of PEFT's LoraConfig that are served, with PEFT's defaults; the rest are extras."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: Rank = 8
    lora_alpha: Alpha = 8
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_lora_weights: bool | str = True
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    modules_to_save: list[ModuleName] | None = None  # plain: PEFT matches with these


def read_config(folder: Path) -> AdapterConfig:
    """The config in `folder`; AdapterError if there is none, or it isn't one of a LoRA adapter."""
    path = require_config(folder)
    values = read_object(path)
    kind = values.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"{path}: peft_type is {plain(repr(kind))}; expected 'LORA', the only kind of adapter "
            "that is served."
        )
    try:
        return AdapterConfig.model_validate(values)
    except ValidationError as error:
        raise AdapterError(f"{path}: {_explain(error, values)}") from None


def require_config(folder: Path) -> Path:
    """The path of the config in `folder`; AdapterError that says what is there instead."""
    try:
        if folder.is_file():
            raise AdapterError(f"{folder} is a file; expected the folder that holds {CONFIG}.")
        if not folder.is_dir():
            raise AdapterError(f"There is no folder {folder}; expected one that holds {CONFIG}.")
    except OSError as error:
        raise AdapterError(f"{folder} cannot be looked at: {error.strerror}.") from None
    path = find_file(folder, CONFIG)
    if path is None:
        raise AdapterError(f"{folder} has no {CONFIG}; {contents(folder)}{_elsewhere(folder)}.")
    return path


def _elsewhere(folder: Path) -> str:
    if (folder / "checkpoints" / "run.json").exists():
        return f": an unfinished training, go on with `qlorachat train --resume --output {folder}`"
    inner = sorted(config.parent for config in folder.glob(f"*/{CONFIG}"))
    return f": name {inner[-1]}" if inner else ": name the folder that PEFT's save_pretrained wrote"


def _explain(error: ValidationError, values: dict[str, Any]) -> str:
    first = error.errors()[0]
    key = str(first["loc"][0])
    return f"{key} is {plain(repr(values.get(key)))}: {first['msg']}."


def unsupported(config: AdapterConfig) -> Iterator[str]:
    """For each thing that the config asks for and that is not served: what it is, what to do."""
    if config.task_type not in (None, "CAUSAL_LM"):
        yield f"task_type is {plain(repr(config.task_type))}; expected CAUSAL_LM, text generation"
    if config.bias != "none":
        yield (
            f"bias is {plain(repr(config.bias))}, and trained biases are not supported: train the "
            "adapter with bias='none'"
        )
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in _PLAIN_STARTS:
        yield (
            f"init_lora_weights is {plain(repr(config.init_lora_weights))}, which changes the base "
            "model: save it with path_initial_model_for_weight_conversion as a plain LoRA"
        )
    for key, value in (config.model_extra or {}).items():
        if value and not _is_harmless(key, value):
            yield _refusal(key, value)


def _is_harmless(key: str, value: Any) -> bool:
    if key == "auto_mapping":
        # PEFT notes the base model's class here if task_type was not set; nobody imports it
        library = value.get("parent_library") if isinstance(value, dict) else None
        return isinstance(library, str) and library.startswith("transformers.models.")
    return key in _WITHOUT_EFFECT or (key, value) == ("megatron_core", "megatron.core")


def _refusal(key: str, value: Any) -> str:
    shown = f"{plain(key)} is {plain(repr(value))}"
    if key in _FEATURES:
        return f"{shown}: {_FEATURES[key]}, which is not supported; train the adapter without it"
    if key == "auto_mapping":
        return f"{shown}, which names code to import; remove the key, nothing needs it"
    return f"{shown}, a key that is not known here; remove it if it has no effect on the answer"
