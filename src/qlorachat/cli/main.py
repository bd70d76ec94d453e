"""The command table, exit codes, and the one place where errors become a line on stderr."""

import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from qlorachat import __version__
from qlorachat.errors import QlorachatError, UnknownName

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Command:
    """One word after `qlorachat`: a function of that name in a module of this package.

    The module is imported only when the command runs: --help and --version must answer at once.
    """

    name: str
    module: str
    summary: str

    def run(self, arguments: Sequence[str]) -> None:
        """Run with the arguments after the word."""
        module = importlib.import_module(f"qlorachat.cli.{self.module}")
        getattr(module, self.name)(arguments)


COMMANDS = {
    command.name: command
    for command in (
        Command("chat", "chat", "chat in the terminal, or answer one question and leave"),
        Command("serve", "serve", "serve one or more frontends: --frontend NAME"),
        Command("train", "train", "train an adapter on a data set"),
        Command("export", "export", "merge an adapter into its base, in 16 bit or as GGUF"),
        Command("tune", "tune", "measure how a model's NF4 products run best on this card"),
        Command("plugins", "look", "list the installed plugins and what they offer"),
        Command("render", "look", "show the prompt that messages become, as text and token ids"),
        Command("check", "look", "say all that would be refused or warned of in an adapter"),
        Command(
            "cache", "cache", "list or clear what is kept on disk: models, kernels, measurements"
        ),
    )
}

HELP = f"""usage: qlorachat COMMAND [options]

Chat with a 4-bit Llama-style model and its un-merged LoRA adapters.

commands:
{chr(10).join(f"  {command.name:<10}{command.summary}" for command in COMMANDS.values())}

  qlorachat COMMAND --help    the options of a command
  qlorachat --version         the version

exit codes: 0 done; 1 a generation or a training failed; 2 a wrong option, name, dialog or adapter;
3 the model could not be brought or loaded; 4 the address is in use; 130 interrupted
"""


def main(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code. Errors are one line on stderr."""
    logging.basicConfig(level=logging.WARNING, format="qlorachat: %(message)s", stream=sys.stderr)
    logging.getLogger("qlorachat").setLevel(logging.INFO)
    # PEFT 0.21 asks transformers 5 for an attribute that is deprecated there; no user can help it
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    # torch finds its own context by itself, in the thread of the first backward pass
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS", UserWarning)
    if isinstance(sys.stdout, io.TextIOWrapper):  # whose encoding may lack what a model writes
        sys.stdout.reconfigure(errors="replace")
    try:
        _dispatch(arguments)
        sys.stdout.flush()
    except QlorachatError as error:
        print(f"qlorachat: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # the reader of our output left, as `head` does
            print(f"qlorachat: {error}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # what is left of our output would fail again at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def _dispatch(arguments: Sequence[str]) -> None:
    word = arguments[0] if arguments else "--help"
    if word in ("-h", "--help"):
        print(HELP, end="")
    elif word == "--version":
        print(f"qlorachat {__version__}")
    elif word in COMMANDS:
        COMMANDS[word].run(arguments[1:])
    else:
        raise UnknownName("command", word, COMMANDS)
