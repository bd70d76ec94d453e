"""A checkpoint's own chat template: untrusted Jinja that never runs in this process."""

import re
from collections.abc import Iterable, Sequence

from qlorachat.errors import DialogError
from qlorachat.messages import Message
from qlorachat.protocols import Segment, Tokenizer
from qlorachat.templates.dialog import check_end
from qlorachat.templates.renderer import Renderer, Rendering
from qlorachat.templates.skeleton import Skeleton, StandIns, fill, split_controls, to_segments

_TAGS = re.compile(r"\[/?INST\]|<</?SYS>>|<\|\w+\|>")  # what formats write as plain text
_OTHER = "choose another with --template (in code, template=)"


class CheckpointTemplate:
    """The chat template that came with the model, as transformers would render it.

    Contents are plain text where the template is shown to pass them through: with random words in
    their place it renders the same twice, and the real contents in those places (whole or
    stripped) give the real rendering. Where that fails, contents that hold a control token's name
    are refused.
    """

    name = "checkpoint"
    summary = "the checkpoint's own chat template, in a sandbox"
    models: Sequence[str] = ()

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        tokens = {
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "pad_token": tokenizer.pad_token,
            "unk_token": tokenizer.unk_token,
        }
        variables = {name: token for name, token in tokens.items() if token is not None}
        self._renderer = Renderer(source, variables)
        self._controls = _any_of(tokenizer.control_tokens)
        tags = set(_TAGS.findall(source)) - set(tokenizer.control_tokens)
        self.reserved: Sequence[str] = tuple(sorted(tags))

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        """The rendering in segments; answers are trained up to the control token that ends them.

        Raises DialogError for what the template refuses, for contents that cannot be told from
        control tokens, and when the template fails or goes beyond its limits.
        """
        check_end(messages, add_generation_prompt=add_generation_prompt)
        stand_ins = StandIns.make(messages), StandIns.make(messages)
        real, *trials = self._renderer.render(
            [
                _dialog(messages, [message.content for message in messages]),
                *(_dialog(messages, words.contents) for words in stand_ins),
            ],
            add_generation_prompt=add_generation_prompt,
        )
        text = _text(real)
        skeleton = _agreed(stand_ins, trials)
        if skeleton is not None and fill(skeleton, messages) == text:
            return to_segments(skeleton, messages, self._controls)
        self._check_unproven(messages, text, trials, for_training=not add_generation_prompt)
        return [segment for segment in split_controls(text, self._controls) if segment.text]

    def _check_unproven(
        self,
        messages: Sequence[Message],
        text: str,
        trials: Sequence[Rendering],
        *,
        for_training: bool,
    ) -> None:
        """DialogError for training, and where a control token is or may be the contents' own."""
        if for_training:
            raise DialogError(
                "The checkpoint's chat template changes the messages, so its answers cannot be "
                f"told apart for training: {_OTHER}.",
                param="template",
            )
        held = any(self._controls.search(message.content) for message in messages)
        written = self._controls.findall(text)
        expected = [self._controls.findall(trial.get("text", "")) for trial in trials]
        if held or any(controls != written for controls in expected):
            raise DialogError(
                "The messages hold special tokens, and the checkpoint's chat template cannot be "
                f"shown to pass them through unchanged: take them out, or {_OTHER}.",
                param="messages",
            )


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the names, the longest first, in one group; nothing when there are none."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _dialog(messages: Sequence[Message], contents: Sequence[str]) -> list[dict[str, str]]:
    return [
        {"role": message.role, "content": content}
        for message, content in zip(messages, contents, strict=True)
    ]


def _agreed(stand_ins: Sequence[StandIns], trials: Sequence[Rendering]) -> Skeleton | None:
    """The skeleton that all trials show, if they show the same."""
    if not all("text" in trial for trial in trials):
        return None
    pairs = zip(stand_ins, trials, strict=True)
    first, *others = (words.skeleton(trial["text"]) for words, trial in pairs)
    return first if all(other == first for other in others) else None


def _text(rendering: Rendering) -> str:
    """The text of a rendering, or a DialogError of one line with the template's own reason."""
    if "text" in rendering:
        return rendering["text"]
    if "refused" in rendering:
        raise DialogError(
            f"The checkpoint's chat template refuses this dialog: {rendering['refused']}",
            param="messages",
        )
    raise DialogError(
        f"The checkpoint's chat template fails ({rendering['failed']}): {_OTHER}.",
        param="template",
    )
