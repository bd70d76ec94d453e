"""Recipes fill in what is not said; what is said wins."""

import tomllib
from pathlib import Path

import pytest

from qlorachat.cli.settings import parse
from qlorachat.cli.train import TrainSettings
from qlorachat.config import check
from qlorachat.errors import ConfigError
from qlorachat.training.config import RECIPES, TrainConfig


def test_a_recipe_fills_in() -> None:
    config = TrainConfig(recipe="zundamon", rank=8)
    assert (config.rank, config.alpha, config.max_steps) == (8, 16, 300)
    assert config.optimizer == "paged_adamw_32bit"
    assert TrainConfig().max_steps is None


def test_epochs_take_the_place_of_a_recipes_steps() -> None:
    assert TrainConfig(recipe="zundamon", epochs=2).max_steps is None
    assert TrainConfig(recipe="zundamon", epochs=2, max_steps=7).max_steps == 7


def test_only_what_was_said_counts_as_said() -> None:
    assert TrainConfig(recipe="zundamon", rank=8).model_fields_set == {"recipe", "rank"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_valid(recipe: str) -> None:
    assert check(TrainConfig, {"recipe": recipe}).recipe == recipe


def test_the_example_is_valid() -> None:
    example = Path(__file__).parents[2] / "examples" / "zundamon.toml"
    config = check(TrainConfig, tomllib.loads(example.read_text("utf-8")))
    assert (config.rank, config.memory) == (64, "11.5GiB")


def test_a_new_line_may_be_written_as_on_a_command_line() -> None:
    assert TrainConfig(separator=r"\n--\n").separator == "\n--\n"


def test_targets_may_be_one_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "train.toml"
    file.write_text('targets = "q_proj,v_proj"')
    flags = ["--targets", "q_proj", "--targets", "v_proj"]
    found = [
        parse(TrainSettings, each, command="train") for each in (flags, ["--config", str(file)])
    ]
    monkeypatch.setenv("QLORACHAT_TARGETS", "q_proj,v_proj")
    found.append(parse(TrainSettings, [], command="train"))
    assert [each.train_config().targets for each in found] == [["q_proj", "v_proj"]] * 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recipe": "zunda"}, "recipe"),
        ({"rnak": 3}, "did you mean `rank`"),
        ({"rank": 0}, "rank"),
        ({"epochs": float("inf")}, "epochs"),
        ({"epochs": 1e-12}, "epochs"),
        ({"neftune": float("inf")}, "neftune"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"alpha": float("inf")}, "alpha"),
        ({"weight_decay": float("inf")}, "weight_decay"),
        ({"dropout": float("nan")}, "dropout"),
        ({"seed": 10**22}, "seed"),
        ({"eval_share": 1.0}, "eval_share"),
    ],
)
def test_mistakes(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(TrainConfig, values)
