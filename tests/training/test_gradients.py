"""Gradients through NF4 are those of the dequantized weights, whatever ran before them."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import bitsandbytes.functional
import numpy
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from qlorachat.checkpoints import LoadedModel, locate
from qlorachat.training.config import TrainConfig
from qlorachat.training.data.batches import collate
from qlorachat.training.data.samples import Sample
from qlorachat.training.lora_linear import LoraLinear4bit, _LoraProduct
from qlorachat.training.model import TrainedModel, attach_adapter, load_base

Gradients = dict[str, torch.Tensor]

PAD = 0
ROUNDING = 0.04  # of gradients in bfloat16, by `_distance`, in a model this small


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    random = numpy.random.default_rng(0)
    return [_sample(random, length) for length in (23, 9, 31, 17)]


def _sample(random: numpy.random.Generator, length: int) -> Sample:
    ids = random.integers(3, 259, length).astype(numpy.int32)
    trained = numpy.arange(length) >= length // 3
    return Sample(line=1, ids=ids, trained=trained, truncated=False)


def _train(loaded: LoadedModel, folder: Path, **settings: object) -> TrainedModel:
    """A model whose B is not zero, so that A has gradients too."""
    config = TrainConfig(rank=4, **settings)
    model = attach_adapter(loaded, locate(str(folder)), config, None)
    torch.manual_seed(1)
    for name, parameter in model.parameters().items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def _open(folder: Path, **settings: object) -> TrainedModel:
    config = TrainConfig(device="cpu", quantization="nf4")
    return _train(load_base(locate(str(folder)), config), folder, **settings)


def _gradients(model: TrainedModel, batches: Sequence[Sequence[Sequence[Sample]]]) -> Gradients:
    """Of the mean loss over all batches' trained tokens, as one optimizer step sees them."""
    tensors = [collate(rows, pad_id=PAD) for rows in batches]
    trained = sum(int((batch["labels"] >= 0).sum()) for batch in tensors)
    for batch in tensors:
        (model.loss(batch) / trained).backward()
    gradients = {
        name: p.grad.clone() for name, p in model.parameters().items() if p.grad is not None
    }
    for parameter in model.parameters().values():
        parameter.grad = None
    return gradients


def _distance(ours: Gradients, exact: Gradients) -> float:
    """The mean over all tensors of the difference beside the tensor's own size."""
    assert ours.keys() == exact.keys()
    return sum(
        float((gradient - exact[name]).norm() / exact[name].norm())
        for name, gradient in ours.items()
    ) / len(exact)


def _assert_equal(ours: Gradients, theirs: Gradients) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(gradient, theirs[name]) for name, gradient in ours.items())


def _dequantize(loaded: LoadedModel) -> LoadedModel:
    """The same model with the 4-bit weights written out in 16 bit."""
    for parent in list(loaded.model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear4bit):
                setattr(parent, name, _plain(layer))
    loaded.model.is_loaded_in_4bit = False
    return loaded


def _plain(layer: Linear4bit) -> nn.Linear:
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    return plain


@pytest.fixture(scope="module")
def exact(tiny: Path, samples: list[Sample]) -> Gradients:
    """Of the dequantized model in float32, one sample at a time."""
    config = TrainConfig(device="cpu", quantization="nf4")
    loaded = _dequantize(load_base(locate(str(tiny)), config))
    nn.Module.float(loaded.model)
    model = _train(loaded, tiny)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(TrainedModel, "computing", lambda self: nullcontext())
    gradients = _gradients(model, [[[sample]] for sample in samples])
    monkeypatch.undo()
    return gradients


@pytest.fixture
def model(tiny: Path) -> TrainedModel:
    return _open(tiny)


def test_of_the_dequantized_model(
    model: TrainedModel,
    samples: list[Sample],
    exact: Gradients,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most as far from float32 as PEFT's layer, which rounds to 16 bit more often."""
    batches = [[[sample]] for sample in samples]
    ours = _distance(_gradients(model, batches), exact)
    calls = []
    plain = LoraLinear4bit._is_plain
    monkeypatch.setattr(
        LoraLinear4bit, "_is_plain", lambda self, name: calls.append(plain(self, name))
    )
    theirs = _distance(_gradients(model, batches), exact)
    assert all(calls)
    assert len(calls) == 7 * 2 * len(samples)
    assert ours < theirs < ROUNDING


def test_one_layer_in_float32(model: TrainedModel) -> None:
    """The formula itself, to float32's rounding."""
    layer = next(m for m in model.peft.modules() if isinstance(m, LoraLinear4bit))
    weight = layer.get_base_layer().weight
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 5, 64, requires_grad=True)
    wanted = (a, b, x)
    target = torch.randn(2, 5, weight.quant_state.shape[0])
    ours = _LoraProduct.apply(x, weight, a, b, 0.5)
    dense = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    formula = x @ dense.T + 0.5 * (x @ a.T) @ b.T
    torch.testing.assert_close(ours, formula)
    for mine, theirs in zip(
        torch.autograd.grad((ours * target).sum(), wanted),
        torch.autograd.grad((formula * target).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_after_an_evaluation_and_a_chat(model: TrainedModel, samples: list[Sample]) -> None:
    batches = [[[sample]] for sample in samples]
    before = _gradients(model, batches)
    ids = torch.tensor([[5, 6, 7]])
    for adapter in (True, False):
        with model.inference(adapter=adapter) as network:
            model.loss(collate([[samples[0]]], pad_id=PAD))
            network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)  # type: ignore[operator]
    _assert_equal(_gradients(model, batches), before)


def test_with_checkpointing(tiny: Path, model: TrainedModel, samples: list[Sample]) -> None:
    batches = [[[sample]] for sample in samples]
    checkpointed = _open(tiny, gradient_checkpointing=True)
    _assert_equal(_gradients(checkpointed, batches), _gradients(model, batches))


def test_packed_padded_and_accumulated(
    model: TrainedModel, samples: list[Sample], exact: Gradients
) -> None:
    one, two, three, four = samples
    for batches in (
        [[[one], [two], [three], [four]]],  # 4 x 1
        [[[one]], [[two]], [[three]], [[four]]],  # 1 x 4
        [[[one, two, three], [four]]],
        [[[four, one]], [[three, two]]],
    ):
        assert _distance(_gradients(model, batches), exact) < ROUNDING


def test_packed_samples_do_not_see_each_other(model: TrainedModel, samples: list[Sample]) -> None:
    first, second = samples[0], samples[1]
    other = _sample(numpy.random.default_rng(7), len(first.ids))
    with torch.no_grad():
        beside_first = float(model.loss(collate([[first, second]], pad_id=PAD)))
        beside_other = float(model.loss(collate([[other, second]], pad_id=PAD)))
        alone = [float(model.loss(collate([[one]], pad_id=PAD))) for one in (first, other)]
    assert beside_first - alone[0] == pytest.approx(beside_other - alone[1], abs=0.05)


def test_of_the_real_model_after_an_evaluation(smollm2_folder: Path) -> None:
    """Where bitsandbytes would pack the weights: its packing asks for layers of this size."""
    random = numpy.random.default_rng(3)
    samples = [_sample(random, length) for length in (12, 20)]
    batches = [[[sample] for sample in samples]]
    model = _open(smollm2_folder)
    with model.inference():
        model.loss(collate([[samples[0]]], pad_id=PAD))
    after = _gradients(model, batches)
    del model
    _assert_equal(after, _gradients(_open(smollm2_folder), batches))
