"""The chat itself: read a line, run a command or show an answer, until the person leaves."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from typing import Any

from qlorachat import AsyncChatStream, ChatEngine, QlorachatError, Reply
from qlorachat_cli.answers import AnswerView
from qlorachat_cli.commands import Desk, is_command, question_of, run_command
from qlorachat_cli.conversation import Conversation, Draft
from qlorachat_cli.editor import Editor
from qlorachat_cli.plugin import CliOptions
from qlorachat_cli.storage import Storage
from qlorachat_cli.tally import Tally, describe_model, speed_lines
from qlorachat_cli.terminal import Terminal
from qlorachat_cli.texts import Texts, choose_texts

STOP_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Turn:
    """A dialog to be answered, and what goes back to the entry line when that fails."""

    asked: Conversation
    draft: Draft | None


def open_shell(
    engine: ChatEngine, options: CliOptions, stop: Event, terminal: Terminal | None = None
) -> "Shell":
    """A chat with the engine's first adapter, else with its base model."""
    return Shell(
        engine,
        terminal or Terminal.standard(),
        Storage.of(options),
        choose_texts(),
        stop,
        markdown=options.markdown,
    )


class Shell:
    """One person's dialog with an engine."""

    def __init__(
        self,
        engine: ChatEngine,
        terminal: Terminal,
        storage: Storage,
        texts: Texts,
        stop: Event,
        *,
        markdown: bool,
    ) -> None:
        self._engine, self._terminal, self._storage = engine, terminal, storage
        self._texts, self._stop, self._markdown = texts, stop, markdown
        self._conversation = Conversation(adapter=next(iter(engine.adapters), None))
        self._draft: Draft | None = None
        self._tally = Tally()
        self._leaves = False
        self._editor = Editor(terminal, storage, self._desk)

    def run(self) -> None:
        """Talk until the person leaves or the host says stop."""
        self._greet()
        with self._editor.keys_unechoed(), suppress(KeyboardInterrupt), asyncio.Runner() as runner:
            while not self._leaves:  # a run for each step: each handles its own SIGINT
                turn = self._take(runner.run(self._read()))
                if turn:
                    runner.run(self._answer(turn))

    def _greet(self) -> None:
        lines = [describe_model("greeting", self._engine.info, self._texts)]
        if self._engine.adapters:
            lines.append(self._texts["adapters"].format(names=", ".join(self._engine.adapters)))
        self._terminal.notice("\n".join((*lines, self._texts["hint"])))

    async def _read(self) -> str | None:
        """The next line; None when it is time to leave."""
        text = self._draft.text if self._draft else ""
        prompt = f"{self._conversation.adapter or ''}> "
        reading = asyncio.create_task(self._editor.read(prompt, text))
        await self._ended(reading)
        try:
            return reading.result()
        except (EOFError, asyncio.CancelledError):
            return None

    def _take(self, line: str | None) -> Turn | None:
        """What a line asks the model for, if anything."""
        draft, self._draft = self._draft, None
        if line is None:
            self._leaves = True
        elif is_command(line):
            return self._command(line)
        elif line.strip():
            base = draft.base if draft else self._conversation
            return Turn(base.asked(question_of(line)), Draft(line, base))
        return None

    def _command(self, line: str) -> Turn | None:
        try:
            outcome = run_command(line, self._conversation, self._desk())
        except QlorachatError as error:
            self._terminal.error(error)
            return None
        self._conversation, self._draft = outcome.conversation, outcome.draft
        self._leaves = outcome.leaves
        if outcome.switches_entry:
            self._switch_entry()
        if outcome.notice:
            self._terminal.notice(outcome.notice)
        return Turn(outcome.ask, draft=None) if outcome.ask else None

    def _desk(self) -> Desk:
        return Desk(
            adapters=tuple(self._engine.adapters),
            info=self._engine.info,
            chats=self._storage.chats,
            tally=self._tally,
            texts=self._texts,
        )

    def _switch_entry(self) -> None:
        self._editor.many_lines = not self._editor.many_lines
        self._terminal.notice(self._texts["multi.on" if self._editor.many_lines else "multi.off"])

    async def _answer(self, turn: Turn) -> None:
        options: dict[str, Any] = {**turn.asked.settings, "adapter": turn.asked.adapter}
        stream = self._engine.astream(turn.asked.dialog, **options)
        with self._terminal.answer_view(markdown=self._markdown) as view:
            receiving = asyncio.create_task(_receive(stream, view))
            with self._editor.watch(receiving.cancel):
                await self._ended(receiving)
        self._conclude(turn, receiving)

    def _conclude(self, turn: Turn, receiving: asyncio.Task[Reply]) -> None:
        """Keep the answer; a turn that failed or brought no text leaves the dialog as it was."""
        self._draft = turn.draft
        try:
            reply = receiving.result()
        except QlorachatError as error:
            self._terminal.error(error)
        except asyncio.CancelledError:
            self._terminal.notice(self._texts["stopped"])
        else:
            self._keep(turn, reply)

    def _keep(self, turn: Turn, reply: Reply) -> None:
        self._draft = None
        self._conversation = turn.asked.answered(reply.text)
        self._tally = self._tally.after(reply)
        self._terminal.notice(speed_lines(reply, self._engine.info, self._texts))

    async def _ended(self, task: asyncio.Task[Any]) -> None:
        """Wait until the task is done, and cancel it on SIGINT or when the host says stop."""
        with suppress(asyncio.CancelledError):  # SIGINT, where Ctrl-C is not read as a key
            while not self._stop.is_set():
                if (await asyncio.wait({task}, timeout=STOP_POLL_SECONDS))[0]:
                    return
        task.cancel()
        await asyncio.wait({task})


async def _receive(stream: AsyncChatStream, view: AnswerView) -> Reply:
    """Show an answer as it comes; cancelled, stop the model and return the text so far, if any."""
    await stream.open()
    try:
        async with stream:
            async for delta in stream:
                view.feed(delta.text)
    except asyncio.CancelledError:
        if not stream.reply.text:
            raise
    return stream.reply
