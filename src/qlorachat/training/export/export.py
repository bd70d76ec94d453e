"""`export_merged`: an adapter and its base become one 16-bit model, held against the adapter."""

import gc
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from qlorachat.adapters import Adapter, AdapterCard, base_model_of, read_adapter
from qlorachat.checkpoints import (
    Checkpoint,
    LoadedModel,
    keep_as_quantized,
    linear_shapes,
    load_model,
    locate,
    read_tokenizer,
)
from qlorachat.checkpoints.load import resolve_device
from qlorachat.checkpoints.memory import fits
from qlorachat.checkpoints.quantization import estimate_memory
from qlorachat.config import QuantizationChoice
from qlorachat.errors import ConfigError
from qlorachat.plugins import PluginHost, create_manager
from qlorachat.templates import TemplateChoice
from qlorachat.templates.choice import CHECKPOINT, check_template_name
from qlorachat.training.export.check import Check, Questions, Standard, read_questions
from qlorachat.training.export.gguf import check_gguf, write_gguf
from qlorachat.training.export.merge import attach, write_model
from qlorachat.training.export.target import ExportTarget

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Export:
    """What came out, and how it is to be asked."""

    merged: Path
    gguf: Path | None
    template: str | None  # prompt format, where one was named
    system: str | None  # system prompt that the adapter was trained with
    check: Check | None  # None where none was asked for

    @property
    def _system(self) -> str:
        return f"the system prompt: {self.system}" if self.system else "an empty system prompt."

    def __str__(self) -> str:
        """Lines for people."""
        named = self.template not in (None, CHECKPOINT)
        template = f" --template {self.template}" if named else ""
        return "\n".join(
            [
                *([str(self.check)] if self.check else []),
                f"The merged model is in {self.merged}. Chat with it: "
                f"qlorachat chat --model {self.merged} --quantization 16bit{template}",
                *([] if self.system is None else [f"It was trained with {self._system}"]),
                *([f"The same for llama.cpp: {self.gguf}"] if self.gguf else []),
            ]
        )


def export_merged(
    adapter: str | Path,
    merged: str | Path,
    *,
    gguf: str | Path | None = None,
    data: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    quantization: QuantizationChoice = "auto",
    template: str | None = None,
    device: str = "auto",
    offline: bool = False,
    overwrite: bool = False,
    check: bool = True,
    plugins: PluginHost | None = None,
) -> Export:
    """Merge the adapter (a folder or hub repository) into its base, as the folder `merged`.

    The base is quantized as the adapter was trained on it, dequantized, and written in bfloat16
    with the adapter added; `gguf` is a file to write beside. Then the merged model is held against
    the un-merged adapter, on rows of `data` or on prompts of our own. `model` with its `revision`,
    `quantization` and `template` take the place of what the adapter says of itself.

    Raises AdapterError, ConfigError, ModelError, HubError and UnknownName before anything is
    written, and QlorachatError when the disk does not take it.

    >>> export_merged("qlora-model", "merged", gguf="merged.gguf")  # doctest: +SKIP
    """
    host = plugins or create_manager()
    check_template_name(template, host.templates())
    target = ExportTarget.of(merged, gguf, overwrite=overwrite)
    folder = host.locate_adapter(str(adapter), offline=offline)
    source = _Source.read(folder, model=model, revision=revision, offline=offline)
    target.check(folder, source.checkpoint.folder)
    if gguf is not None:
        check_gguf(source.checkpoint)
    card = source.card
    questions = source.questions(host, template, data, offline=offline) if check else None
    standard = _merge(source, target, questions, device=device, quantization=quantization)
    gc.collect()  # PEFT's models hold themselves
    torch.cuda.empty_cache()
    result = locate(str(target.merged))
    if gguf is not None:
        with target.writing() as file:
            write_gguf(result, file)
    return Export(
        merged=target.merged,
        gguf=target.gguf,
        template=template or card.template,
        system=card.system,
        check=_judge(standard, result, device) if standard else None,
    )


@dataclass(frozen=True, slots=True)
class _Source:
    """The adapter and the base under it, by their files."""

    adapter: Adapter
    card: AdapterCard
    checkpoint: Checkpoint

    @classmethod
    def read(
        cls, folder: Path, *, model: str | None, revision: str | None, offline: bool
    ) -> "_Source":
        """Both, checked; the base is `model`, else the one that the adapter names."""
        if model is None:
            model, known = base_model_of(folder)
            revision = revision or known
        if model is None:
            raise ConfigError(
                f"{folder} does not say which base it was trained on: give it as --model.",
                param="model",
            )
        checkpoint = locate(model, revision=revision, offline=offline)
        shapes = linear_shapes(checkpoint)
        adapter = read_adapter(folder, shapes=shapes, base_name=checkpoint.name)
        for warning in adapter.warnings:
            log.warning("%s", warning)
        return cls(adapter, adapter.card or AdapterCard(), checkpoint)

    def questions(
        self, host: PluginHost, template: str | None, data: str | None, *, offline: bool
    ) -> Questions:
        """What adapter and merged model will be asked, in the adapter's prompt format."""
        tokenizer = read_tokenizer(self.checkpoint.folder)
        choice = TemplateChoice(
            host.templates(),
            model_name=self.checkpoint.name,
            chat_template=self.checkpoint.chat_template,
            tokenizer=tokenizer,
        )
        return read_questions(
            data,
            choice.choose(template, self.card.template),
            tokenizer,
            stop_ids=self.checkpoint.end_tokens(tokenizer),
            system=self.card.system,
            offline=offline,
        )

    def load(self, device: str, quantization: QuantizationChoice) -> LoadedModel:
        """The base, quantized as the adapter's card says where "auto" was asked for."""
        trained = self.card.quantization
        if quantization == "auto" and trained in _CHOICES:
            quantization = _CHOICES[trained]
        loaded = load_model(self.checkpoint, device=device, quantization=quantization)
        keep_as_quantized(loaded.model)
        if trained not in (None, loaded.quantization):
            log.warning(
                "the adapter was trained on %s and is merged into %s", trained, loaded.quantization
            )
        return loaded


# a card's quantization -> how to ask for it; all others are what the base's files ask for
_CHOICES: dict[str | None, QuantizationChoice] = {"none": "16bit", "nf4+dq": "nf4"}


def _merge(
    source: _Source,
    target: ExportTarget,
    questions: Questions | None,
    *,
    device: str,
    quantization: QuantizationChoice,
) -> Standard | None:
    """Write the merged model; how the adapter answers un-merged, where that is asked."""
    loaded = source.load(device, quantization)
    peft = attach(loaded.model, source.adapter)
    log.info("merging into %s: %s", loaded.quantization, target.merged)
    with target.filling() as folder:
        write_model(folder, peft, source.checkpoint)
    if questions is None:
        return None
    log.info("asking the adapter un-merged")
    return questions.ask(peft, loaded.quantization)


def _judge(standard: Standard, merged: Checkpoint, device: str) -> Check:
    log.info("asking the merged model")
    place = _place(merged, device)
    loaded = load_model(merged, device=place, quantization="16bit")
    check = standard.judge(loaded.model)
    if not check.holds:
        log.warning("%s", check.verdict)
    return check


def _place(merged: Checkpoint, device: str) -> str:
    """The device, or the CPU for a model too large for it in 16 bit."""
    place = resolve_device(device)
    if place.type == "cpu":
        return "cpu"
    free, _ = torch.cuda.mem_get_info(place)
    if fits(estimate_memory(merged, "16bit"), free):
        return str(place)
    log.warning("the merged model is too large for %s: it is asked on the CPU, slowly", place)
    return "cpu"
