"""AdaptedModel: an adapter that could not be attached leaves nothing behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, DynamicCache

from qlorachat import adapted
from qlorachat.adapted import AdaptedModel
from qlorachat.adapters import read_adapter
from qlorachat.errors import OutOfMemory
from tests.lora import write_lora
from tests.tiny import write_folder


def logits(model: AdaptedModel, sha256: str | None) -> torch.Tensor:
    model.activate(sha256, 1.0)
    with torch.inference_mode():
        return model.logits(torch.tensor([[5, 6, 7]]), DynamicCache(config=model.config))


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("after", ["half a layer", "PEFT's modules", "the weights"])
def test_memory_that_runs_out_leaves_nothing(
    others: int, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_folder(tmp_path / "base", layers=1)
    model = AdaptedModel(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    first = read_adapter(write_lora(tmp_path / "first", base, r=2))
    second = read_adapter(write_lora(tmp_path / "second", base, r=4))
    plain = logits(model, None)
    if others:
        model.attach(first)
        tuned = logits(model, first.sha256)

    def fail(*arguments: Any, **options: Any) -> None:
        if after == "the weights":
            set_weights(*arguments, **options)
        raise torch.OutOfMemoryError("no memory")

    set_weights = set_peft_model_state_dict
    if after == "half a layer":
        monkeypatch.setattr("peft.tuners.lora.layer.LoraLayer.reset_lora_parameters", fail)
    else:
        monkeypatch.setattr(adapted, "set_peft_model_state_dict", fail)
    with pytest.raises(OutOfMemory, match="no memory left for this adapter"):
        model.attach(second)
    monkeypatch.undo()
    assert torch.equal(logits(model, None), plain)
    if others:
        assert torch.equal(logits(model, first.sha256), tuned)
    model.attach(second)
    whole = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "second"
    )
    with torch.inference_mode():
        expected = whole(input_ids=torch.tensor([[5, 6, 7]])).logits[:, -1]
    torch.testing.assert_close(logits(model, second.sha256), expected)
