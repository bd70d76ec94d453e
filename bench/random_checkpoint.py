"""A Llama-shaped checkpoint folder with random weights, stored in 4 bit: what `train` can open.

python bench/random_checkpoint.py 7b FOLDER --tokenizer DIR    (tokenizer.model or tokenizer.json)
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from random_model import build

QUANTIZATION = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}


def write(size: str, folder: Path, tokenizer: Path, device: str) -> None:
    """Fill `folder` with config, weights and the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    model = build(size, device)
    tensors = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "quantization_config": QUANTIZATION,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str), "utf-8")
    for file in tokenizer.iterdir():
        if file.name.startswith("tokenizer"):
            shutil.copy(file, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=("7b", "tiny"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write(arguments.size, arguments.folder, arguments.tokenizer, device)


if __name__ == "__main__":
    main()
