"""Training teaches: after a minute on a CPU, a habit of speech, and answers that still answer."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from qlorachat import ChatEngine, train

pytestmark = pytest.mark.model

DATA = Path(__file__).parents[2] / "examples" / "data" / "nanoda.jsonl"

# none of them is in the data
PROMPTS = {
    "What is the capital of Germany?": "berlin",
    "Who painted the Mona Lisa?": "leonardo",
    "Which organ pumps blood through the body?": "heart",
    "What currency is used in Japan?": "yen",
    "What is the capital of Greece?": "athens",
    "Who developed the theory of relativity?": "einstein",
}


@pytest.mark.timeout(600)
def test_a_habit_of_speech(smollm2_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "nanoda"
    result = train(
        model="smollm2",
        data=str(DATA),
        output=str(output),
        device="cpu",
        max_steps=40,
        accumulation=1,
        learning_rate=5e-4,
        eval_share=0.0,
        chat_tokens=0,
        console=Console(file=io.StringIO()),
    )
    assert result is not None
    assert result.finished
    with ChatEngine(adapters={"nanoda": output}, device="cpu") as engine:
        assert engine.info.name.startswith("HuggingFaceTB/SmolLM2")
        answers = {
            adapter: [
                engine.chat(prompt, adapter=adapter, temperature=0, max_tokens=40).text.lower()
                for prompt in PROMPTS
            ]
            for adapter in (None, "nanoda")
        }
    assert sum("nanoda" in answer for answer in answers[None]) == 0
    assert sum("nanoda" in answer[-12:] for answer in answers["nanoda"]) >= 4
    right = {
        adapter: sum(word in answer for word, answer in zip(PROMPTS.values(), given, strict=True))
        for adapter, given in answers.items()
    }
    assert right["nanoda"] >= right[None] - 2
