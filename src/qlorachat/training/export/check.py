"""Whether a merged model still answers like its adapter: what is asked, and the verdict."""

from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel

from qlorachat.errors import ConfigError
from qlorachat.messages import Message
from qlorachat.protocols import Template, Tokenizer
from qlorachat.templates import Prompt, build_prompt
from qlorachat.training.data.rows import read_rows
from qlorachat.training.data.samples import Sample, build_samples
from qlorachat.training.export.agreement import Agreement, Reference, answer

# Measured on the demo model, on rows of two data sets: 16-bit arithmetic alone, the same model with
# its weights dequantized, costs 0.002 to 0.005 nats and 2 to 3 % of the likeliest tokens (ties);
# the merge 0.004 to 0.007 nats and 2 to 3.5 %; a merge into 4 bits again, as PEFT's is, 1.0 to 5.7
# nats and 27 to 86 %. The limits lie between.
MOST_KL = 0.05  # nats
LEAST_TOP_1 = 0.93

MOST_ROWS = 64  # read from held-out data
LONGEST_ROW = 1024  # tokens; longer ones are cut, as training does
LONGEST_ANSWER = 64  # tokens to a prompt of ours

PROMPTS = (
    "Introduce yourself in one sentence.",
    "自己紹介を一文でしてください。",
    "What is the capital of Japan?",
    "日本で一番高い山は何ですか。",
    "Name three colours.",
    "健康のためにできることを三つ挙げてください。",
    "Tell a short story about a cat.",
    "猫の短いお話をしてください。",
)


@dataclass(frozen=True, slots=True)
class Questions:
    """What both models are asked: rows with their answers, else prompts that have none yet."""

    name: str
    stop_ids: frozenset[int]  # end an answer
    samples: tuple[Sample, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    left_out: int = 0  # rows that gave no sample

    def ask(self, adapted: PeftModel, quantization: str) -> "Standard":
        """How the un-merged adapter answers on its base, which is in `quantization`."""
        model = adapted.get_base_model()
        samples = self.samples or answer(
            model, self.prompts, stop_ids=self.stop_ids, max_tokens=LONGEST_ANSWER
        )
        reference = Reference(model, samples)
        with adapted.disable_adapter():
            return Standard(self, reference, reference.compare(model), quantization)


@dataclass(frozen=True, slots=True)
class Standard:
    """What a merged model is held against; holds no model, so that one fits in memory."""

    questions: Questions
    reference: Reference
    base: Agreement  # of the bare base with the adapter
    quantization: str

    def judge(self, merged: PreTrainedModel) -> "Check":
        """Ask the merged model the same."""
        return Check(
            asked=self.questions.name,
            rows=len(self.reference.samples),
            left_out=self.questions.left_out,
            quantization=self.quantization,
            merged=self.reference.compare(merged),
            base=self.base,
        )


def read_questions(
    data: str | None,
    template: Template,
    tokenizer: Tokenizer,
    *,
    stop_ids: frozenset[int],
    system: str | None,
    offline: bool = False,
) -> Questions:
    """The first MOST_ROWS rows of `data`, or PROMPTS in the template's format.

    Raises ConfigError for data without a usable row, DialogError for a template that does not fit,
    and HubError.
    """
    if data is None:
        first = (Message("system", system),) if system is not None else ()
        dialogs = [(*first, Message("user", prompt)) for prompt in PROMPTS]
        prompts = tuple(build_prompt(template, dialog, tokenizer) for dialog in dialogs)
        return Questions("our prompts, answered by the adapter", stop_ids, prompts=prompts)
    found = read_rows(data, system=system, offline=offline)
    built = build_samples(found.rows[:MOST_ROWS], template, tokenizer, max_length=LONGEST_ROW)
    if not built.samples:
        line, reason = built.bad[0].line, built.bad[0].reason
        raise ConfigError(
            f"{data} has no row to check the merged model with; the first, line {line}: {reason}.",
            param="data",
        )
    left_out = len(found.bad) + len(built.bad)
    return Questions(found.name, stop_ids, samples=built.samples, left_out=left_out)


@dataclass(frozen=True, slots=True)
class Check:
    """The merged model, and for scale the base without its adapter, beside the adapter."""

    asked: str  # where the questions came from
    rows: int
    left_out: int
    quantization: str  # of the base under the adapter
    merged: Agreement
    base: Agreement

    @property
    def holds(self) -> bool:
        """Whether the merged model differs by no more than rounding does."""
        return self.merged.mean_kl <= MOST_KL and self.merged.top_1 >= LEAST_TOP_1

    @property
    def verdict(self) -> str:
        """One line for people."""
        limits = f"at least {LEAST_TOP_1:.0%} and a mean KL of at most {MOST_KL} nats"
        if self.holds:
            return f"The merged model answers like the adapter ({limits})."
        return (
            f"WARNING: the merged model does NOT answer like the adapter ({limits} expected): "
            "serve the adapter un-merged, and check that --model and --quantization are those it "
            "was trained with."
        )

    def __str__(self) -> str:
        """A table for people, the verdict below."""
        left_out = f", {self.left_out} left out" if self.left_out else ""
        return "\n".join(
            [
                f"Beside the adapter un-merged on its base ({self.quantization}), "
                f"{self.merged.tokens} answer tokens of {self.rows} rows{left_out}: {self.asked}",
                f"{'':26}{'same likeliest token':>20}{'mean KL':>12}{'largest KL':>12}",
                _line("merged, 16 bit", self.merged),
                _line("base without adapter", self.base),
                self.verdict,
            ]
        )


def _line(name: str, agreement: Agreement) -> str:
    figures = f"{agreement.top_1:20.1%}{agreement.mean_kl:12.4f}{agreement.max_kl:12.2f} nats"
    return f"{name:26}{figures}"
