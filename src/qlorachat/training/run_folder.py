"""The folder of a run: never overwritten unasked, resumable by what it says of itself."""

import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from peft import PeftModel

from qlorachat.adapters import AdapterCard
from qlorachat.adapters.folder import CARD, CONFIG, WEIGHTS
from qlorachat.config import check
from qlorachat.durable import sweep, sync, whole_folder
from qlorachat.errors import ConfigError, QlorachatError
from qlorachat.training.config import TrainConfig
from qlorachat.training.places import local_path
from qlorachat.training.saves import write_adapter

_FILES = (WEIGHTS, CONFIG, CARD)  # the card last: its hashes are of the two before it

# what a resumed run may be told anew: it changes nothing that is learned
_FREE = {
    *("output", "device", "memory", "offline", "data", "eval_data"),
    *("keep", "save_steps", "chat_steps", "chat_prompts", "chat_tokens"),
}

# these too, where a step still has as many rows: they are the same ones
_PASSES = {"micro_batch", "accumulation"}


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`output/` with the adapter and its report; `output/checkpoints/` with the run's state."""

    output: Path

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    @property
    def report(self) -> Path:
        return self.output / "report.html"

    @property
    def _record(self) -> Path:
        return self.checkpoints / "run.json"

    def check_free(self, config: TrainConfig, *, overwrite: bool) -> None:
        """ConfigError when something is there already and may not be replaced."""
        if taken := next((p for p in (self.output, *self.output.parents) if p.is_file()), None):
            raise ConfigError(f"{taken} is a file: give --output a folder.", param="output")
        init = config.init_adapter and local_path(config.init_adapter, param="init_adapter")
        if init and init.resolve().is_relative_to(self.output.resolve()):
            raise ConfigError(
                f"The initial adapter is in {self.output}, whose contents the run replaces: choose "
                "another --output.",
                param="init_adapter",
            )
        if not self.output.exists() or not any(self.output.iterdir()):
            return
        if not overwrite:
            advice = "go on with its run by --resume, " if self._record.exists() else ""
            raise ConfigError(
                f"The folder {self.output} exists: {advice}choose another --output, or replace it "
                "with --overwrite.",
                param="output",
            )
        if self.checkpoints.exists() and not self._record.exists():
            raise ConfigError(
                f"{self.checkpoints} is no run's folder, so --overwrite does not replace it: "
                "choose another --output, or move it away.",
                param="output",
            )

    def begin(
        self, config: TrainConfig, marks: Mapping[str, str | None], *, overwrite: bool
    ) -> None:
        """Make the folder and note the run in it; with `overwrite` an earlier run's part goes.

        `marks` are those of its data and base (see Preparation.marks).
        """
        if overwrite and self._record.exists():
            with self.lock():  # let go again: Windows renames no folder with an open file
                pass
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            record = {**marks, "config": config.model_dump(exclude_unset=True)}
            text = json.dumps(record, ensure_ascii=False, indent=1)
            with whole_folder(self.checkpoints, replace=overwrite) as folder:
                (folder / self._record.name).write_text(text, "utf-8")
        except OSError as error:
            raise ConfigError(
                f"The folder {self.checkpoints} cannot be made ({error.strerror or error}): choose "
                "another --output.",
                param="output",
            ) from error

    def lock(self) -> AbstractContextManager[object]:
        """The run for this process alone within `with`; ConfigError where another has it."""
        try:
            return FileLock(self.checkpoints / "lock").acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"The run in {self.output} is going on in another process: wait until it has "
                "ended, or choose another --output.",
                param="output",
            ) from None
        except OSError as error:
            raise ConfigError(
                f"The folder {self.checkpoints} cannot be written ({error.strerror or error}): "
                "allow it, or choose another --output.",
                param="output",
            ) from error

    def resumed(self, config: TrainConfig) -> tuple[TrainConfig, dict[str, str | None]]:
        """The settings of the run that is there, and the marks that it began with.

        ConfigError when there is none, or when `config` asks for something else than it.
        """
        if not self.checkpoints.exists():
            self.sweep()  # a kill may have left an earlier run's half way out of the new one's
        if not self._record.exists():
            raise ConfigError(
                f"There is no unfinished run in {self.output}: give the --output of one, or leave "
                "out --resume.",
                param="resume",
            )
        record = json.loads(self._record.read_text("utf-8"))
        begun = check(TrainConfig, record["config"])
        said = {name: getattr(config, name) for name in config.model_fields_set & (_FREE | _PASSES)}
        revision = {"revision": record.get("revision") or begun.revision}
        resumed = check(TrainConfig, {**record["config"], **revision, **said})
        free = _FREE | _PASSES if _step_rows(resumed) == _step_rows(begun) else _FREE
        for name in sorted(config.model_fields_set - free):
            if getattr(config, name) != getattr(begun, name):
                raise ConfigError(
                    f"The run in {self.output} was begun with {name} = {getattr(begun, name)!r}, "
                    f"not {getattr(config, name)!r}: leave {name} out to resume it.",
                    param=name,
                )
        return resumed, record

    def sweep(self) -> None:
        """Remove what a killed part of the run left half written."""
        sweep(self.output)
        sweep(self.checkpoints)

    def finish(self, peft: PeftModel, card: AdapterCard) -> None:
        """The adapter in bfloat16: each file takes its place whole, the card the last."""
        staged = self.checkpoints / "final"
        try:
            with whole_folder(staged, replace=True) as folder:
                write_adapter(folder, peft, torch.bfloat16, card)
            for name in _FILES:
                (staged / name).replace(self.output / name)
            sync(self.output)
            shutil.rmtree(staged)
        except OSError as error:
            raise QlorachatError(
                f"The adapter could not be written to {self.output} ({error}): free some space, "
                "then go on with --resume."
            ) from error


def _step_rows(config: TrainConfig) -> int:
    return config.micro_batch * config.accumulation
