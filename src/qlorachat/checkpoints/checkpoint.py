"""A model's name becomes a checked folder and what its files say of it; no weight is read."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qlorachat.checkpoints.cache import MANIFEST
from qlorachat.checkpoints.demo import (
    SAMPLING,
    SKIP_MODULES,
    converted_demo,
    find_gguf,
    is_demo,
)
from qlorachat.checkpoints.files import (
    added_tokens_decoder,
    chat_template_source,
    explained,
    read_json,
    refuse_pointer,
    token_text,
)
from qlorachat.config import DEMO_MODEL
from qlorachat.errors import ConfigError, ModelError, UsageError
from qlorachat.hub import download
from qlorachat.protocols import Tokenizer
from qlorachat.tokens import SamplingParams

log = logging.getLogger(__name__)

_TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
# what transformers reads; some repositories carry a second copy under other names
_WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")

# generation_config.json's name -> ours
_SAMPLING_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a checkpoint asks to be quantized: modules, by full name, that stay in 16 bit."""

    skip_modules: tuple[str, ...] = ()

    def skips(self, module: str) -> bool:
        return any(f"{module}.".startswith(f"{name}.") for name in self.skip_modules)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A base model on disk and what its own files say of it."""

    name: str  # as asked for; the demo model under its full name
    folder: Path
    revision: str | None  # commit, where the hub's cache knows it
    config: Mapping[str, Any]  # config.json
    generation: SamplingParams  # generation_config.json over our defaults
    stop_ids: frozenset[int]  # every end token that its JSON files name by id
    chat_template: str | None  # Jinja source
    recipe: Recipe

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together; ModelError where config.json does not say."""
        config = self.config.get("text_config", self.config)
        for key in ("max_position_embeddings", "n_positions"):
            if isinstance(length := config.get(key), int):
                return length
        raise ModelError(f"The config.json of `{self.name}` has no max_position_embeddings.")

    def end_tokens(self, tokenizer: Tokenizer) -> frozenset[int]:
        """`stop_ids` and the tokenizer's own end, which may have its id from another file."""
        end = tokenizer.control_tokens.get(tokenizer.eos_token or "")
        return self.stop_ids if end is None else self.stop_ids | {end}


def locate(
    model: str, *, revision: str | None = None, offline: bool = False, weights: bool = True
) -> Checkpoint:
    """The checkpoint that `model` names: the demo model, else a folder, else a hub repository.

    `weights=False` brings and checks only the configuration and tokenizer files. Raises ModelError
    or HubError, one line each: no such place, no config.json, weights that are missing, in pickle
    files, cut off or Git LFS pointers; ConfigError for an empty name.
    """
    if not model.strip():
        raise ConfigError(
            "The model has an empty name: give a folder or a hub repository, or leave it out.",
            param="model",
        )
    name = DEMO_MODEL if is_demo(model) else model
    if name == DEMO_MODEL and weights and Path(model).is_dir():
        log.warning("`%s` is the demo model; for the folder of that name give ./%s", model, model)
    folder = _find(name, revision, offline, weights)
    config = _read_config(folder)
    if weights:
        _check_weights(folder)
    generation = read_json(folder / "generation_config.json")
    recipe = _recipe(folder)
    if name == DEMO_MODEL:  # wherever it comes from
        generation, recipe = generation | SAMPLING, Recipe(SKIP_MODULES)
    tokenizer = read_json(folder / "tokenizer_config.json")
    return Checkpoint(
        name=name,
        folder=folder,
        revision=folder.name if folder.parent.name == "snapshots" else None,
        config=config,
        generation=_sampling(folder, generation),
        stop_ids=_stop_ids(folder, config, generation, tokenizer),
        chat_template=chat_template_source(folder, tokenizer),
        recipe=recipe,
    )


def _find(name: str, revision: str | None, offline: bool, weights: bool) -> Path:
    if name == DEMO_MODEL and revision is None and (gguf := find_gguf()):
        return converted_demo(gguf)
    try:
        folder = Path(name).expanduser()
    except RuntimeError:
        raise ModelError(
            f"`{name}` begins with no home folder of this machine: give a path."
        ) from None
    with explained(folder):
        if folder.is_dir():
            return folder
        if folder.is_file():
            raise ModelError(
                f"{folder} is a file: give the folder of a model in Hugging Face layout."
            )
    patterns = (*_TEXT_FILES, *_WEIGHT_FILES) if weights else _TEXT_FILES
    return download(name, revision=revision, offline=offline, patterns=patterns)


def _read_config(folder: Path) -> dict[str, Any]:
    if config := read_json(folder / "config.json"):
        if not config.get("quantization_config"):  # null says the same as no such key
            config.pop("quantization_config", None)
        elif not isinstance(config["quantization_config"], dict):
            raise ModelError(
                f"The quantization_config in {folder / 'config.json'} is no JSON object: bring it "
                "again."
            )
        return config
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} holds an adapter: give it as --adapter, a model as --model.")
    raise ModelError(
        f"The folder {folder} has no config.json: give the folder of a model in Hugging Face "
        "layout (config.json, tokenizer files, *.safetensors)."
    )


def _check_weights(folder: Path) -> None:
    files = weight_files(folder)
    if not files:
        raise ModelError(
            f"{folder} has no model.safetensors (pickle files such as pytorch_model.bin can run "
            "code and are never loaded): take a revision that has it (--revision), or save the "
            "model again with transformers' save_pretrained."
        )
    for file in files:
        if not file.exists():
            raise ModelError(
                f"{folder} lacks {file.name}: the download is incomplete, run it again."
            )
        refuse_pointer(file)
        try:
            with safe_open(file, "np"):
                pass
        except SafetensorError as error:
            raise ModelError(
                f"{file} is damaged or cut off ({error}): delete it and bring it again."
            ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files, by the index where there is one."""
    file = folder / "model.safetensors.index.json"
    if index := read_json(file):
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
            raise ModelError(f"{file} has no weight_map of names to files: bring it again.")
        return [folder / name for name in sorted(set(shards.values()))]
    return [file for file in [folder / "model.safetensors"] if file.exists()]


def _sampling(folder: Path, generation: Mapping[str, Any]) -> SamplingParams:
    """The file's values over our defaults; `do_sample: false` is greedy, as in transformers."""
    values = {
        ours: generation[theirs]
        for theirs, ours in _SAMPLING_FIELDS.items()
        if generation.get(theirs) is not None
    }
    if generation.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        return SamplingParams(**values)
    except UsageError as error:
        raise ModelError(f"{folder / 'generation_config.json'} is wrong: {error}") from error


def _stop_ids(
    folder: Path,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
) -> frozenset[int]:
    ids = {
        *_as_ids(config.get("eos_token_id")),
        *_as_ids(generation.get("eos_token_id")),
        *_ids_of(token_text(tokenizer.get("eos_token")), folder, tokenizer),
    }
    return frozenset(ids)


def _as_ids(value: object) -> Iterable[int]:
    if isinstance(value, int):
        return (value,)
    return [item for item in value if isinstance(item, int)] if isinstance(value, list) else ()


def _ids_of(token: str | None, folder: Path, tokenizer: Mapping[str, Any]) -> Iterable[int]:
    """The id of a token that tokenizer_config.json adds; none where it does not."""
    added = added_tokens_decoder(folder, tokenizer)
    return [i for i, entry in added.items() if entry["content"] == token]


def _recipe(folder: Path) -> Recipe:
    """The quantization of our own manifest; other checkpoints have none."""
    quantization = read_json(folder / MANIFEST).get("quantization") or {}
    return Recipe(skip_modules=tuple(quantization.get("skip_modules", ())))
