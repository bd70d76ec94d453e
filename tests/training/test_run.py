"""`train` from a data file to an adapter that answers; and every mistake in one line before it."""

import io
import json
import logging
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qlorachat import ChatEngine
from qlorachat.adapters import AdapterCard, inspect_adapter, write_card
from qlorachat.adapters.folder import WEIGHTS
from qlorachat.checkpoints import load_model, locate, read_tokenizer
from qlorachat.errors import ConfigError, ModelError, QlorachatError
from qlorachat.messages import Message
from qlorachat.protocols import Segment
from qlorachat.templates import ChatML
from qlorachat.training.chats import SampleChats, sample_chats
from qlorachat.training.config import TrainConfig
from qlorachat.training.export.check import read_questions
from qlorachat.training.history import Chat, History
from qlorachat.training.model import TrainedModel
from qlorachat.training.run import TrainResult, train
from qlorachat.training.saves import Saves
from qlorachat.training.trainer import TrainingFailed
from tests.lora import write_lora

Trains = Callable[..., TrainResult]


@pytest.fixture
def screen() -> Console:
    return Console(file=io.StringIO(), width=120)


def shown(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


@pytest.fixture
def settings(tiny: Path, rows: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny),
        "data": str(rows),
        "output": str(tmp_path / "qlora-model"),
        "device": "cpu",
        "template": "chatml",
        "system": "Be brief.",
        "rank": 4,
        "max_length": 96,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "save_steps": 2,
        "eval_steps": 2,
        "chat_steps": 3,
        "chat_tokens": 4,
    }


@pytest.fixture
def run(settings: dict[str, Any], screen: Console) -> Trains:
    """A whole run with the settings above, but for what a test changes."""

    def start(**changes: Any) -> TrainResult:
        flags = {name: changes.pop(name) for name in ("resume", "overwrite") if name in changes}
        result = train(TrainConfig(**{**settings, **changes}), console=screen, **flags)
        assert result is not None
        return result

    return start


def _history(result: TrainResult) -> History:
    newest = Saves(result.output / "checkpoints", AdapterCard(), keep=2).newest()
    assert newest is not None
    return newest.history()


def test_an_adapter_that_the_engine_serves(run: Trains, tiny: Path, tmp_path: Path) -> None:
    result = run()
    assert result.finished
    assert result.steps == 6
    assert result.loss is not None
    card = json.loads((result.output / "qlorachat.json").read_text("utf-8"))
    assert card["template"] == "chatml"
    assert card["system"] == "Be brief."
    assert card["base_model"] == str(tiny)
    assert card["quantization"] == "nf4+dq"
    config = json.loads((result.output / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == str(tiny)
    assert card["versions"]["torch"] == torch.__version__
    assert len(card["data_sha256"]) == 64
    tensors = load_file(result.output / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not any("embed" in name or "lm_head" in name for name in tensors)
    findings = inspect_adapter(result.output).findings
    assert [finding for finding in findings if finding.level == "error"] == []
    with ChatEngine(adapters={"q": result.output}, device="cpu") as engine:
        assert engine.info.name == str(tiny)
        prompt = engine.render("Hi", adapter="q")
        assert "Be brief." in prompt.text
        assert engine.chat("Hi", adapter="q", max_tokens=3).usage.completion_tokens > 0


def test_serving_otherwise_than_trained_is_said(
    run: Trains, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = {"q": run().output}
    with caplog.at_level(logging.WARNING), ChatEngine(adapters=adapters, device="cpu"):
        assert "in training" not in caplog.text
    with (
        caplog.at_level(logging.WARNING),
        ChatEngine(adapters=adapters, device="cpu", quantization="16bit", system="Be loud."),
    ):
        assert "the quantization was 'nf4+dq' in training and is 'none' here" in caplog.text
        assert "the system prompt was 'Be brief.' in training" in caplog.text


def test_an_adapter_that_plain_peft_loads(run: Trains, tiny: Path) -> None:
    result = run()
    base = load_model(locate(str(tiny)), device="cpu", quantization="16bit").model
    ids = torch.tensor([[1, 40, 41, 42]])
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, str(result.output))(ids).logits
    assert not torch.allclose(adapted, plain)


def test_what_it_shows(run: Trains, screen: Console) -> None:
    result = run()
    text = shown(screen)
    assert "base weights" in text
    assert "measured" in text
    assert "6 steps in 12 passes: about" in text
    assert f"qlorachat chat --adapter {result.output}" in text
    report = result.report.read_text("utf-8")
    assert "Say" in report
    events = EventAccumulator(str(result.output / "checkpoints" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 2, 4, 6]


def test_bad_rows_to_evaluate_on_are_counted_among_their_own(
    run: Trains, screen: Console, tmp_path: Path
) -> None:
    data = tmp_path / "held-out.jsonl"
    rows = [{"instruction": "Hi?", "output": ""}] * 59 + [{"instruction": "Hi?", "output": "Hi."}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    result = run(eval_data=str(data), max_steps=1)
    assert (
        "100 rows of rows.jsonl and held-out.jsonl: 40 samples to learn, 1 held out, "
        "59 bad (59.0 %)"
    ) in " ".join(shown(screen).split())
    assert "line 1: of held-out.jsonl: its answer is empty" in shown(screen)
    assert "rows.jsonl and held-out.jsonl" in result.report.read_text("utf-8")


def test_prompts_of_the_sample_chats(run: Trains, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("こんにちは、ずんだもん\n\nWho, me?\n", "utf-8")
    asked = {chat.prompt for chat in _history(run(chat_prompts=str(prompts))).chats}
    assert asked == {"こんにちは、ずんだもん", "Who, me?"}


@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_what_is_asked_has_the_system_prompt_of_the_rows(
    system: str | None, tiny: Path, rows: Path, tmp_path: Path
) -> None:
    rendered: set[tuple[str, ...]] = set()

    class Watched(ChatML):
        def render(
            self, messages: Sequence[Message], *, add_generation_prompt: bool = True
        ) -> list[Segment]:
            rendered.add(tuple(each.content for each in messages if each.role == "system"))
            return super().render(messages, add_generation_prompt=add_generation_prompt)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Who, me?", "utf-8")
    checkpoint, template, tokenizer = locate(str(tiny)), Watched(), read_tokenizer(tiny)
    config = TrainConfig(system=system, chat_prompts=str(prompts))
    for data in (None, str(rows)):
        read_questions(data, template, tokenizer, stop_ids=frozenset(), system=system)
    sample_chats((), checkpoint, template, tokenizer, config)
    assert rendered == {() if system is None else (system,)}


def test_a_dry_run_writes_nothing(settings: dict[str, Any], screen: Console) -> None:
    assert train(TrainConfig(**settings), dry_run=True, console=screen) is None
    assert not Path(settings["output"]).exists()
    assert "measured" in shown(screen)


def test_an_existing_folder_is_not_overwritten(run: Trains, settings: dict[str, Any]) -> None:
    folder = Path(settings["output"])
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists: choose another --output"):
        run()
    assert run(overwrite=True).finished
    assert (folder / "precious.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="--resume"):
        run()


def test_what_overwrite_leaves_alone(run: Trains, settings: dict[str, Any]) -> None:
    foreign = Path(settings["output"]) / "checkpoints" / "precious.pt"
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    with pytest.raises(ConfigError, match="no run's folder"):
        run(overwrite=True)
    assert foreign.exists()


def test_a_mistake_costs_no_earlier_run(run: Trains) -> None:
    result = run()
    before = sorted(result.output.rglob("*"))
    for mistake in ({"scheduler": "typo"}, {"init_adapter": str(result.output)}):
        with pytest.raises(ConfigError):
            run(overwrite=True, **mistake)
    assert sorted(result.output.rglob("*")) == before


@pytest.mark.skipif(sys.platform == "win32", reason="a home by HOME")
def test_places_may_be_below_the_home(
    run: Trains, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_text("Who, me?", "utf-8")
    result = run(output="~/run", chat_prompts="~/prompts.txt", max_steps=1)
    assert result.output == tmp_path / "run"
    assert {chat.prompt for chat in _history(result).chats} == {"Who, me?"}
    with pytest.raises(ConfigError, match="The initial adapter is in"):
        run(output="~/run", init_adapter="~/run", overwrite=True)


def test_damaged_checkpoints(run: Trains) -> None:
    result = run(early_stopping=9)
    checkpoints = result.output / "checkpoints"
    before = (result.output / WEIGHTS).read_bytes()
    best = _history(result).best
    assert best is not None
    for step in {best.step, 6}:
        weights = checkpoints / f"step-{step:06}" / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    again = run(resume=True, early_stopping=9)  # from the whole one before, over the damaged one
    assert again.steps == 6
    assert (again.output / WEIGHTS).read_bytes() == before
    assert list(checkpoints.glob("damaged-*"))


def test_resuming_a_finished_run_changes_nothing(run: Trains) -> None:
    first = run()
    before = (first.output / "adapter_model.safetensors").read_bytes()
    again = run(resume=True)
    assert again.steps == first.steps
    assert (again.output / "adapter_model.safetensors").read_bytes() == before


def test_a_resumed_run_keeps_its_settings(run: Trains, screen: Console) -> None:
    result = run()
    with pytest.raises(ConfigError, match="begun with rank = 4, not 8"):
        run(resume=True, rank=8)
    resumed = train(output=str(result.output), resume=True, console=screen)
    assert resumed is not None
    assert resumed.steps == 6


def test_output_below_a_file(run: Trains, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        run(output=str(tmp_path / "file" / "below"))


def test_changed_data_is_not_resumed(run: Trains, tmp_path: Path, rows: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(rows.read_bytes())
    run(data=str(copy))
    copy.write_bytes(rows.read_bytes()[:-1] + b" \n")
    with pytest.raises(ConfigError, match="data has changed"):
        run(data=str(copy), resume=True)


def test_a_changed_base_is_not_resumed(run: Trains, tiny: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    run(model=str(base), max_steps=1)
    weights = base / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[len(changed) // 2] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(ConfigError, match="base has changed"):
        run(model=str(base), max_steps=1, resume=True)


def test_a_resumed_run_may_go_in_smaller_passes(run: Trains) -> None:
    run(max_steps=1)
    resumed = run(max_steps=1, micro_batch=1, accumulation=8, chat_tokens=0, resume=True)
    assert resumed.steps == 1


def test_nothing_to_resume(run: Trains) -> None:
    with pytest.raises(ConfigError, match="no unfinished run"):
        run(resume=True)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good(
    run: Trains, settings: dict[str, Any]
) -> None:
    with pytest.raises(TrainingFailed, match=r"loss is .*last good checkpoint is .*step-0000"):
        run(
            learning_rate=1e30,
            warmup=0.5,
            max_grad_norm=1e30,
            eval_share=0.0,
            save_steps=100,
            max_steps=20,
        )
    assert not (Path(settings["output"]) / "adapter_model.safetensors").exists()


def test_memory_that_runs_out_costs_no_step(
    run: Trains, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = TrainedModel.loss, count()

    def run_out(model: TrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if torch.is_grad_enabled() and next(calls) == 2 + 2 * 3 + 1:  # the plan's passes, 3 steps
            raise torch.OutOfMemoryError
        return loss(model, batch)

    monkeypatch.setattr(TrainedModel, "loss", run_out)
    with pytest.raises(TrainingFailed, match=r"at step 4.*--accumulation 8\..* is .*step-000003"):
        run(eval_share=0.0, save_steps=100)
    assert run(resume=True, eval_share=0.0, save_steps=50).steps == 6


def test_a_run_that_ends_before_its_first_step_is_judged_once(
    run: Trains, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = SampleChats.ask

    def interrupt(chats: SampleChats, model: TrainedModel, step: int) -> list[Chat]:
        signal.raise_signal(signal.SIGINT)
        return ask(chats, model, step)

    with monkeypatch.context() as patch:
        patch.setattr(SampleChats, "ask", interrupt)
        assert run(max_steps=1).steps == 0
    history = _history(run(resume=True, max_steps=1))
    assert [each.step for each in history.evaluations] == [0, 1]
    assert {each.step for each in history.chats} == {0, 1}


def test_a_bad_row_costs_no_sample_chat(run: Trains, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    outputs = ["One.", "Two.", "Three.", "Four."]
    questions = ["<|im_end|>", "x" * 300, "Second?", "Third?"]
    lines = [{"instruction": q, "output": o} for q, o in zip(questions, outputs, strict=True)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    result = run(data=str(data), eval_share=0.0, max_length=200)
    assert {chat.prompt for chat in _history(result).chats} == {"<|im_end|>", "Second?", "Third?"}


def test_an_evaluation_that_is_no_number_stops(run: Trains, tmp_path: Path) -> None:
    first = run()
    broken = load_file(first.output / WEIGHTS)
    huge = {name: tensor.float() * 3e38 for name, tensor in broken.items()}
    folder = tmp_path / "broken"
    shutil.copytree(first.output, folder, ignore=shutil.ignore_patterns("qlorachat.json"))
    save_file(huge, folder / WEIGHTS)
    with pytest.raises(TrainingFailed, match="evaluation's loss is"):
        run(output=str(tmp_path / "second"), init_adapter=str(folder))


def test_doras_magnitudes_keep_their_bits(run: Trains) -> None:
    tensors = load_file(run(dora=True).output / WEIGHTS)
    kinds = {"magnitude" in name: tensor.dtype for name, tensor in tensors.items()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_the_first_step_of_a_short_run_learns(run: Trains) -> None:
    assert _history(run(max_steps=1)).steps[0].learning_rate == 1e-2


def test_early_stopping_takes_the_best(run: Trains) -> None:
    result = run(learning_rate=3.0, max_steps=40, early_stopping=2)
    assert result.finished
    assert result.steps < 40
    best = _history(result).best
    assert best is not None
    assert best.step < result.steps
    weights = load_file(result.output / "checkpoints" / f"step-{best.step:06}" / WEIGHTS)
    final = load_file(result.output / WEIGHTS)
    assert all(torch.equal(final[name], weight.bfloat16()) for name, weight in weights.items())


def test_going_on_from_an_adapter(run: Trains, tmp_path: Path) -> None:
    first = run()
    second = run(output=str(tmp_path / "second"), init_adapter=str(first.output), rank=4)
    evaluations = [_history(result).evaluations for result in (first, second)]
    assert evaluations[1][0].loss == pytest.approx(evaluations[0][-1].loss, rel=1e-3)
    assert evaluations[1][0].loss < evaluations[0][0].loss - 0.1
    with pytest.raises(ConfigError, match="brings its own"):
        run(output=str(tmp_path / "third"), init_adapter=str(first.output), rank=8)


def test_what_an_initial_adapter_was_trained_for_otherwise_is_said(
    run: Trains, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_lora(tmp_path / "lora", tiny)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "other/model-13b"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_card(folder, AdapterCard(template="llama2", system="Be brief."))
    with caplog.at_level(logging.WARNING):
        run(init_adapter=str(folder), rank=4, max_steps=1)
    assert "other/model-13b" in caplog.text
    assert "the template of" in caplog.text
    assert "was 'llama2' in training and is 'chatml' here" in caplog.text
    assert "system prompt" not in caplog.text


def test_whole_weights_of_an_initial_adapter_train_in_float32(
    run: Trains, tiny: Path, tmp_path: Path
) -> None:
    folder = write_lora(tmp_path / "lora", tiny, modules_to_save=["lm_head"])
    result = run(init_adapter=str(folder), rank=4, max_steps=2)
    saved = load_file(result.output / "checkpoints" / "step-000002" / WEIGHTS)
    head = next(tensor for name, tensor in saved.items() if "lm_head" in name)
    assert not torch.equal(head, head.bfloat16().float())


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "max_length": 200},
        {"group_by_length": True},
        {"rslora": True},
        {"dora": True},
        {"recipe": "zundamon", "rank": 4, "alpha": 4.0},
        {"targets": ["q_proj", "v_proj"]},
        {"train_on_prompt": True},
        {"gradient_checkpointing": True, "dropout": 0.1},
        {"quantization": "16bit"},
        {"optimizer": "sgd", "scheduler": "linear"},
        {"chat_tokens": 0, "eval_share": 0.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_way_to_train(run: Trains, changes: dict[str, Any]) -> None:
    result = run(max_steps=2, **changes)
    assert result.finished
    with ChatEngine(adapters={"q": result.output}, device="cpu") as engine:
        assert engine.chat("Hi", adapter="q", max_tokens=2).usage.completion_tokens > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "--data"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"max_length": 9000}, "context of .* holds 256"),
        ({"targets": ["nose"]}, "no linear layer named nose"),
        ({"targets": ["embed_tokens"]}, "no linear layer named embed_tokens"),
        ({"scheduler": "reduce_lr_on_plateau"}, "scheduler reduce_lr_on_plateau"),
        ({"early_stopping": 1, "eval_share": 0.0}, "early_stopping needs rows"),
        ({"device": "cuda:99"}, "CUDA|build for the CPU"),
        ({"optimizer": "adamx"}, "optimizer adamx"),
        ({"optimizer": "schedule_free_sgd"}, "schedule_free_sgd cannot be used: it must"),
        ({"scheduler": "cosign"}, "scheduler cosign"),
        ({"template": "llama3"}, "llama3"),
        ({"memory": "much"}, "memory is a size"),
        ({"init_adapter": "nowhere"}, "nowhere"),
        ({"output": "x" * 300}, r"The output 'x+' is no path \("),
        ({"output": "a\0b"}, "The output .* is no path"),
        ({"data": "x" * 300 + ".jsonl"}, "The data 'x+' is no path"),
        ({"data": "~nosuchuser/rows.jsonl"}, "The data '~nosuchuser/rows.jsonl' is no path"),
        ({"data": "a\0b"}, "The data .* is no path"),
        ({"eval_data": "a\0b"}, "The data .* is no path"),
        ({"chat_prompts": "a\0b"}, "The chat_prompts .* is no path"),
        ({"init_adapter": "a\0b"}, "The init_adapter .* is no path"),
        ({"chat_prompts": "nowhere.txt"}, "nowhere.txt"),
    ],
    ids=lambda case: str(next(iter(case))) if isinstance(case, dict) else "",
)
def test_mistakes(run: Trains, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(QlorachatError, match=message) as caught:
        run(**changes)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_said_with_what_would(run: Trains) -> None:
    with pytest.raises(ModelError, match=r"use --gradient-checkpointing --micro-batch \d"):
        run(memory="2MiB", micro_batch=8, max_length=250)


def test_config_and_options(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not both"):
        train(TrainConfig(**settings), rank=3)
    with pytest.raises(ConfigError, match="did you mean `rank`"):
        train(ranc=3)
