"""A run's curves as TensorBoard event files."""

from contextlib import suppress
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from qlorachat.training.history import Chat, Evaluation, History, Step


class TensorBoard:
    """Watches a run; look at it with `tensorboard --logdir FOLDER`."""

    def __init__(self, folder: Path, *, done: int) -> None:
        """Events of an earlier part of the run after step `done` are hidden."""
        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def update(self, step: Step) -> None:
        scalars = {
            "train/loss": step.loss,
            "train/learning_rate": step.learning_rate,
            "train/grad_norm": step.grad_norm,
            "train/tokens": step.tokens,
            "memory/bytes": step.memory,
        }
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step.step)

    def evaluated(self, evaluation: Evaluation) -> None:
        self._writer.add_scalar("eval/loss", evaluation.loss, evaluation.step)

    def chats(self, chats: list[Chat]) -> None:
        for index, chat in enumerate(chats):
            text = f"**{chat.prompt}**\n\nbase: {chat.base}\n\nadapter: {chat.answer}"
            self._writer.add_text(f"chats/{index}", text, chat.step)

    def saved(self, history: History) -> None:
        self._writer.flush()

    def note(self, text: str) -> None:
        pass  # not a number

    def close(self) -> None:
        """Write what is left; a full disk costs no more than that."""
        with suppress(OSError):
            self._writer.close()
