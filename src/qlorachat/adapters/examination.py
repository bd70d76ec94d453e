"""One look at an adapter folder, headers first, then tensors: the only road to an Adapter."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from qlorachat.adapters.adapter import Adapter, LoraSettings
from qlorachat.adapters.card import AdapterCard, base_of, read_card
from qlorachat.adapters.check import Finding, HeaderCheck, Shapes, base_findings
from qlorachat.adapters.config import AdapterConfig, read_config, unsupported
from qlorachat.adapters.folder import CARD, CONFIG, WEIGHTS, find_file, plain, read_bytes
from qlorachat.adapters.targets import TargetRules
from qlorachat.adapters.weights import WeightsHeader, read_header
from qlorachat.errors import AdapterError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Inspection:
    """All that is to be said about an adapter folder; a fact is None where it can't be known."""

    path: Path
    findings: tuple[Finding, ...]
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = ()  # last parts of the modules' names
    size_bytes: int | None = None  # of the weights' file
    parameters: int | None = None
    base_model: str | None = None
    template: str | None = None

    @property
    def ok(self) -> bool:
        """Whether it would be served."""
        return all(finding.level != "error" for finding in self.findings)

    def __str__(self) -> str:
        """The facts and findings for people, a line each."""
        facts = {
            "base model": self.base_model and plain(self.base_model),
            "template": self.template and plain(self.template),
            "rank": self.rank,
            "alpha": self.alpha,
            "modules": ", ".join(map(plain, self.targets)) or None,
            "parameters": self.parameters and f"{self.parameters:,}",
            "weights": self.size_bytes and f"{self.size_bytes / 1e6:.1f} MB",
        }
        lines = [f"{name}: {fact}" for name, fact in facts.items() if fact is not None]
        lines += [f"{finding.level}: {finding.message}" for finding in self.findings]
        return "\n".join([str(self.path), *lines])


def read_adapter(
    folder: Path, *, shapes: Shapes | None = None, base_name: str | None = None
) -> Adapter:
    """The adapter in `folder`, checked; AdapterError for the first thing that keeps it out.

    `shapes` (linear module -> (out, in)) and `base_name` are those of the base model that it is
    to join; without them it is checked against itself alone.
    """
    examination = _Examination(folder, shapes, base_name)
    warnings = _refuse_errors(examination.headers()) + _refuse_errors(examination.contents())
    return examination.adapter(warnings)


def check_header(
    folder: Path, *, shapes: Shapes | None = None, base_name: str | None = None
) -> None:
    """AdapterError for what can be known without reading a tensor; cheap, before a model loads."""
    _refuse_errors(_Examination(folder, shapes, base_name).headers())


def inspect_adapter(
    folder: Path, *, shapes: Shapes | None = None, base_name: str | None = None
) -> Inspection:
    """Everything that `read_adapter` would refuse or warn of, with the adapter's facts."""
    examination = _Examination(folder, shapes, base_name)
    findings = (*examination.headers(), *examination.contents())
    return examination.inspection(findings)


def _refuse_errors(findings: Iterator[Finding]) -> tuple[str, ...]:
    """The warnings; the first error is raised, and nothing after it is looked at."""
    warnings = []
    for finding in findings:
        if finding.level == "error":
            raise AdapterError(finding.message, param="adapter")
        warnings.append(finding.message)
    return tuple(warnings)


class _Examination:
    """Findings as they are looked for; what was read on the way stays, None where it failed."""

    def __init__(self, folder: Path, shapes: Shapes | None, base_name: str | None) -> None:
        self._folder, self._shapes, self._base_name = folder, shapes or {}, base_name
        self._config: AdapterConfig | None = None
        self._header: WeightsHeader | None = None
        self._card: AdapterCard | None = None
        self._settings: LoraSettings | None = None
        self._tensors: Mapping[str, torch.Tensor] | None = None

    def headers(self) -> Iterator[Finding]:
        """By the config, the card and the weights' header: no tensor is read."""
        yield from _caught(self._read_config())
        yield from _caught(self._read_card())
        yield from _caught(self._read_header())

    def contents(self) -> Iterator[Finding]:
        """By the bytes of all files and the numbers in the tensors; after `headers`."""
        yield from _caught(self._read_tensors())

    def _read_config(self) -> Iterator[Finding]:
        self._config = read_config(self._folder)
        for text in unsupported(self._config):
            yield Finding("error", f"{self._folder / CONFIG}: {text}.")

    def _read_card(self) -> Iterator[Finding]:
        self._card = read_card(self._folder)
        if self._config is not None:
            yield from base_findings(self._folder, self._config, self._card, self._base_name)

    def _read_header(self) -> Iterator[Finding]:
        self._header = read_header(self._folder)
        if self._config is not None:
            rules = TargetRules(self._config, self._folder / CONFIG)
            yield from HeaderCheck(self._config, rules, self._header, self._shapes).findings()
            self._settings = LoraSettings.resolve(self._config, rules, self._header)

    def _read_tensors(self) -> Iterator[Finding]:
        if self._header is None:
            return
        # torch takes a second to import, and the headers are checked without it
        from qlorachat.adapters.tensors import load_tensors, tensor_findings

        data = read_bytes(self._header.path)
        if self._card is not None:
            yield from _manifest_findings(self._folder, self._card.sha256, data)
        self._tensors = load_tensors(self._header, data)
        yield from tensor_findings(self._header, self._tensors)

    def adapter(self, warnings: tuple[str, ...]) -> Adapter:
        """The noun, once nothing was found against it."""
        from qlorachat.adapters.tensors import content_sha256  # torch again

        assert self._settings is not None
        assert self._tensors is not None
        peft_config = self._settings.peft_config()
        return Adapter(
            path=self._folder,
            sha256=content_sha256(peft_config, self._tensors),
            settings=self._settings,
            peft_config=peft_config,
            tensors=MappingProxyType(dict(self._tensors)),
            card=self._card,
            warnings=warnings,
        )

    def inspection(self, findings: tuple[Finding, ...]) -> Inspection:
        """The facts beside all that was found."""
        config, header, card = self._config, self._header, self._card
        return Inspection(
            path=self._folder,
            findings=findings,
            rank=config.r if config else None,
            alpha=config.lora_alpha if config else None,
            targets=_last_parts(header.lora) if header else (),
            size_bytes=header.size_bytes if header else None,
            parameters=header.parameters if header else None,
            base_model=base_of(card, config)[0],
            template=card.template if card else None,
        )


def _caught(findings: Iterator[Finding]) -> Iterator[Finding]:
    """The findings of one step; an AdapterError that ends it is the last of them."""
    try:
        yield from findings
    except AdapterError as error:
        yield Finding("error", str(error))


def _manifest_findings(
    folder: Path, manifest: Mapping[str, str], weights: bytes
) -> Iterator[Finding]:
    """An error for each file whose bytes are not those that the card was written for."""
    for name, expected in manifest.items():
        path = folder / name
        if find_file(folder, name) is None:
            yield Finding("error", f"{path} is missing, but {CARD} lists it: copy it again.")
            continue
        found = hashlib.sha256(weights if name == WEIGHTS else read_bytes(path)).hexdigest()
        if found != expected:
            yield Finding(
                "error",
                f"{path} is damaged or was changed: its sha256 begins with {found[:12]}, expected "
                f"{expected[:12]} by {CARD}; copy it again.",
            )


def _last_parts(modules: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({module.rpartition(".")[2] for module in modules}))
