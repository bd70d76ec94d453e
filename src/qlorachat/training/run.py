"""`train`: from a data set to an adapter that ChatEngine serves; the order of a run's stages."""

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
from qlorachat.training.data.batches import Schedule
from qlorachat.training.data.preview import preview
from qlorachat.training.memory.limits import cap_process, check_fits, memory_limit, what_would_fit
from qlorachat.training.memory.measure import Measurement, measure
from qlorachat.training.memory.plan import MemoryPlan, optimizer_name, predict
from qlorachat.training.memory.shape import ModelShape
from qlorachat.training.model import TrainedModel, attach_adapter, load_base
from qlorachat.training.places import local_path
from qlorachat.training.preparation import Preparation, prepare
from qlorachat.training.run_folder import RunFolder
from qlorachat.training.saves import Saves
from qlorachat.training.stopping import stop_on_interrupt
from qlorachat.training.trainer import Trainer, make_optimizer, unpaged
from qlorachat.training.watchers.progress import Progress
from qlorachat.training.watchers.reporter import Reporter, versions
from qlorachat.training.watchers.tensorboard import TensorBoard
from qlorachat.training.wording import duration


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
    folder = RunFolder(local_path(asked.output, param="output"))
    marks: dict[str, str | None] = {}
    if resume:
        asked, marks = folder.resumed(asked)
    elif not dry_run:
        folder.check_free(asked, overwrite=overwrite)
    device = resolve_device(asked.device)
    limit = memory_limit(asked.memory, device)
    prepared = prepare(asked, plugins or create_manager())
    prepared.check_unchanged(marks)
    screen.print(
        preview(
            prepared.rows,
            prepared.samples,
            prepared.tokenizer,
            max_length=prepared.config.max_length,
            held_out=prepared.held_out,
        )
    )
    loaded, model, measurement = _open(prepared, screen, device, limit)
    screen.print(measurement.plan)
    screen.print(_estimate(prepared, measurement), style="dim")
    card = _card(prepared, loaded)
    saves = Saves(folder.checkpoints, card, keep=prepared.config.keep)
    trainer = Trainer(model, prepared.data, prepared.config, saves, prepared.chats)
    if dry_run:
        return None
    if not resume:
        folder.begin(asked, prepared.marks, overwrite=overwrite)
    with folder.lock():
        folder.sweep()
        if resume and (save := saves.newest()):
            trainer.resume(save)
        reporter = Reporter(folder, prepared, loaded, measurement.plan)
        _run(trainer, folder, reporter, screen, prepared.data.schedule)
        chosen = None
        if trainer.finished:
            chosen = trainer.choose()
            folder.finish(model.peft, card)
        reporter.end(trainer.history, finished=trainer.finished)
    result = _result(folder, trainer)
    screen.print(_last_words(result, chosen), soft_wrap=True)
    return result


def _open(
    prepared: Preparation, screen: Console, device: torch.device, limit: int | None
) -> tuple[LoadedModel, TrainedModel, Measurement]:
    """The model, once the plan says that it fits into `limit` bytes; the plan then measured."""
    config = prepared.config
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton's kernels run on the current one
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
    """What the optimizer keeps, by a step that changes nothing: of rate 0, on zero gradients.

    Paged states count as others do; bitsandbytes would not free trial ones.
    """
    name = unpaged(optimizer_name(config, device.type))
    idle = config.model_copy(update={"learning_rate": 0.0, "optimizer": name})
    optimizer = make_optimizer(parameters, idle, device)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"The optimizer {name} cannot be used on {device}: {reason}", param="optimizer"
        ) from error
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def _run(
    trainer: Trainer, folder: RunFolder, reporter: Reporter, screen: Console, schedule: Schedule
) -> None:
    """Train what is left of the run, before everybody's eyes."""
    done = len(trainer.history.steps)
    tensorboard = TensorBoard(folder.checkpoints / "tensorboard", done=done)
    progress = Progress(screen, total_steps=len(schedule.steps), tokens=schedule.tokens, done=done)
    with progress, closing(tensorboard), stop_on_interrupt(progress.note) as stop:
        trainer.run(stop, (progress, tensorboard, reporter))


def _estimate(prepared: Preparation, measurement: Measurement) -> str:
    """How long the passes take, if all are like the median one."""
    seconds = prepared.passes * measurement.seconds
    return (
        f"{len(prepared.data.schedule.steps):,} steps in {prepared.passes:,} passes: about "
        f"{duration(seconds)}, at {measurement.tokens_per_second:,.0f} tokens/s."
    )


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


def _last_words(result: TrainResult, best: int | None) -> Text:
    """What there is now and what to type next; `best` is the step that early stopping chose."""
    if not result.finished:
        return Text(f"Saved. Go on with: qlorachat train --resume --output {result.output}")
    chosen = "" if best is None else f" (of step {best}, the best)"
    return Text(
        f"The adapter{chosen} is in {result.output}, the report in {result.report}.\n"
        f"Chat with it: qlorachat chat --adapter {result.output}"
    )
