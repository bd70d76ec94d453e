"""The rules of target_modules and patterns are PEFT's own, case by case."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from qlorachat.adapters.config import AdapterConfig
from qlorachat.adapters.targets import TargetRules

MODULES = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1, 10, 11)
    for module in (
        "self_attn.q_proj",
        "self_attn.v_proj",
        "mlp.down_proj",
        "mlp.experts.1.up_proj",
    )
] + ["lm_head", "vision.blocks.1.attn.q_proj"]

TARGETS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["proj", "model.layers.1.self_attn.v_proj", "lm_head"]},
    {"target_modules": ["self_attn.q_proj", "mlp.down_proj"]},
    {"target_modules": r"model\.layers\.(0|1)\..*_proj"},
    {"target_modules": r".*(q|up)_proj|lm_head"},
    {"target_modules": ["q_proj"], "exclude_modules": ["vision.blocks.1.attn.q_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": r"vision.*"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 11]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "blocks"]},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    {"target_modules": r".*_proj", "modules_to_save": ["mlp"]},
]
PATTERNS = [
    {"q_proj": 2},
    {"self_attn.q_proj": 2, "q_proj": 3},
    {r"layers\.1\..*": 2},
    {"^model.layers.0.self_attn.q_proj": 2},
    {r"model.layers.\d+.mlp.down_proj": 2, "down": 4},
    {"layers.1": 2, "proj": 3, ".*down_proj": 5},
]


@pytest.mark.parametrize("settings", TARGETS, ids=str)
def test_targets_are_those_of_peft(settings: dict[str, Any]) -> None:
    peft = LoraConfig(**settings)
    rules = TargetRules(AdapterConfig(peft_type="LORA", **settings), Path())
    expected = [name for name in MODULES if check_target_module_exists(peft, name)]
    assert [name for name in MODULES if rules.is_target(name)] == expected
    assert 0 < len(expected) < len(MODULES)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_are_those_of_peft(pattern: dict[str, int]) -> None:
    alphas: dict[str, int | float] = {**pattern}
    config = AdapterConfig(peft_type="LORA", r=8, rank_pattern=pattern, alpha_pattern=alphas)
    rules = TargetRules(config, Path())
    expected = [pattern.get(get_pattern_key(list(pattern), name), 8) for name in MODULES]
    assert [rules.rank_of(name) for name in MODULES] == expected
    assert [rules.alpha_of(name) for name in MODULES] == expected
    assert len(set(expected)) > 1
