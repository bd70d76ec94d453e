"""The loop: planned micro-batches in, an adapter out; at any step it can end and go on unchanged.

Optimizers and schedules are transformers', gradients and loss scaling torch's. The order of samples
is the schedule's, so that a run resumes at its very next micro-batch, knows its remaining tokens,
and evaluates every token once.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import psutil
import torch
from peft import set_peft_model_state_dict
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import Trainer as TransformersTrainer
from transformers import TrainingArguments, get_scheduler
from transformers.integrations.neftune import neftune_post_forward_hook

from qlorachat.errors import ConfigError, QlorachatError
from qlorachat.training.chats import SampleChats
from qlorachat.training.config import TrainConfig
from qlorachat.training.data.batches import MicroBatch, Schedule, collate
from qlorachat.training.data.samples import Sample
from qlorachat.training.history import Chat, Evaluation, History, Step
from qlorachat.training.loss import count_trained
from qlorachat.training.memory.plan import optimizer_name
from qlorachat.training.model import TrainedModel
from qlorachat.training.saves import Save, SaveFailed, Saves, random_state, set_random_state
from qlorachat.training.stopping import StopRequest

log = logging.getLogger(__name__)

# optimizers whose name is more than "paged_" shorter without their pages
_UNPAGED = {
    "adamw": "adamw_torch",
    "adamw_32bit": "adamw_torch",
    "ademamix_32bit": "ademamix",
}


class TrainingFailed(QlorachatError):
    """A run that cannot go on; its checkpoints are whole."""


class Watcher(Protocol):
    """Is told what happens, as it happens."""

    def update(self, step: Step) -> None: ...
    def evaluated(self, evaluation: Evaluation) -> None: ...
    def chats(self, chats: list[Chat]) -> None: ...
    def saved(self, history: History) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Data:
    """What a run learns from and is judged by."""

    samples: Sequence[Sample]
    schedule: Schedule
    evaluation_samples: Sequence[Sample]
    evaluation: Sequence[MicroBatch]
    pad_id: int

    def batch(self, micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
        """The tensors of a training pass."""
        rows = [[self.samples[index] for index in pack] for pack in micro_batch]
        return collate(rows, pad_id=self.pad_id)

    def evaluation_batch(self, micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
        """The tensors of an evaluation pass."""
        rows = [[self.evaluation_samples[index] for index in pack] for pack in micro_batch]
        return collate(rows, pad_id=self.pad_id)


class Trainer:
    """One run over a model; `run` does what is left of it."""

    def __init__(
        self,
        model: TrainedModel,
        data: Data,
        config: TrainConfig,
        saves: Saves,
        chats: SampleChats | None,
    ) -> None:
        self._model = model
        self._data = data
        self._config = config
        self._saves = saves
        self._watchers: list[Watcher] = []
        self._chats = chats
        self._steps = len(data.schedule.steps)
        self._parameters = list(model.parameters().values())
        self._optimizer = make_optimizer(self._parameters, config, model.device)
        self._scheduler = _make_scheduler(self._optimizer, config, self._steps)
        # float16 alone needs its gradients scaled, and a step skipped where that goes too far
        self._scaler = torch.amp.GradScaler(enabled=model.dtype == torch.float16)
        self.history = History()
        self._done = 0  # steps
        self._seconds = 0.0  # of earlier parts of the run
        torch.manual_seed(config.seed)
        self._random = random_state(model.device)  # as the next step begins

    @property
    def best_step(self) -> int:
        """The step of the lowest evaluation loss; 0 before the first evaluation of a step."""
        best = self.history.best
        return best.step if best else 0

    @property
    def finished(self) -> bool:
        """Whether every step is done, or early stopping found that no more are needed."""
        return self._done == self._steps or self._is_stale()

    def resume(self, save: Save) -> None:
        """Go on from a checkpoint as if nothing had happened.

        ConfigError on another kind of device, whose optimizer and random numbers differ.
        """
        state = save.state()
        if state["device"] != self._model.device.type:
            raise ConfigError(
                f"The run was begun on {state['device']}, not {self._model.device.type}: resume it "
                f"with --device {state['device']}.",
                param="device",
            )
        set_peft_model_state_dict(self._model.peft, save.weights())
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self._scaler.load_state_dict(state["scaler"])
        self._random = state["random"]
        set_random_state(self._random, self._model.device)
        self.history = save.history()
        self._done = save.step
        self._seconds = self.history.steps[-1].seconds if self.history.steps else 0.0
        if self._chats is not None:
            self._chats.remember(self.history.chats)

    def choose(self) -> int | None:
        """Take the weights that the run is for: with early stopping the best that are there.

        Their step, None for the last one's. Raises SaveFailed.
        """
        if self._config.early_stopping is None or not self.best_step:
            return None
        best = self._saves.best(self.history)
        set_peft_model_state_dict(self._model.peft, best.weights())
        return best.step

    def run(self, stop: StopRequest, watchers: Sequence[Watcher]) -> None:
        """Train to the end, or until `stop`; both leave a checkpoint of the last whole step.

        Raises TrainingFailed when a loss is no number or memory runs out, and SaveFailed when the
        last checkpoint cannot be written.
        """
        self._watchers = list(watchers)
        self._started = perf_counter()
        with _neftune(self._model, self._config.neftune):
            try:
                if not (self._done or self.history.evaluations or self.history.chats):
                    self._look()
                while not self.finished and not stop.requested:
                    if self._train_step(stop):
                        self._after_step()
            except torch.OutOfMemoryError:
                raise TrainingFailed(
                    f"Out of memory beside the training, after step {self._done}, in an evaluation "
                    f"or a sample chat: --resume with --chat-tokens 0{self._or_smaller_passes()}. "
                    f"{self._last_good()}"
                ) from None
            self._save(must=True)

    def _train_step(self, stop: StopRequest) -> bool:
        """One optimizer step; False when `stop` came meanwhile, and then nothing has changed."""
        _reset_peak(self._model.device)
        micro_batches = self._data.schedule.steps[self._done]
        batches = [self._data.batch(micro_batch) for micro_batch in micro_batches]
        trained = sum(count_trained(batch["labels"]) for batch in batches)
        parts: list[torch.Tensor] = []
        try:
            for batch in batches:
                if stop.requested:
                    self._optimizer.zero_grad()
                    return False
                part = self._model.loss(batch) / trained
                self._scaler.scale(part).backward()
                parts.append(part.detach())
        except torch.OutOfMemoryError:
            raise self._out_of_memory(batches) from None
        loss = float(torch.stack(parts).sum())  # the only wait for a card
        self._scaler.unscale_(self._optimizer)
        norm = float(clip_grad_norm_(self._parameters, self._config.max_grad_norm))
        self._refuse_nan(loss, norm)
        rate = float(self._scheduler.get_last_lr()[0])
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self._scheduler.step()
        self._done += 1
        self._random = random_state(self._model.device)
        self._record(loss, rate, norm)
        return True

    def _record(self, loss: float, rate: float, norm: float) -> None:
        schedule = self._data.schedule
        before = self.history.steps[-1].tokens if self.history.steps else 0
        step = Step(
            step=self._done,
            epoch=schedule.epochs[self._done - 1],
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=before + schedule.tokens[self._done - 1],
            seconds=self._seconds + perf_counter() - self._started,
            memory=peak_memory(self._model.device),
        )
        self.history.steps.append(step)
        self._tell(lambda watcher: watcher.update(step))

    def _after_step(self) -> None:
        last = self._done == self._steps
        best = self.best_step
        if last or self._done % self._config.eval_steps == 0:
            self._evaluate()
        if last or self._done % self._config.chat_steps == 0:
            self._chat()
        if self.best_step != best or self._done % self._config.save_steps == 0:
            self._save(must=False)

    def _look(self) -> None:
        """How it stands before the first step."""
        self._evaluate()
        self._chat()

    def _evaluate(self) -> None:
        if not self._data.evaluation:
            return
        total, count = 0.0, 0
        with self._model.inference():
            for micro_batch in self._data.evaluation:
                batch = self._data.evaluation_batch(micro_batch)
                total += float(self._model.loss(batch))
                count += count_trained(batch["labels"])
        if not math.isfinite(total):
            raise TrainingFailed(
                f"After step {self._done} the evaluation's loss is {total}. {self._last_good()} "
                "Try a lower --learning-rate."
            )
        evaluation = Evaluation(self._done, total / count)
        self.history.evaluations.append(evaluation)
        self._tell(lambda watcher: watcher.evaluated(evaluation))

    def _chat(self) -> None:
        if self._chats is None:
            return
        chats = self._chats.ask(self._model, self._done)
        self.history.chats += chats
        self._tell(lambda watcher: watcher.chats(chats))

    def _is_stale(self) -> bool:
        """Whether early stopping's patience is over."""
        patience, best = self._config.early_stopping, self.best_step
        since = sum(each.step > best for each in self.history.evaluations)
        return patience is not None and best > 0 and since >= patience

    def _save(self, *, must: bool) -> None:
        """A checkpoint of the last whole step; only one that `must` be ends the run by failing."""
        try:
            self._saves.save(self._done, self._model.peft, self._state(), self.history)
        except SaveFailed as error:
            if must:
                raise
            reason = str(error)
            self._tell(lambda watcher: watcher.note(reason))
            return
        self._tell(lambda watcher: watcher.saved(self.history))

    def _tell(self, call: Callable[[Watcher], None]) -> None:
        """What watchers show is not worth a run: one that cannot write is told no more."""
        for watcher in tuple(self._watchers):
            try:
                call(watcher)
            except OSError as error:
                log.warning("%s could not write and rests: %s", type(watcher).__name__, error)
                self._watchers.remove(watcher)

    def _state(self) -> dict[str, Any]:
        return {
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "random": self._random,
            "device": self._model.device.type,
        }

    def _refuse_nan(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and (math.isfinite(norm) or self._scaler.is_enabled()):
            return
        self._keep_done()
        raise TrainingFailed(
            f"At step {self._done + 1} the loss is {loss} and the gradient's norm {norm}: nothing "
            f"was changed by it. {self._last_good()} Try a lower --learning-rate."
        )

    def _out_of_memory(self, batches: Sequence[dict[str, torch.Tensor]]) -> TrainingFailed:
        self._keep_done()
        rows, tokens = max((tuple(b["input_ids"].shape) for b in batches), key=math.prod)
        return TrainingFailed(
            f"Out of memory at step {self._done + 1}, on {rows} rows of {tokens} tokens: begin "
            f"anew with a lower --max-length{self._or_smaller_passes('--resume with ')}. "
            f"{self._last_good()}"
        )

    def _or_smaller_passes(self, how: str = "") -> str:
        """The advice that leaves a step's rows as they are, if there is one."""
        rows = self._config.micro_batch * self._config.accumulation
        smaller = f", or {how}--micro-batch 1 --accumulation {rows}"
        return smaller if self._config.micro_batch > 1 else ""

    def _keep_done(self) -> None:
        """Save the steps before one that failed, which has changed nothing yet."""
        if self._done:
            self._save(must=False)

    def _last_good(self) -> str:
        newest = self._saves.newest()
        if newest is None:
            return "There is no checkpoint yet."
        return f"The last good checkpoint is {newest.folder}."


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], config: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of the config's name, as transformers knows it; else ConfigError."""
    name = optimizer_name(config, device.type)
    if device.type == "cpu":
        name = unpaged(name)
    if "schedule_free" in name:
        raise ConfigError(
            f"The optimizer {name} cannot be used: it must be told of each evaluation and save, "
            "which happens to none here. Take another one, such as adamw_torch.",
            param="optimizer",
        )
    try:
        arguments = TrainingArguments(
            optim=name, learning_rate=config.learning_rate, use_cpu=device.type == "cpu"
        )
        kind, options = TransformersTrainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer: torch.optim.Optimizer = kind(
            parameters, **{**options, "weight_decay": config.weight_decay}
        )
    except (ValueError, ImportError, RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"The optimizer {name} cannot be used on {device}: {reason}", param="optimizer"
        ) from error
    return optimizer


def unpaged(name: str) -> str:
    """The same optimizer with states that stay where they are, as they must without a card."""
    plain = name.removeprefix("paged_")
    return _UNPAGED.get(plain, plain) if plain != name else name


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a card since the step began; on a CPU what is held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident: int = psutil.Process().memory_info().rss
    return resident


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _make_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int
) -> LRScheduler:
    """The schedule of the config's name, as transformers knows it; else ConfigError."""
    try:
        scheduler = get_scheduler(
            config.scheduler,
            optimizer,
            num_warmup_steps=int(config.warmup * steps),
            num_training_steps=steps,
        )
        if isinstance(scheduler, LRScheduler) and not isinstance(scheduler, ReduceLROnPlateau):
            return scheduler
        reason = "it follows a metric, which is not passed to it."
    except (ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
    raise ConfigError(
        f"The scheduler {config.scheduler} cannot be used: {reason}", param="scheduler"
    )


@contextmanager
def _neftune(model: TrainedModel, alpha: float | None) -> Iterator[None]:
    """Noise on the embeddings while training (NEFTune, arXiv:2310.05914)."""
    if alpha is None:
        yield
        return
    embeddings = model.peft.get_base_model().get_input_embeddings()
    embeddings.neftune_noise_alpha = alpha
    hook = embeddings.register_forward_hook(neftune_post_forward_hook)
    try:
        yield
    finally:
        hook.remove()
