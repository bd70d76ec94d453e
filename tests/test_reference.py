"""TransformersBackend is the yardstick: its greedy tokens are those of PEFT's own generate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from qlorachat import ChatEngine
from qlorachat.checkpoints import load_model, locate
from qlorachat.config import QuantizationChoice
from tests.trained import QUESTION

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0}
PROMPTS = ["What is the capital of France?", "Name three colours.", QUESTION]


@pytest.mark.parametrize("quantization", ["nf4", "16bit"])
def test_greedy_tokens_equal_those_of_peft(
    quantization: QuantizationChoice, trained: Path, other: Path
) -> None:
    options: dict[str, Any] = {"backend": "transformers", "quantization": quantization}
    with ChatEngine("smollm2", adapters={"a": trained, "b": other}, **options) as e:
        ours = {
            (name, prompt): e.chat(prompt, adapter=name, max_tokens=16, **GREEDY).text
            for name in (None, "a", "b")
            for prompt in PROMPTS
        }
        rendered = {prompt: e.render(prompt).ids for prompt in PROMPTS}
        decode = e._backend.tokenizer.decode
    checkpoint = locate("smollm2")
    for name, folder in ((None, None), ("a", trained), ("b", other)):
        model = load_model(checkpoint, device="cpu", quantization=quantization).model
        if folder is not None:
            model = PeftModel.from_pretrained(model, folder)
        for prompt in PROMPTS:
            ids = torch.tensor([rendered[prompt]])
            mask = torch.ones_like(ids)
            made = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=16, do_sample=False,
                repetition_penalty=1.0, temperature=None, top_p=None,
            )  # fmt: skip
            answer = made[0, ids.shape[1] :].tolist()
            assert decode(answer) == ours[name, prompt]
