"""Checkpoints of a run: complete or absent, checksummed, the newest and the best never deleted."""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qlorachat.adapters import AdapterCard, write_card
from qlorachat.adapters.folder import WEIGHTS
from qlorachat.durable import file_sha256, whole_folder
from qlorachat.errors import QlorachatError
from qlorachat.training.history import History
from qlorachat.training.state_file import read_state, write_state

log = logging.getLogger(__name__)

_HISTORY = "history.json"
_CHECKSUMS = "checksums.json"
_NAME = re.compile(r"step-(\d+)")  # of a checkpoint's folder; a copy has another
_DAMAGED = "damaged-"  # before the name of a checkpoint that is set aside


class SaveFailed(QlorachatError):
    """A checkpoint that could not be written; those before it are as they were."""


@dataclass(frozen=True, slots=True)
class Save:
    """A whole checkpoint on disk; its folder is a PEFT adapter too, in float32."""

    folder: Path
    step: int

    def history(self) -> History:
        """What happened up to its step."""
        return History.from_json((self.folder / _HISTORY).read_text("utf-8"))

    def weights(self) -> dict[str, torch.Tensor]:
        """PEFT's key -> float32 tensor on the CPU."""
        weights: dict[str, torch.Tensor] = load_file(self.folder / WEIGHTS)
        return weights

    def state(self) -> dict[str, Any]:
        """What `Saves.save` was given."""
        state: dict[str, Any] = read_state(self.folder)
        return state


class Saves:
    """The folder of a run's checkpoints."""

    def __init__(self, folder: Path, card: AdapterCard, *, keep: int) -> None:
        """`keep` newest ones stay, beside the best; each carries the adapter's `card`."""
        self._folder = folder
        self._card = card
        self._keep = keep

    def save(self, step: int, peft: PeftModel, state: Mapping[str, Any], history: History) -> None:
        """Write the checkpoint of `step`, then delete old ones but the best that is there.

        SaveFailed when the disk doesn't take it.
        """
        target = self.at(step).folder
        if _is_whole(target):
            return
        try:
            with whole_folder(target, replace=True) as folder:
                write_adapter(folder, peft, torch.float32, self._card)
                write_state(folder, dict(state))
                (folder / _HISTORY).write_text(history.to_json(), "utf-8")
                sums = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
                (folder / _CHECKSUMS).write_text(json.dumps(sums, indent=1), "utf-8")
        except (OSError, SafetensorError) as error:
            raise SaveFailed(
                f"The checkpoint of step {step} could not be written to {self._folder} ({error}): "
                "free some space. The checkpoints before it are whole."
            ) from error
        self._delete_old(history)

    def newest(self) -> Save | None:
        """The newest whole checkpoint; damaged ones are named and set aside."""
        for save in self._all():
            if _is_whole(save.folder):
                return save
            aside = save.folder.with_name(f"{_DAMAGED}{save.folder.name}")
            log.warning("the checkpoint %s is damaged: it is now %s", save.folder, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            save.folder.rename(aside)
        return None

    def best(self, history: History) -> Save:
        """The whole checkpoint of the lowest evaluation; SaveFailed where no evaluation has one."""
        for evaluation in history.best_first:
            save = self.at(evaluation.step)
            if _is_whole(save.folder):
                if evaluation is not history.best:
                    log.warning(
                        "the best checkpoint, of step %d, is damaged or was never written: the "
                        "best that is there, of step %d, takes its place",
                        history.best_first[0].step,
                        save.step,
                    )
                return save
        raise SaveFailed(
            f"No evaluation's checkpoint in {self._folder} is whole: the others there are adapters "
            "too, take one of them."
        )

    def at(self, step: int) -> Save:
        """The checkpoint of a step."""
        return Save(self._folder / f"step-{step:06}", step)

    def _all(self) -> list[Save]:
        """The newest first."""
        found = ((folder, _NAME.fullmatch(folder.name)) for folder in self._folder.glob("step-*"))
        saves = [Save(folder, int(match[1])) for folder, match in found if match]
        return sorted(saves, key=lambda save: save.step, reverse=True)

    def _delete_old(self, history: History) -> None:
        saves = self._all()
        steps = {save.step for save in saves}
        best = next((each.step for each in history.best_first if each.step in steps), None)
        for save in saves[self._keep :]:
            if save.step != best:
                shutil.rmtree(save.folder, ignore_errors=True)


def write_adapter(folder: Path, peft: PeftModel, dtype: torch.dtype, card: AdapterCard) -> None:
    """The trained weights as a PEFT folder, in `dtype`, with its card. Raises OSError."""
    trained = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    # without the embedding's flag PEFT would ask the hub for the base's config
    tensors = get_peft_model_state_dict(peft, state_dict=trained, save_embedding_layers=False)
    stored = {key: _stored(key, tensor, dtype) for key, tensor in tensors.items()}
    try:
        save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, which it reports in its own class
        raise OSError(str(error)) from error
    config = copy(peft.peft_config["default"])
    config.target_modules = sorted(config.target_modules)  # a set's order would differ each time
    config.inference_mode = True
    config.save_pretrained(folder)
    write_card(folder, card)


def _stored(key: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # DoRA's magnitudes are large and move little: 16 bit would swallow what they learned
    kept = torch.float32 if "lora_magnitude_vector" in key else dtype
    return tensor.detach().to("cpu", kept).contiguous()


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every source of random numbers that training draws from."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Go on drawing where `random_state` was taken."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _is_whole(folder: Path) -> bool:
    try:
        sums = json.loads((folder / _CHECKSUMS).read_text("utf-8"))
        return all(file_sha256(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return False
