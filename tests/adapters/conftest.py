"""A tiny Llama, real PEFT adapters of it, and the means to damage them."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

BaseMaker = Callable[[], Any]
AdapterMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def make_base() -> BaseMaker:
    """The same random base model anew at each call; hidden 64, MLP 96, vocabulary 128."""

    def make() -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def shapes(make_base: BaseMaker) -> dict[str, tuple[int, int]]:
    """The base's linear modules -> (out, in)."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in make_base().named_modules()
        if isinstance(module, torch.nn.Linear)
    }


@pytest.fixture(scope="session")
def make_adapter(make_base: BaseMaker, tmp_path_factory: pytest.TempPathFactory) -> AdapterMaker:
    """Saves an adapter as PEFT does, its weights random as after a training."""

    def make(**settings: Any) -> Path:
        config = LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **settings})
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5 for an attribute that is deprecated there
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)
            model = get_peft_model(make_base(), config)
            _train(model)
            folder: Path = tmp_path_factory.mktemp("adapter")
            model.save_pretrained(folder)
        return folder

    return make


def _train(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.fixture(scope="session")
def _plain(make_adapter: AdapterMaker) -> Path:
    return make_adapter(lora_alpha=16, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def folder(_plain: Path, tmp_path: Path) -> Path:
    """A fresh copy of a good adapter: rank 4, alpha 16, q_proj and v_proj of two layers."""
    return Path(shutil.copytree(_plain, tmp_path / "zundamon"))


@pytest.fixture
def edit_config(folder: Path) -> Callable[..., None]:
    """Changes keys of `folder`'s adapter_config.json."""

    def edit(**changes: Any) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


@pytest.fixture
def edit_tensors(folder: Path) -> Callable[[Callable[[dict[str, torch.Tensor]], Any]], None]:
    """Lets a function change `folder`'s tensors in place and saves them again."""

    def edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    return edit
