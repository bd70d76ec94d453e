"""Meta's Llama-2 chat format, exact to the token, and ELYZA's preset of it.

Source: `chat_completion` in llama/generation.py of github.com/meta-llama/llama. Every round is
encoded on its own between BOS and EOS; the tags are ordinary text, hence reserved.
"""

from collections.abc import Sequence

from qlorachat.errors import DialogError
from qlorachat.messages import Message
from qlorachat.protocols import Segment, Tokenizer
from qlorachat.templates.dialog import Round, split_rounds

BOS = Segment("<s>", control=True)
EOS = Segment("</s>", control=True, trained=True)
LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

# text -> how its ids begin with the tokenizer that Llama-2 was trained with
_KNOWN_IDS = {
    "[INST] Hi [/INST]": [518, 25580, 29962, 6324, 518, 29914, 25580, 29962],
    "[INST]  [/INST]": [518, 25580, 29962, 29871, 518, 29914, 25580, 29962],
}


def check_llama2_tokenizer(tokenizer: Tokenizer) -> None:
    """DialogError unless the tokenizer gives Llama-2's ids for Llama-2's tags."""
    for text, expected in _KNOWN_IDS.items():
        ids, _ = tokenizer.encode(text)
        if ids != expected:
            raise DialogError(
                f"The template doesn't fit this tokenizer: `{text}` has the ids {ids}, but "
                f"Llama-2's are {expected}. Use a Llama-2 model whose folder holds its "
                "tokenizer.model or tokenizer.json, or choose another --template.",
                param="template",
            )


class Llama2:
    """`[INST] <<SYS>>system<</SYS>>user [/INST] answer`, contents stripped as Meta's code does."""

    name = "llama2"
    summary = "Llama-2 chat, as Meta's reference code has it"
    reserved: Sequence[str] = LLAMA2_TAGS
    models: Sequence[str] = ("*Llama-2-*-chat*",)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """DialogError unless the ids would be Meta's."""
        check_llama2_tokenizer(tokenizer)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        """The rounds as Meta has them; an answer is trained with the spaces around it and its EOS.

        Raises DialogError unless user and assistant alternate after at most one system message.
        """
        system, rounds = split_rounds(messages, add_generation_prompt=add_generation_prompt)
        segments: list[Segment] = []
        for user, answer in _with_system(system, rounds):
            segments += [BOS, Segment(f"[INST] {user.strip()} [/INST]", first=True)]
            if answer is not None:
                segments += [Segment(f" {answer.strip()} ", trained=True), EOS]
        return segments


class Elyza:
    """ELYZA's instruct models: Llama-2's format with a default system prompt, nothing stripped.

    The card (elyza/ELYZA-japanese-Llama-2-7b-instruct) shows one turn and ends it with a space
    after `[/INST]`. Earlier rounds have Llama-2's structure around it: that same space, the
    answer, a space, EOS. The space before an answer belongs to the prompt, so it is not trained,
    nor is a first word that the tokenizer fuses with it (Japanese ones it does not).
    """

    name = "elyza"
    summary = "ELYZA-japanese-Llama-2 instruct, as its model card has it"
    reserved: Sequence[str] = LLAMA2_TAGS
    models: Sequence[str] = ("*ELYZA-japanese-Llama-2-*instruct*",)
    default_system = "あなたは誠実で優秀な日本人のアシスタントです。"

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """DialogError unless the ids would be Llama-2's."""
        check_llama2_tokenizer(tokenizer)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        """The rounds as the class describes; an answer is trained with the space and EOS after it.

        Raises DialogError unless user and assistant alternate after at most one system message.
        """
        system, rounds = split_rounds(messages, add_generation_prompt=add_generation_prompt)
        system = self.default_system if system is None else system
        segments: list[Segment] = []
        for user, answer in _with_system(system, rounds):
            segments += [BOS, Segment(f"[INST] {user} [/INST] ", first=True)]
            if answer is not None:
                segments += [Segment(f"{answer} ", trained=True), EOS]
        return segments


def _with_system(system: str | None, rounds: list[Round]) -> list[Round]:
    """The rounds with the system prompt at the head of the first user message."""
    if system is None:
        return rounds
    (user, answer), *later = rounds
    return [(f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}", answer), *later]
