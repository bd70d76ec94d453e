"""The / commands: one table from which help and completion derive, and their functions.

A command takes the conversation and returns what should become of it; files are its only effect.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from qlorachat import ModelInfo
from qlorachat.errors import UnknownName, UsageError
from qlorachat_cli import settings
from qlorachat_cli.conversation import Conversation, Draft
from qlorachat_cli.storage import Chats
from qlorachat_cli.tally import Tally, tally_lines
from qlorachat_cli.texts import Texts

SLASH = "/"


@dataclass(frozen=True, slots=True)
class Desk:
    """What a command may look at beside the conversation."""

    adapters: tuple[str, ...]
    info: ModelInfo
    chats: Chats
    tally: Tally
    texts: Texts


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command came to."""

    conversation: Conversation
    notice: str = ""
    ask: Conversation | None = None  # to be answered now; takes its place when that succeeds
    draft: Draft | None = None  # to be put into the entry line
    switches_entry: bool = False  # between one line and many
    leaves: bool = False


Run = Callable[[Conversation, str, Desk], Outcome]
Candidates = Callable[[Desk], Iterable[str]]


def _no_candidates(desk: Desk) -> Iterable[str]:
    return ()


@dataclass(frozen=True, slots=True)
class Command:
    """One row of the table; `usage` follows the name, in brackets where it may be absent."""

    name: str
    usage: str
    run: Run
    candidates: Candidates = _no_candidates

    @property
    def word(self) -> str:
        return SLASH + self.name

    def summary(self, texts: Texts) -> str:
        """One line about the command."""
        return texts[self.word].format(default=settings.DEFAULT)


def is_command(line: str) -> bool:
    """Whether a line is for us; `//` begins a message with one slash."""
    return line.startswith(SLASH) and not line.startswith(SLASH * 2)


def question_of(line: str) -> str:
    """The message that a line sends."""
    return line[1:] if line.startswith(SLASH * 2) else line


def line_of(question: str) -> str:
    """The line that sends a message: the inverse of `question_of`."""
    return SLASH + question if question.startswith(SLASH) else question


def run_command(line: str, conversation: Conversation, desk: Desk) -> Outcome:
    """What a line such as `/adapter zundamon` comes to; a UsageError says what is wrong with it."""
    word, *rest = line.split(maxsplit=1)
    argument = rest[0].strip() if rest else ""
    command = COMMANDS.get(word.removeprefix(SLASH))
    if command is None:
        raise UnknownName("command", word, [known.word for known in COMMANDS.values()])
    if argument and not command.usage:
        raise UsageError(f"{command.word} takes nothing after it.")
    if not argument and command.usage and not command.usage.startswith("["):
        raise UsageError(f"Something is missing: {command.word} {command.usage}")
    return command.run(conversation, argument, desk)


def _help(conversation: Conversation, argument: str, desk: Desk) -> Outcome:
    rows = [(f"{c.word} {c.usage}".rstrip(), c.summary(desk.texts)) for c in COMMANDS.values()]
    width = max(len(usage) for usage, _ in rows) + 2
    lines = [f"{usage:<{width}}{summary}" for usage, summary in rows]
    hints = [desk.texts[f"help.{key}"] for key in ("slash", "newline", "interrupt")]
    return Outcome(conversation, "\n".join((*lines, *hints)))


def _system(conversation: Conversation, argument: str, desk: Desk) -> Outcome:
    key = "system.set" if argument else "system.default"
    return Outcome(replace(conversation, system=argument or None), desk.texts[key])


def _adapter(conversation: Conversation, argument: str, desk: Desk) -> Outcome:
    if argument and argument not in desk.adapters:
        raise UnknownName("adapter", argument, desk.adapters)
    key = "adapter.set" if argument else "adapter.base"
    notice = desk.texts[key].format(name=argument)
    return Outcome(replace(conversation, adapter=argument or None), notice)


def _set(conversation: Conversation, argument: str, desk: Desk) -> Outcome:
    if argument:
        changed = settings.change(conversation.settings, argument, desk.info.vocab_size)
        conversation = replace(conversation, settings=changed)
    values = settings.in_force(conversation.settings, desk.info.sampling)
    names = conversation.settings if argument else values
    mark = f"  ({desk.texts['changed']})"
    lines = [f"{n} = {values[n]}{mark if n in conversation.settings else ''}" for n in names]
    return Outcome(conversation, "\n".join(lines))


def _retry(conversation: Conversation, argument: str, desk: Desk) -> Outcome:
    _question(conversation)
    return Outcome(conversation, ask=conversation.without_answer())


def _undo(conversation: Conversation, argument: str, desk: Desk) -> Outcome:
    question = _shortened(_question(conversation))
    return Outcome(conversation.without_turn(), desk.texts["undone"].format(question=question))


def _edit(conversation: Conversation, argument: str, desk: Desk) -> Outcome:
    draft = Draft(line_of(_question(conversation)), conversation.without_turn())
    return Outcome(conversation, desk.texts["editing"], draft=draft)


def _multi(conversation: Conversation, argument: str, desk: Desk) -> Outcome:
    return Outcome(conversation, switches_entry=True)


def _save(conversation: Conversation, argument: str, desk: Desk) -> Outcome:
    saved = desk.chats.save(argument, conversation)
    return Outcome(saved, desk.texts["saved"].format(name=saved.name))


def _load(conversation: Conversation, argument: str, desk: Desk) -> Outcome:
    loaded = desk.chats.load(argument)
    notice = desk.texts["loaded"].format(
        name=loaded.name,
        count=len(loaded.messages),
        question=_shortened(loaded.last_question or ""),
    )
    if loaded.adapter is None or loaded.adapter in desk.adapters:
        return Outcome(loaded, notice)
    current = conversation.adapter or desk.texts["base"]
    missing = desk.texts["loaded.adapter"].format(name=loaded.adapter, current=current)
    return Outcome(replace(loaded, adapter=conversation.adapter), f"{notice}\n{missing}")


def _stats(conversation: Conversation, argument: str, desk: Desk) -> Outcome:
    lines = tally_lines(desk.tally, desk.info, conversation.adapter, desk.texts)
    return Outcome(conversation, lines)


def _exit(conversation: Conversation, argument: str, desk: Desk) -> Outcome:
    return Outcome(conversation, leaves=True)


def _question(conversation: Conversation) -> str:
    if conversation.last_question is None:
        raise UsageError("There is no message yet.")
    return conversation.last_question


def _shortened(text: str, length: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[:length]}…"


def _setting_candidates(desk: Desk) -> Iterable[str]:
    choices = [f"overflow={choice}" for choice in settings.OVERFLOW]
    return [*(f"{name}=" for name in settings.NAMES if name != "overflow"), *choices]


COMMANDS = {
    command.name: command
    for command in (
        Command("system", "[TEXT]", _system),
        Command("adapter", "[NAME]", _adapter, lambda desk: desk.adapters),
        Command("set", "[SETTING=VALUE]", _set, _setting_candidates),
        Command("retry", "", _retry),
        Command("undo", "", _undo),
        Command("edit", "", _edit),
        Command("multi", "", _multi),
        Command("save", "NAME", _save, lambda desk: desk.chats.names()),
        Command("load", "NAME", _load, lambda desk: desk.chats.names()),
        Command("stats", "", _stats),
        Command("help", "", _help),
        Command("exit", "", _exit),
    )
}
