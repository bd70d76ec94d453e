"""Sample chats: fixed prompts and seed, the base beside the adapter as it stands."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from qlorachat.checkpoints import Checkpoint
from qlorachat.errors import ConfigError
from qlorachat.messages import Message
from qlorachat.protocols import Template, Tokenizer
from qlorachat.templates import Prompt, build_prompt
from qlorachat.tokens import SamplingParams
from qlorachat.training.config import TrainConfig
from qlorachat.training.data.rows import Row
from qlorachat.training.history import Chat
from qlorachat.training.model import TrainedModel
from qlorachat.training.places import local_path

SHOWN_CHATS = 3  # questions, where none are given


def sample_chats(
    rows: Sequence[Row],
    checkpoint: Checkpoint,
    template: Template,
    tokenizer: Tokenizer,
    config: TrainConfig,
) -> "SampleChats | None":
    """About the prompts asked for, else the first rows' questions that leave room for an answer.

    ConfigError and DialogError for prompts that cannot be asked.
    """
    if not config.chat_tokens:
        return None
    dialogs = _asked(config) if config.chat_prompts else [_question(row) for row in rows]
    chosen: dict[str, Prompt] = {}
    for dialog in dialogs:
        prompt = build_prompt(template, dialog, tokenizer, tags=config.tags)
        if len(prompt.ids) + config.chat_tokens <= checkpoint.context_length:
            chosen[dialog[-1].content] = prompt
        elif config.chat_prompts:
            raise ConfigError(
                f"A prompt in {config.chat_prompts} leaves no room for {config.chat_tokens} tokens "
                f"of answer in the context of {checkpoint.context_length}: shorten it.",
                param="chat_prompts",
            )
        if len(chosen) == SHOWN_CHATS and not config.chat_prompts:
            break
    if not chosen:
        return None
    return SampleChats(
        tuple(chosen),
        tuple(chosen.values()),
        tokenizer,
        stop_ids=checkpoint.end_tokens(tokenizer),
        sampling=checkpoint.generation,
        max_tokens=config.chat_tokens,
        seed=config.seed,
    )


class SampleChats:
    """Asks the model in training the same questions each time."""

    def __init__(
        self,
        questions: Sequence[str],
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        *,
        stop_ids: frozenset[int],
        sampling: SamplingParams,
        max_tokens: int,
        seed: int,
    ) -> None:
        """`prompts` are the questions in the model's format; `sampling` is how it answers."""
        self._questions = tuple(questions)
        self._prompts = [prompt.ids for prompt in prompts]
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._seed = seed
        self._settings = GenerationConfig(
            max_new_tokens=max_tokens,
            use_cache=True,
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or None,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=sorted(stop_ids),
            pad_token_id=min(stop_ids, default=0),
        )
        self._base: list[str] | None = None

    def remember(self, chats: Sequence[Chat]) -> None:
        """Take the base's answers from an earlier part of the run, since they never change."""
        answers = {chat.prompt: chat.base for chat in chats}
        if answers.keys() >= set(self._questions):
            self._base = [answers[question] for question in self._questions]

    def ask(self, model: TrainedModel, step: int) -> list[Chat]:
        """Every question's answers, as after `step`."""
        if self._base is None:
            self._base = self._answers(model, adapter=False)
        answers = self._answers(model, adapter=True)
        return [
            Chat(step, question, base, answer)
            for question, base, answer in zip(self._questions, self._base, answers, strict=True)
        ]

    def _answers(self, model: TrainedModel, *, adapter: bool) -> list[str]:
        longest = max(map(len, self._prompts))
        padding = [longest - len(ids) for ids in self._prompts]
        pad = self._settings.pad_token_id
        rows = [[pad] * n + list(ids) for n, ids in zip(padding, self._prompts, strict=True)]
        mask = [[0] * n + [1] * (longest - n) for n in padding]
        with model.inference(adapter=adapter) as network:
            torch.manual_seed(self._seed)
            generated = network.generate(  # type: ignore[operator]  # a transformers model
                torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=self._settings,
            )
        return [self._text(ids) for ids in generated[:, longest:].tolist()]

    def _text(self, ids: Sequence[int]) -> str:
        end = next((place for place, id_ in enumerate(ids) if id_ in self._stop_ids), len(ids))
        return self._tokenizer.decode(ids[:end])


def _asked(config: TrainConfig) -> list[tuple[Message, ...]]:
    """The dialogs of the file chat_prompts; ConfigError."""
    assert config.chat_prompts is not None
    try:
        path = local_path(config.chat_prompts, param="chat_prompts")
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The prompts of the sample chats cannot be read from {config.chat_prompts} ({error}): "
            "give a text file in UTF-8 with one prompt a line.",
            param="chat_prompts",
        ) from None
    system = (Message("system", config.system),) if config.system is not None else ()
    if dialogs := [(*system, Message("user", line.strip())) for line in lines if line.strip()]:
        return dialogs
    raise ConfigError(
        f"{config.chat_prompts} holds no prompt: write one a line.", param="chat_prompts"
    )


def _question(row: Row) -> tuple[Message, ...]:
    """A row up to its first user message."""
    first = next(place for place, each in enumerate(row.messages) if each.role == "user")
    return row.messages[: first + 1]
