"""What a training run is told: frozen, checked once; a recipe fills in what is not said."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, ModelWrapValidatorHandler, field_validator, model_validator

from qlorachat.config import BaseModelConfig, Tags
from qlorachat.listed import Listed

RecipeName = Literal["default", "zundamon"]

RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "default": {},
        # npaka's note of 2023 (note.com/npaka/n/na506c63b8cc9) as the project's origin ran it;
        # checkpointing and the mask over prompts are ours
        "zundamon": {
            "quantization": "nf4",
            "rank": 64,
            "alpha": 16,
            "dropout": 0.1,
            "micro_batch": 1,
            "accumulation": 4,
            "max_steps": 300,
            "learning_rate": 2e-4,
            "scheduler": "cosine",
            "warmup": 0.03,
            "weight_decay": 0.001,
            "max_grad_norm": 0.3,
            "optimizer": "paged_adamw_32bit",
            "group_by_length": True,
            "gradient_checkpointing": True,
        },
    }
)


class TrainConfig(BaseModelConfig):
    """How an adapter is trained; every field is a flag, an environment variable, a file key."""

    model_config = ConfigDict(allow_inf_nan=False)

    data: str | None = Field(
        None, description="rows to learn: .json, .jsonl, .csv, .parquet, or a hub data set"
    )
    output: str = Field("qlora-model", description="the adapter's folder, made by this run")
    recipe: RecipeName = Field(
        "default", description="defaults for all that is not said; zundamon: the origin's of 2023"
    )

    memory: str | None = Field(
        None,
        description="what the process may take, such as 12GiB or 0.8; default: what is free, so "
        "that a card never spills into shared memory",
    )

    # The data
    eval_data: str | None = Field(None, description="rows to evaluate on, not trained")
    eval_share: float = Field(
        0.05, ge=0, lt=1, description="share of the data held out where eval_data is not given"
    )
    template: str | None = Field(None, description="prompt format; default: the checkpoint's own")
    system: str | None = Field(None, description="system prompt for rows that bring none")
    separator: str = Field(
        "\n\n",
        description="what joins a row's instruction and input, \\n for a new line; default: a "
        "blank line",
    )
    tags: Tags = Field("refuse", description="rows that hold the format's control text")
    max_length: int = Field(1024, ge=16, description="tokens of a sample; longer ones are cut")
    train_on_prompt: bool = Field(False, description="learn the prompts too, not answers alone")
    packing: bool = Field(
        False, description="several samples in one row of max_length; none sees another"
    )
    group_by_length: bool = Field(False, description="samples of like length in one batch")

    # The adapter
    init_adapter: str | None = Field(None, description="go on from this adapter's weights")
    rank: int = Field(16, ge=1, le=1024, description="of the adapter's matrices")
    alpha: float = Field(32, gt=0, description="the adapter's scale is alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input")
    targets: Listed | None = Field(
        None, description="names of linear layers, such as q_proj; default: all"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank)")
    dora: bool = Field(False, description="learn magnitudes too (DoRA)")
    neftune: float | None = Field(None, gt=0, description="noise on embeddings (NEFTune's alpha)")

    # The steps
    epochs: float = Field(3.0, ge=1e-6, description="how often each sample is seen")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps, in place of epochs")
    micro_batch: int = Field(4, ge=1, description="rows in one pass")
    accumulation: int = Field(2, ge=1, description="passes in one optimizer step")
    optimizer: str | None = Field(
        None,
        description="one of transformers' optimizers; default: paged_adamw_8bit on a card, "
        "adamw_torch on a CPU",
    )
    learning_rate: float = Field(2e-4, gt=0, description="the highest")
    scheduler: str = Field("cosine", description="one of transformers' learning-rate schedules")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0, description="of the adapter's weights")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this")
    gradient_checkpointing: bool | None = Field(
        None, description="compute layers twice to save memory; default: on a card"
    )
    seed: int = Field(42, ge=0, lt=2**63, description="of order, dropout, noise and new weights")

    # What is kept and shown
    save_steps: int = Field(50, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints to keep, beside the best")
    eval_steps: int = Field(50, ge=1, description="steps between evaluations")
    early_stopping: int | None = Field(
        None, ge=1, description="stop after this many evaluations without a better one"
    )
    chat_steps: int = Field(50, ge=1, description="steps between sample chats")
    chat_prompts: str | None = Field(
        None,
        description="a text file with the sample chats' prompts, one a line; default: those of "
        "three rows of the data",
    )
    chat_tokens: int = Field(64, ge=0, description="the longest sample answer; 0: no sample chats")

    @model_validator(mode="wrap")
    @classmethod
    def _fill_in_recipe(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """What the recipe says, where nobody said otherwise; it does not count as said."""
        if not isinstance(values, dict):
            return handler(values)
        recipe = dict(RECIPES.get(values.get("recipe", "default"), {}))
        if "epochs" in values:
            recipe.pop("max_steps", None)  # it would take their place
        config = handler({**recipe, **values})
        config.__pydantic_fields_set__.intersection_update(values)
        return config

    @field_validator("separator")
    @classmethod
    def _read_escapes(cls, separator: str) -> str:
        r"""A command line has no easy way to hold a new line: there it is written \n."""
        return separator.replace("\\n", "\n")
