"""Where the chat reads and writes: given as one value, so that tests can bring their own."""

import os
import sys
from dataclasses import dataclass

from prompt_toolkit.input import Input, create_input
from prompt_toolkit.output import Output, create_output
from rich.console import Console
from rich.text import Text

from qlorachat_cli.answers import AnswerView, MarkdownView, PlainView, visible


@dataclass(frozen=True, slots=True)
class Terminal:
    """The entry line's input and output, and a console for each kind of text."""

    input: Input
    output: Output
    answers: Console
    notices: Console
    errors: Console
    is_terminal: bool  # whether answers are seen by a person
    can_redraw: bool  # whether rows on the screen can be replaced

    @classmethod
    def standard(cls) -> "Terminal":
        """The process's own; with a redirected stdout, answers alone go there."""
        seen = sys.stdout.isatty()
        people = sys.stdout if seen else sys.stderr
        return cls(
            input=create_input(),
            output=create_output(people),
            answers=Console(file=sys.stdout, highlight=False),
            notices=Console(file=people, highlight=False),
            errors=Console(file=sys.stderr, highlight=False),
            is_terminal=seen,
            can_redraw=seen and os.environ.get("TERM") != "dumb",
        )

    def answer_view(self, *, markdown: bool) -> AnswerView:
        """A place for the next answer."""
        if markdown and self.can_redraw:
            return MarkdownView(self.answers)
        return PlainView(self.answers, is_terminal=self.is_terminal)

    def notice(self, text: str) -> None:
        """Say something about the chat."""
        self.notices.print(Text(visible(text), style="dim"), soft_wrap=True)

    def error(self, error: Exception) -> None:
        """One line about what went wrong."""
        line = " ".join(visible(str(error)).split())
        self.errors.print(Text(line, style="red"), soft_wrap=True)
