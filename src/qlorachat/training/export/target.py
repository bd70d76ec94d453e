"""Where an export is written to: never over something else, and whole or not at all."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qlorachat.durable import sweep, whole_folder
from qlorachat.errors import ConfigError, QlorachatError
from qlorachat.training.places import local_path


@dataclass(frozen=True, slots=True)
class ExportTarget:
    """The merged model's folder and, where one was asked for, the GGUF file; resolved paths."""

    merged: Path
    gguf: Path | None
    overwrite: bool

    @classmethod
    def of(cls, merged: str | Path, gguf: str | Path | None, *, overwrite: bool) -> "ExportTarget":
        """From what a user calls them."""
        file = local_path(gguf, param="gguf").resolve() if gguf is not None else None
        return cls(local_path(merged, param="merged").resolve(), file, overwrite)

    def check(self, *sources: Path) -> None:
        """ConfigError for a place that is taken, or that holds one of the `sources` to be read.

        What a killed export left there is cleared up first.
        """
        if any(source.resolve().is_relative_to(self.merged) for source in sources):
            raise ConfigError(
                f"{self.merged} holds the base or the adapter: choose another --merged.",
                param="merged",
            )
        with _disk(self.merged):
            sweep(self.merged.parent, self.merged.name)
        self._check_merged()
        if self.gguf is not None:
            self._check_gguf(self.gguf)

    def _check_merged(self) -> None:
        _check_above(self.merged, "merged")
        if not self.merged.exists():
            return
        if not self.merged.is_dir():
            raise ConfigError(f"{self.merged} is a file: give --merged a folder.", param="merged")
        if not self.overwrite:
            raise ConfigError(
                f"The folder {self.merged} exists: choose another --merged, or replace it with "
                "--overwrite.",
                param="merged",
            )
        if any(self.merged.iterdir()) and not _is_model(self.merged):
            raise ConfigError(
                f"{self.merged} holds something else than a model, which --overwrite does not "
                "replace: choose another --merged.",
                param="merged",
            )

    def _check_gguf(self, gguf: Path) -> None:
        _check_above(gguf, "gguf")
        if gguf.is_dir() or gguf == self.merged:
            raise ConfigError(f"{gguf} is a folder: give --gguf a file.", param="gguf")
        if gguf.exists() and not self.overwrite:
            raise ConfigError(
                f"The file {gguf} exists: choose another --gguf, or replace it with --overwrite.",
                param="gguf",
            )

    @contextmanager
    def filling(self) -> Iterator[Path]:
        """A folder to fill, which then takes the name of the merged model's; QlorachatError."""
        with _disk(self.merged):
            self.merged.parent.mkdir(parents=True, exist_ok=True)
            with whole_folder(self.merged, replace=self.overwrite) as folder:
                yield folder

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """The path of the GGUF file, to be written whole; QlorachatError."""
        assert self.gguf is not None
        with _disk(self.gguf):
            self.gguf.parent.mkdir(parents=True, exist_ok=True)
            yield self.gguf


def _check_above(place: Path, param: str) -> None:
    if file := next((above for above in place.parents if above.is_file()), None):
        raise ConfigError(f"{file} is a file: choose another --{param}.", param=param)


def _is_model(folder: Path) -> bool:
    """Whether its config.json is a model's: programs of other kinds have one too."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise QlorachatError(
            f"{path} could not be written ({error.strerror or error}): free some space there, or "
            "choose another place. What was there is as it was."
        ) from error
