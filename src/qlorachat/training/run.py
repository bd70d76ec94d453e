"""`train`: from a data set to an adapter that ChatEngine serves; the order of a run's stages."""

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from qlorachat.adapters import AdapterCard
from qlorachat.checkpoints import LoadedModel
from qlorachat.checkpoints.load import resolve_device
from qlorachat.checkpoints.memory import count_bytes
from qlorachat.config import check
from qlorachat.errors import ConfigError
from qlorachat.plugins import PluginHost, create_manager
from qlorachat.training.config import TrainConfig
from qlorachat.training.data.preview import preview
from qlorachat.training.memory.limits import cap_process, check_fits, memory_limit, what_would_fit
from qlorachat.training.memory.measure import Measurement, measure
from qlorachat.training.memory.plan import MemoryPlan, predict
from qlorachat.training.memory.shape import ModelShape
from qlorachat.training.model import TrainedModel, attach_adapter, load_base
from qlorachat.training.preparation import Preparation, prepare
from qlorachat.training.run_folder import RunFolder
from qlorachat.training.saves import Saves
from qlorachat.training.stopping import stop_on_interrupt
from qlorachat.training.trainer import Trainer, make_optimizer
from qlorachat.training.watchers.progress import Progress
from qlorachat.training.watchers.reporter import Reporter, versions
from qlorachat.training.watchers.tensorboard import TensorBoard

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What came out of a run; `finished` is False for one that was interrupted."""

    output: Path
    report: Path
    finished: bool
    steps: int
    loss: float | None  # of the last step
    evaluation_loss: float | None  # the lowest
    tokens: int
    seconds: float
    peak_memory: int  # bytes


def train(
    config: TrainConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
    plugins: PluginHost | None = None,
    **options: Any,
) -> TrainResult | None:
    """Train an adapter; `options` are TrainConfig's fields. None after `dry_run`'s plan.

    `resume` goes on with the run in `output`, `overwrite` lets a new one take its place. Progress
    goes to `console`, by default stderr. Ctrl-C saves and ends the run in order. Raises
    ConfigError, ModelError, HubError, AdapterError and UnknownName before the first step,
    TrainingFailed (the loss is no number, out of memory) and SaveFailed in it; what was saved
    stays.

    >>> train(data="rows.jsonl", output="qlora-model")  # doctest: +SKIP
    """
    if config is not None and options:
        raise ConfigError("Pass a TrainConfig or single options, not both.")
    asked = config or check(TrainConfig, options)
    screen = console or Console(stderr=True)
    folder = RunFolder(Path(asked.output))
    recorded = None
    if resume:
        asked, recorded = folder.resumed(asked)
    elif not dry_run:
        folder.check_free(overwrite=overwrite)
    prepared = prepare(asked, plugins or create_manager())
    if recorded not in (None, prepared.rows.sha256):
        raise ConfigError(
            f"{asked.data} has changed since the run in {folder.output} began: bring its old "
            "contents back, or begin anew with --overwrite.",
            param="data",
        )
    screen.print(
        preview(
            prepared.rows,
            prepared.samples,
            prepared.tokenizer,
            max_length=prepared.config.max_length,
            held_out=prepared.held_out,
        )
    )
    loaded, model, measurement = _open(prepared, screen)
    screen.print(measurement.plan)
    if dry_run:
        return None
    if resume:
        folder.sweep()
    else:
        folder.begin(asked, prepared.rows.sha256)
    return _run(prepared, loaded, model, measurement, folder, screen)


def _open(prepared: Preparation, screen: Console) -> tuple[LoadedModel, TrainedModel, Measurement]:
    """The model, once the plan says that it fits; the plan then measured."""
    config = prepared.config
    device = resolve_device(config.device)
    limit = memory_limit(config.memory, device)
    shape = ModelShape.of(prepared.checkpoint, config.quantization)
    asked, longest, kind = prepared.planned, prepared.longest_row, device.type
    plan = predict(shape, asked, longest=longest, device_type=kind, limit=limit)
    screen.print(plan)
    check_fits(plan, what_would_fit(shape, asked, longest=longest, device_type=kind, limit=limit))
    cap_process(limit, device)
    loaded = load_base(prepared.checkpoint, config)
    weights = count_bytes(loaded.model)
    model = attach_adapter(loaded, prepared.checkpoint, config, prepared.init_adapter)
    return loaded, model, _measure(prepared, plan, model, weights)


def _measure(
    prepared: Preparation, plan: MemoryPlan, model: TrainedModel, weights: int
) -> Measurement:
    """The plan beside what two passes and one empty optimizer step take."""
    parameters = list(model.parameters().values())
    adapter = sum(parameter.nbytes for parameter in parameters)

    def step(batch: dict[str, torch.Tensor]) -> None:
        model.loss(batch).backward()

    measurement = measure(
        plan,
        step=step,
        longest=prepared.data.batch(prepared.longest),
        median=prepared.data.batch(prepared.median),
        static={
            "base weights": weights,
            "adapter and gradients": 2 * adapter,
            "optimizer": _optimizer_bytes(parameters, prepared.config, model.device),
        },
        device=model.device,
    )
    for parameter in parameters:
        parameter.grad = None
    return measurement


def _optimizer_bytes(
    parameters: Sequence[torch.nn.Parameter], config: TrainConfig, device: torch.device
) -> int:
    """What the optimizer keeps, by a step that changes nothing: of rate 0, on zero gradients."""
    idle = config.model_copy(update={"learning_rate": 0.0})
    optimizer = make_optimizer(parameters, idle, device)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def _run(
    prepared: Preparation,
    loaded: LoadedModel,
    model: TrainedModel,
    measurement: Measurement,
    folder: RunFolder,
    screen: Console,
) -> TrainResult:
    """Train what is left of the run, then write the adapter, if it came to its end."""
    config = prepared.config
    card = _card(prepared, loaded)
    saves = Saves(folder.checkpoints, card, keep=config.keep)
    save = saves.newest()
    tensorboard = TensorBoard(
        folder.checkpoints / "tensorboard", first_step=save.step if save else 0
    )
    reporter = Reporter(folder, prepared, loaded, measurement.plan)
    schedule = prepared.data.schedule
    progress = Progress(screen, total_steps=len(schedule.steps), tokens=schedule.tokens)
    watchers = (progress, tensorboard, reporter)
    trainer = Trainer(model, prepared.data, config, saves, watchers, prepared.chats)
    if save is not None:
        trainer.resume(save)
    with progress, closing(tensorboard), stop_on_interrupt() as stop:
        trainer.run(stop)
    if trainer.finished:
        if config.early_stopping is not None:
            trainer.load_best()
        folder.finish(model.peft, card)
    try:
        reporter.write(trainer.history, finished=trainer.finished)
    except OSError as error:
        log.warning("the report %s could not be written: %s", folder.report, error)
    result = _result(folder, trainer)
    screen.print(_last_words(result, trainer.best_step, config), soft_wrap=True)
    return result


def _card(prepared: Preparation, loaded: LoadedModel) -> AdapterCard:
    return AdapterCard(
        template=prepared.template.name,
        system=prepared.config.system,
        base_model=prepared.checkpoint.name,
        revision=prepared.checkpoint.revision,
        quantization=loaded.quantization,
        data_sha256=prepared.rows.sha256,
        versions=versions(),
    )


def _result(folder: RunFolder, trainer: Trainer) -> TrainResult:
    steps, evaluations = trainer.history.steps, trainer.history.evaluations
    last = steps[-1] if steps else None
    return TrainResult(
        output=folder.output,
        report=folder.report,
        finished=trainer.finished,
        steps=last.step if last else 0,
        loss=last.loss if last else None,
        evaluation_loss=min((each.loss for each in evaluations), default=None),
        tokens=last.tokens if last else 0,
        seconds=last.seconds if last else 0.0,
        peak_memory=max((step.memory for step in steps), default=0),
    )


def _last_words(result: TrainResult, best_step: int, config: TrainConfig) -> Text:
    """What there is now and what to type next."""
    if not result.finished:
        return Text(f"Saved. Go on with: qlorachat train --resume --output {result.output}")
    chosen = f" (of step {best_step}, the best)" if config.early_stopping is not None else ""
    return Text(
        f"The adapter{chosen} is in {result.output}, the report in {result.report}.\n"
        f"Chat with it: qlorachat chat --adapter {result.output}"
    )
