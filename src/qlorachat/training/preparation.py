"""Everything a run needs to know before the base's weights are read."""

import hashlib
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qlorachat.adapters import AdapterCard
from qlorachat.adapters.card import read_card
from qlorachat.adapters.config import read_config as read_adapter_config
from qlorachat.checkpoints import Checkpoint, locate, read_tokenizer
from qlorachat.checkpoints.checkpoint import weight_files
from qlorachat.config import DEMO_MODEL
from qlorachat.errors import ConfigError
from qlorachat.plugins import PluginHost
from qlorachat.protocols import Template, Tokenizer
from qlorachat.templates import TemplateChoice
from qlorachat.training.chats import SampleChats, sample_chats
from qlorachat.training.config import TrainConfig
from qlorachat.training.data.batches import MicroBatch, plan_evaluation, plan_schedule
from qlorachat.training.data.rows import BadRow, Row, Rows, read_rows
from qlorachat.training.data.samples import Samples, build_samples
from qlorachat.training.trainer import Data

log = logging.getLogger(__name__)

MOST_HELD_OUT = 256  # rows; more tell little and cost each evaluation


@dataclass(frozen=True, slots=True)
class Preparation:
    """The base by its files, the data as token ids, and every micro-batch of the run."""

    config: TrainConfig
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    template: Template
    init_adapter: Path | None
    rows: Rows  # those to evaluate on too; the hash is of what is learned
    fingerprint: str  # of all data
    samples: Samples
    held_out: Samples
    data: Data
    chats: SampleChats | None

    @property
    def marks(self) -> dict[str, str | None]:
        """By which a run that is resumed knows its data and its base again."""
        return {
            "data": self.fingerprint,
            "base": _hash_base(self.checkpoint.folder),
            "revision": self.checkpoint.revision,
        }

    def check_unchanged(self, begun: Mapping[str, str | None]) -> None:
        """ConfigError for a run that began, by its marks, with other data or another base."""
        for what, param in (("data", "data"), ("base", "model")):
            if begun.get(what) not in (None, self.marks[what]):
                raise ConfigError(
                    f"The {what} has changed since the run began: bring its old contents back, or "
                    "begin anew with --overwrite.",
                    param=param,
                )

    @property
    def planned(self) -> TrainConfig:
        """The config as memory is planned by it: an initial adapter brings its own rank."""
        own = self.init_adapter and read_adapter_config(self.init_adapter)
        return self.config.model_copy(update={"rank": own.r}) if own else self.config

    @property
    def longest(self) -> MicroBatch:
        """The pass with the most tokens, padding included."""
        return self._by_size()[-1]

    @property
    def median(self) -> MicroBatch:
        """The pass that half of all are larger than."""
        passes = self._by_size()
        return passes[len(passes) // 2]

    @property
    def passes(self) -> int:
        """How many there are in the run."""
        return len(self._passes())

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row of any pass, padding included."""
        return max(self._width(micro_batch) for micro_batch in self._passes())

    def _passes(self) -> Sequence[MicroBatch]:
        return [micro for step in self.data.schedule.steps for micro in step]

    def _by_size(self) -> list[MicroBatch]:
        return sorted(self._passes(), key=lambda micro: len(micro) * self._width(micro))

    def _width(self, micro_batch: MicroBatch) -> int:
        samples = self.data.samples
        return max(sum(len(samples[index].ids) for index in pack) for pack in micro_batch)


def prepare(config: TrainConfig, plugins: PluginHost) -> Preparation:
    """Bring the base's files and the data, and plan the run; no weights are read.

    Raises ConfigError, ModelError, HubError, UnknownName: one line each.
    """
    if (data := config.data) is None:
        raise ConfigError("There is no data to learn: give --data FILE.", param="data")
    model = DEMO_MODEL if config.model is None else config.model
    checkpoint = locate(model, revision=config.revision, offline=config.offline)
    config = _fit_context(config, checkpoint)
    tokenizer = read_tokenizer(checkpoint.folder)
    template = TemplateChoice(
        plugins.templates(),
        model_name=checkpoint.name,
        chat_template=checkpoint.chat_template,
        tokenizer=tokenizer,
    ).choose(config.template)
    init = config.init_adapter and plugins.locate_adapter(
        config.init_adapter, offline=config.offline
    )
    if init:
        _say_what_differs(init, template, config)
    rows = _read(data, config)
    apart = _read(config.eval_data, config) if config.eval_data else None
    learned, held_out = (rows.rows, apart.rows) if apart else _split(rows.rows, config)
    samples = _build(learned, template, tokenizer, config)
    judged = _build(held_out, template, tokenizer, config)
    _refuse_too_little(config, rows, samples, judged)
    fingerprint = " ".join(each.sha256 for each in (rows, apart) if each)
    if apart:
        judged = replace(judged, bad=tuple(_of(apart.name, judged.bad)))
        rows = _joined(rows, apart)
    shown, built = (held_out, judged) if judged.samples else (learned, samples)
    usable = {sample.line for sample in built.samples}
    planned = Data(
        samples=samples.samples,
        schedule=plan_schedule([len(each.ids) for each in samples.samples], config),
        evaluation_samples=judged.samples,
        evaluation=plan_evaluation([len(each.ids) for each in judged.samples], config),
        pad_id=min(checkpoint.end_tokens(tokenizer), default=0),
    )
    return Preparation(
        config=config,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        template=template,
        init_adapter=init or None,
        rows=rows,
        samples=samples,
        held_out=judged,
        data=planned,
        fingerprint=fingerprint,
        chats=sample_chats(
            [row for row in shown if row.line in usable],
            checkpoint,
            template,
            tokenizer,
            config,
        ),
    )


def _refuse_too_little(config: TrainConfig, rows: Rows, samples: Samples, judged: Samples) -> None:
    """ConfigError when nothing can be learned, or nothing tells early stopping when to stop."""
    if not samples.samples:
        first = (*rows.bad, *samples.bad)[0]
        raise ConfigError(
            f"{config.data} has no row to learn; the first, line {first.line}: {first.reason}.",
            param="data",
        )
    if config.early_stopping and not judged.samples:
        raise ConfigError(
            "early_stopping needs rows to evaluate on, and there are none: give --eval-data or a "
            "larger --eval-share.",
            param="early_stopping",
        )


def _say_what_differs(init: Path, template: Template, config: TrainConfig) -> None:
    """A warning where the initial adapter was trained on other prompts than the run's."""
    card = read_card(init) or AdapterCard()
    compared = (
        ("template", card.template, template.name),
        ("system prompt", card.system, config.system),
    )
    for what, before, now in compared:
        if card.template is not None and before != now:
            log.warning("the %s of %s was %r in training and is %r here", what, init, before, now)


def _fit_context(config: TrainConfig, checkpoint: Checkpoint) -> TrainConfig:
    """The config with a max_length that the model's context holds."""
    room = checkpoint.context_length
    if config.max_length <= room:
        return config
    if "max_length" in config.model_fields_set:
        raise ConfigError(
            f"max_length is {config.max_length}, but the context of `{checkpoint.name}` holds "
            f"{room} tokens: lower it.",
            param="max_length",
        )
    return config.model_copy(update={"max_length": room})


def _hash_base(folder: Path) -> str:
    """Of config.json and of each weight file's size and two MiB of it; all of it takes minutes."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            file.seek(size // 2)
            digest.update(file.read(2**20))
    return digest.hexdigest()


def _read(reference: str, config: TrainConfig) -> Rows:
    return read_rows(
        reference, separator=config.separator, system=config.system, offline=config.offline
    )


def _split(rows: Sequence[Row], config: TrainConfig) -> tuple[Sequence[Row], Sequence[Row]]:
    """Rows to learn, and some held out to be judged by."""
    count = min(round(len(rows) * config.eval_share), MOST_HELD_OUT, len(rows) - 1)
    places = set(random.Random(config.seed).sample(range(len(rows)), max(0, count)))  # noqa: S311
    held_out = [row for place, row in enumerate(rows) if place in places]
    return [row for place, row in enumerate(rows) if place not in places], held_out


def _joined(rows: Rows, apart: Rows) -> Rows:
    """The rows to learn and those to evaluate on, for people to see."""
    return replace(
        rows,
        name=f"{rows.name} and {apart.name}",
        rows=(*rows.rows, *apart.rows),
        bad=(*rows.bad, *_of(apart.name, apart.bad)),
    )


def _of(name: str, bad: Iterable[BadRow]) -> Iterator[BadRow]:
    """Bad rows of another file than the data's."""
    return (BadRow(row.line, f"of {name}: {row.reason}") for row in bad)


def _build(
    rows: Sequence[Row], template: Template, tokenizer: Tokenizer, config: TrainConfig
) -> Samples:
    return build_samples(
        rows,
        template,
        tokenizer,
        max_length=config.max_length,
        train_on_prompt=config.train_on_prompt,
        tags=config.tags,
    )
