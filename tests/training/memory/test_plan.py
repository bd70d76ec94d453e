"""The plan's predictions: against peaks measured on a card, and against what autograd saves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qlorachat.checkpoints import locate
from qlorachat.checkpoints.memory import GIB, count_bytes
from qlorachat.checkpoints.quantization import estimate_memory
from qlorachat.training.config import TrainConfig
from qlorachat.training.memory.activations import Pass
from qlorachat.training.memory.plan import (
    MemoryPlan,
    Part,
    adapter_weights,
    optimizer_bytes,
    predict,
)
from qlorachat.training.memory.shape import ModelShape
from qlorachat.training.model import attach_adapter, load_base
from tests.tiny import write_folder
from tests.training.memory.shapes import LLAMA_7B, LLAMA_13B, VOCABULARY

SHAPES = {"7B": LLAMA_7B.in_nf4(), "13B": LLAMA_13B.in_nf4()}


def on_card(model: str, longest: int, **settings: Any) -> tuple[MemoryPlan, dict[str, float]]:
    """A plan and its parts in GiB."""
    config = TrainConfig(max_length=4096, **settings)
    plan = predict(SHAPES[model], config, longest=longest, device_type="cuda", limit=None)
    return plan, {part.name: part.predicted / GIB for part in plan.parts}


# H100, transformers 5.24 with PEFT 0.21's LoRA in float32, and all logits at one time
MEASURED = [
    ("7B", 64, 512, 1, False, "adamw_torch", 9.18),
    ("7B", 64, 512, 1, True, "adamw_torch", 6.67),
    ("7B", 64, 2048, 1, True, "paged_adamw_8bit", 6.38),
    ("7B", 16, 512, 16, True, "paged_adamw_8bit", 8.91),
    ("13B", 64, 512, 1, True, "paged_adamw_8bit", 9.69),
    ("13B", 16, 1024, 1, True, "paged_adamw_8bit", 8.22),
]


@pytest.mark.parametrize(
    ("model", "rank", "tokens", "rows", "checkpointing", "optimizer", "measured"), MEASURED
)
def test_peaks_measured_on_a_card(
    model: str,
    rank: int,
    tokens: int,
    rows: int,
    checkpointing: bool,
    optimizer: str,
    measured: float,
) -> None:
    plan, parts = on_card(
        model,
        tokens,
        rank=rank,
        micro_batch=rows,
        gradient_checkpointing=checkpointing,
        optimizer=optimizer,
    )
    weights = parts["adapter and gradients"] / 8
    theirs = plan.predicted / GIB + 2 * weights  # autocast's 16-bit weights, which ours has not
    logits = rows * tokens * VOCABULARY * 12 / GIB
    theirs += max(parts["one layer"], logits) - max(parts["one layer"], parts["logits"])
    if "paged" in optimizer:
        theirs -= parts["optimizer"]  # managed memory, which torch does not count
    assert theirs == pytest.approx(measured, abs=0.2)


@pytest.mark.parametrize(
    ("model", "base", "weights", "dense"),
    [("7B", 3.111, 159.9, 0.488), ("13B", 6.096, 250.3, 0.610)],
)
def test_what_is_there_all_the_time(model: str, base: float, weights: float, dense: float) -> None:
    _, parts = on_card(model, 512, rank=64, optimizer="adamw_torch")
    assert parts["base weights"] == pytest.approx(base + dense, abs=0.002)
    assert parts["adapter and gradients"] == pytest.approx(weights * 8e6 / GIB, abs=0.002)
    assert parts["optimizer"] == pytest.approx(weights * 8e6 / GIB, abs=0.002)


@pytest.mark.parametrize(
    ("model", "tokens", "checkpoints", "layer"),
    [
        ("7B", 512, 0.13, 0.15),
        ("7B", 1024, 0.25, 0.29),
        ("7B", 2048, 0.50, 0.58),
        ("13B", 512, 0.20, 0.18),
        ("13B", 1024, 0.39, 0.36),
        ("13B", 2048, 0.78, 0.73),
    ],
)
def test_what_grows_with_the_tokens(
    model: str, tokens: int, checkpoints: float, layer: float
) -> None:
    _, parts = on_card(model, tokens, micro_batch=1)
    buffer = SHAPES[model].largest_quantized * 2 / GIB
    assert parts["checkpoints"] == pytest.approx(checkpoints, abs=0.006)
    assert parts["one layer"] - buffer == pytest.approx(layer, abs=0.01)
    assert parts["logits"] == pytest.approx(512 * VOCABULARY * 12 / GIB)


def test_rows_are_as_long_as_the_data_or_filled_by_packing() -> None:
    short, _ = on_card("7B", 300)
    assert short.predicted < on_card("7B", 600)[0].predicted
    packed, _ = on_card("7B", 300, packing=True)
    assert packed.predicted > on_card("7B", 4096)[0].predicted
    assert on_card("7B", 9999)[0] == on_card("7B", 4096)[0]


# and how much too high the prediction may be
VARIANTS: list[tuple[dict[str, Any], float]] = [
    ({}, 0.02),
    ({"rank": 32}, 0.02),
    ({"targets": ["q_proj", "v_proj"]}, 0.08),
    ({"dropout": 0.1}, 0.02),
    ({"dora": True}, 0.02),
    ({"packing": True}, 0.02),
    ({"quantization": "16bit"}, 0.02),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Layers -> a checkpoint of so many."""
    return {n: write_folder(tmp_path_factory.mktemp("shape") / f"{n}", layers=n) for n in (2, 4)}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(("settings", "slack"), VARIANTS, ids=str)
def test_what_autograd_saves_in_a_layer(
    settings: dict[str, Any], slack: float, folders: dict[int, Path]
) -> None:
    config = TrainConfig.model_validate({"quantization": "nf4", "rank": 8, **settings})

    def predicted(layers: int, tokens: int) -> int:
        shape = ModelShape.of(locate(str(folders[layers])), config.quantization)
        return Pass(shape, config, 2, tokens, "cpu").stored

    def counted(layers: int, tokens: int) -> int:
        return saved_bytes(folders[layers], config, tokens)

    assert 0.98 < growth(predicted) / growth(counted) < 1 + slack


def growth(size: Callable[[int, int], int]) -> int:
    """By more layers and more tokens at once: neither weights nor what is outside of layers."""
    small, large = (size(4, tokens) - size(2, tokens) for tokens in (64, 192))
    return large - small


def saved_bytes(folder: Path, config: TrainConfig, tokens: int) -> int:
    """What the decoder's forward pass leaves for its backward pass, the model's weights aside."""
    checkpoint = locate(str(folder))
    loaded = load_base(checkpoint, config.model_copy(update={"device": "cpu"}))
    model = attach_adapter(loaded, checkpoint, config, None)
    known = {each.untyped_storage().data_ptr() for each in model.peft.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    places = torch.arange(tokens)
    if config.packing:
        places = places % (tokens // 2)
    decoder = model.peft.get_base_model().get_decoder()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), model.computing():
        decoder(
            input_ids=torch.zeros(2, tokens, dtype=torch.long),
            position_ids=places.repeat(2, 1),
            use_cache=False,
        )
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    "settings", [{"rank": 8}, {"rank": 8, "dora": True}, {"targets": ["o_proj"]}]
)
def test_the_adapter_has_as_many_weights(
    settings: dict[str, Any], folders: dict[int, Path]
) -> None:
    checkpoint = locate(str(folders[2]))
    config = TrainConfig.model_validate({"quantization": "nf4", "device": "cpu", **settings})
    model = attach_adapter(load_base(checkpoint, config), checkpoint, config, None)
    count = sum(parameter.numel() for parameter in model.parameters().values())
    assert adapter_weights(ModelShape.of(checkpoint, "nf4"), config) == count


def test_the_base_in_both_precisions(folders: dict[int, Path]) -> None:
    checkpoint = locate(str(folders[2]))
    whole, quantized = (ModelShape.of(checkpoint, choice) for choice in ("16bit", "nf4"))
    assert whole.base_bytes == estimate_memory(checkpoint, "16bit")
    assert whole.in_nf4() == quantized
    assert quantized.in_nf4() == quantized
    loaded = load_base(checkpoint, TrainConfig(device="cpu", quantization="nf4"))
    # the layers of a tiny model are smaller than what each needs for its scales
    assert quantized.base_bytes < count_bytes(loaded.model) < whole.base_bytes


def test_the_demo_model_keeps_what_its_recipe_skips(demo_checkpoint: Any) -> None:
    shape = ModelShape.of(demo_checkpoint, "auto")
    assert (shape.hidden_size, shape.intermediate_size, shape.layers) == (576, 1536, 30)
    assert (shape.heads, shape.kv_heads, shape.head_size, shape.vocab_size) == (9, 3, 64, 49152)
    assert 0 < len(shape.quantized) < len(shape.in_nf4().quantized) == 7 * 30
    assert shape.in_nf4().base_bytes == pytest.approx(
        ModelShape.of(demo_checkpoint, "nf4").base_bytes, abs=1
    )


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("adamw_torch", 8),
        ("paged_adamw_32bit", 8),
        ("adamw_8bit", 2.03),
        ("paged_adamw_8bit", 2.03),
        ("lion_32bit", 4),
        ("paged_lion_8bit", 1.02),
        ("ademamix", 12),
        ("rmsprop", 4),
        ("adafactor", 0),
        ("sgd", 0),
        ("an_optimizer_of_tomorrow", 8),
    ],
)
def test_what_optimizers_keep(name: str, size: float) -> None:
    assert optimizer_bytes(name) == pytest.approx(size, abs=0.01)


def test_defaults_follow_the_device() -> None:
    config = TrainConfig(max_length=512)
    card, cpu = (
        predict(SHAPES["7B"], config, longest=512, device_type=device, limit=None)
        for device in ("cuda", "cpu")
    )
    theirs, ours = ({part.name: part.predicted for part in plan.parts} for plan in (card, cpu))
    assert ours["optimizer"] > 3 * theirs["optimizer"]
    assert ours["checkpoints"] > 10 * theirs["checkpoints"]
    assert theirs["one layer"] > ours["one layer"]


def test_one_layer_and_logits_take_turns() -> None:
    sizes = {"base weights": 50, "one layer": 7, "logits": 9}
    plan = MemoryPlan("cuda", 60, tuple(Part(*item) for item in sizes.items()))
    assert plan.predicted == 59
    assert plan.measured is None
    assert plan.fits


def test_what_is_measured_decides() -> None:
    plan = MemoryPlan("cuda", 60, (Part("base weights", 50, 51), Part("activations", 5, 10)))
    assert (plan.measured, plan.needed, plan.fits) == (61, 61, False)


def test_people_see_the_parts_the_limit_and_the_verdict() -> None:
    parts = (Part("base weights", 3 * GIB, 2 * GIB), Part("activations", GIB // 2, 3 * GIB))
    for limit, verdict in ((4 * GIB, "Does not fit into 4.00 GiB"), (None, "No limit is set")):
        plan = MemoryPlan("cuda", limit, parts)
        console = Console(width=80)
        with console.capture() as captured:
            console.print(plan)
        for text in ("base weights", "2.00 GiB", "512 MiB", "3.50 GiB", "5.00 GiB", verdict):
            assert text in captured.get()
        assert str(plan).endswith(f"at most 5.00 GiB. {verdict}.")
