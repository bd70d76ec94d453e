"""The shape of a dialog, which every prompt format checks before it renders one."""

from collections.abc import Sequence
from itertools import cycle, zip_longest

from qlorachat.errors import DialogError
from qlorachat.messages import Message, Role

Round = tuple[str, str | None]  # a user's message and its answer, which the last one may lack


def check_end(messages: Sequence[Message], *, add_generation_prompt: bool) -> None:
    """DialogError unless the dialog ends as `Template.render` wants it."""
    if not messages:
        raise DialogError("The dialog is empty: give at least one user message.", param="messages")
    wanted: Role = "user" if add_generation_prompt else "assistant"
    if (role := messages[-1].role) != wanted:
        purpose = "be answered" if add_generation_prompt else "be complete"
        raise DialogError(
            f"The dialog must end with the {wanted}'s turn to {purpose}, but its last message is "
            f"the {role}'s.",
            param="messages",
        )


def split_rounds(
    messages: Sequence[Message], *, add_generation_prompt: bool
) -> tuple[str | None, list[Round]]:
    """The system prompt, if any, and the rounds of a dialog in which user and assistant alternate.

    Raises DialogError for any other dialog.
    """
    check_end(messages, add_generation_prompt=add_generation_prompt)
    system = messages[0].content if messages[0].role == "system" else None
    first = 0 if system is None else 1
    wanted_roles = cycle(("user", "assistant"))
    for index, (message, wanted) in enumerate(zip(messages[first:], wanted_roles), first):  # noqa: B905
        if message.role != wanted:
            raise DialogError(
                f"messages[{index}] is the {message.role}'s turn where the {wanted}'s belongs: "
                "user and assistant alternate, after at most one system message at the start.",
                param="messages",
            )
    contents = [message.content for message in messages[first:]]
    return system, list(zip_longest(contents[::2], contents[1::2]))
