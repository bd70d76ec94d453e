"""The entry line: editing, history, completion, and the keys pressed while an answer runs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys

from qlorachat_cli.commands import COMMANDS, Desk, is_command
from qlorachat_cli.storage import Storage
from qlorachat_cli.terminal import Terminal

MENU_ROWS = 6


class Editor:
    """Reads what the person types; never full-screen, so that input methods work."""

    def __init__(self, terminal: Terminal, storage: Storage, desk: Callable[[], Desk]) -> None:
        self.many_lines = False  # Enter starts a new line, and Alt-Enter sends
        self._input: Input = terminal.input
        self._session: PromptSession[str] = PromptSession(
            input=terminal.input,
            output=terminal.output,
            history=_history(storage),
            completer=CommandCompleter(desk),
            key_bindings=self._keys(),
            multiline=True,
            prompt_continuation="… ",
            reserve_space_for_menu=MENU_ROWS,
        )

    async def read(self, prompt: str, text: str) -> str:
        """What was typed, starting from `text`; EOFError when the person leaves.

        Bytes that were no text (a broken paste) become `?`.
        """
        line = await self._session.prompt_async(prompt, default=text)
        return line.encode(errors="replace").decode()

    def keys_unechoed(self) -> AbstractContextManager[None]:
        """The terminal neither echoes keys, which would tear an answer, nor acts on them."""
        return self._input.raw_mode()

    @contextmanager
    def watch(self, interrupt: Callable[[], object]) -> Iterator[None]:
        """While an answer runs: Ctrl-C calls `interrupt`, all else waits for the next entry."""

        def keys_ready() -> None:
            pressed = self._input.read_keys()
            if any(press.key == Keys.ControlC for press in pressed):
                interrupt()
            kept = [press for press in pressed if press.key != Keys.ControlC]
            store_typeahead(self._input, kept)

        with self._input.attach(keys_ready):
            yield

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()
        entry = has_focus(DEFAULT_BUFFER)

        @keys.add(Keys.Enter, filter=entry)
        def enter(event: KeyPressEvent) -> None:
            self._send_or_break(event, sends=not self.many_lines)

        @keys.add(Keys.Escape, Keys.Enter, filter=entry)
        def alt_enter(event: KeyPressEvent) -> None:
            self._send_or_break(event, sends=self.many_lines)

        @keys.add(Keys.ControlC, filter=entry)
        @keys.add(Keys.SIGINT)
        def interrupt(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.app.exit(result="")
            else:
                event.app.exit(exception=EOFError())

        return keys

    def _send_or_break(self, event: KeyPressEvent, *, sends: bool) -> None:
        if sends:
            event.current_buffer.validate_and_handle()
        else:
            event.current_buffer.newline(copy_margin=False)


class CommandCompleter(Completer):
    """Command names, and what may follow each."""

    def __init__(self, desk: Callable[[], Desk]) -> None:
        self._desk = desk

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        line = document.text_before_cursor
        if not is_command(line):
            return
        word, space, argument = line[1:].partition(" ")
        if not space:
            yield from self._names(word)
        elif command := COMMANDS.get(word):
            last = argument.rpartition(" ")[2]
            for candidate in command.candidates(self._desk()):
                if candidate.startswith(last):
                    yield Completion(candidate, -len(last))

    def _names(self, start: str) -> Iterator[Completion]:
        texts = self._desk().texts
        for command in COMMANDS.values():
            if command.name.startswith(start):
                yield Completion(
                    command.name,
                    -len(start),
                    display=command.word,
                    display_meta=command.summary(texts),
                )


def _history(storage: Storage) -> History:
    return FileHistory(storage.history) if storage.history else InMemoryHistory()
