"""A read adapter, given to PEFT, answers exactly as PEFT's own loading of its folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

from qlorachat.adapters import Adapter, read_adapter

# PEFT 0.21 asks transformers 5 for an attribute that is deprecated there
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CASES: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*layers\.1\.(self_attn\.(q|k)|mlp\.up)_proj"},
    "no task type": {"target_modules": ["q_proj"], "task_type": None},
    "one layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "layer of a list": {
        "target_modules": ["o_proj"],
        "layers_to_transform": 0,
        "layers_pattern": "layers",
    },
    "excluded": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\..*k_proj"},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, r"layers\.\d\.mlp\.(up|down)_proj": 6},
        "alpha_pattern": {"q_proj": 5, r"^model.layers.0.+": 40},
        "use_rslora": True,
    },
    "output layer": {"target_modules": ["v_proj", "lm_head"], "lora_alpha": 4},
    "dora": {"target_modules": ["q_proj", "gate_proj"], "use_dora": True},
    "saved modules": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head", "embed_tokens"],
    },
    "saved norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "saved parent": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
}
EXCLUSIVE = {"dora", "saved modules", "saved norms", "saved parent"}


SUMS = sorted(CASES.keys() - EXCLUSIVE)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(torch.arange(1, 9)[None]).logits
    return result


def attach(base: Any, adapter: Adapter) -> Any:
    model = get_peft_model(base, LoraConfig(**adapter.peft_config, inference_mode=True))
    result = set_peft_model_state_dict(model, dict(adapter.tensors))
    assert not result.unexpected_keys
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_peft(
    case: str,
    make_adapter: Callable[..., Path],
    make_base: Callable[[], Any],
    shapes: dict[str, tuple[int, int]],
) -> None:
    saved = make_adapter(**CASES[case])
    adapter = read_adapter(saved, shapes=shapes)
    expected = logits(PeftModel.from_pretrained(make_base(), saved))
    assert torch.equal(logits(attach(make_base(), adapter)), expected)
    assert not torch.equal(expected, logits(make_base()))
    assert adapter.exclusive == (case in EXCLUSIVE)


@pytest.mark.parametrize("case", SUMS)
def test_scale_times_b_times_a_is_what_peft_adds(
    case: str, make_adapter: Callable[..., Path], make_base: Callable[[], Any]
) -> None:
    saved = make_adapter(**CASES[case])
    adapter = read_adapter(saved)
    base = make_base()
    with torch.no_grad():
        for module in adapter.settings.target_modules:
            a, b = (
                adapter.tensors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB"
            )
            base.get_submodule(module).weight += adapter.settings.scale_of(module) * (b @ a)
    expected = logits(PeftModel.from_pretrained(make_base(), saved))
    torch.testing.assert_close(logits(base), expected, atol=1e-5, rtol=1e-4)
